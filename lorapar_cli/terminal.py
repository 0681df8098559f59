"""Terminal output: progress, tables, messages."""

import json
import re
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from lorapar_cli import voter_report
from lorapar_cli.tables import show, table
from stages import escaping
from stages.config import REGIONS
from stages.errors import LoraparError
from stages.pipeline.state import State, state
from stages.pipeline.steps import Step
from stages.records import read_samples
from stages.report import comparison, results_table
from stages.store.artifacts import Artifact, Store
from stages.store.estimates import actual_and_planned

LINE_EVERY_S = 5
"""Seconds between progress lines where stderr is no terminal."""
SETTLE_S = 0.2
"""Delay before a progress line is drawn, so that it counts a whole batch of answers."""


def say(text: str) -> None:
    print(escaping.terminal(text), file=sys.stderr, flush=True)


def write(text: str) -> None:
    """Print a result, with control characters shown and not obeyed."""
    print(escaping.terminal(text))


def nothing_to_do() -> None:
    say("nothing to do: every artifact is current")


def error(problem: LoraparError, config: str = "") -> None:
    """Print an error and its hint. config: what the user typed, for the CONFIG of the hint's command."""
    with suppress(OSError):  # on a full disk the log cannot be written, but the exit code still tells
        say(f"error: {problem}")
        if problem.hint:
            hint = re.sub(r"(?<!\S)CONFIG(?!\S)", lambda _: config or "CONFIG", problem.hint)
            say(f"  hint: {hint}")


class TerminalProgress:
    """Progress as one line that is rewritten on a terminal; elsewhere as a new line every few seconds.

    Answers arrive in batches, so a line is drawn a moment after the first answer of a batch: at once, it
    would count that answer alone.
    """

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._line_open = False
        self._lock = threading.RLock()
        self._timer: threading.Timer | None = None

    def start(self, what: str, total: int | None = None) -> None:
        with self._lock:
            self.done()
            self._what, self._total, self._count, self._note = what, total, 0, ""
            self._started_s = self._last_s = time.monotonic()
            self._draw()

    def advance(self, n: int = 1, note: str = "") -> None:
        with self._lock:
            self._count, self._note, self._last_s = self._count + n, note, time.monotonic()
            if self._count == self._total:
                self._draw()
            elif self._timer is None and self._last_s - self._drawn_s > (0.1 if self._live else LINE_EVERY_S):
                self._timer = threading.Timer(SETTLE_S, self._draw_late)
                self._timer.daemon = True
                self._timer.start()

    def say(self, text: str) -> None:
        with self._lock:
            self.done()
            say(text)

    def done(self) -> None:
        """End the current line."""
        with self._lock:
            self._cancel_timer()
            if self._line_open:
                print(file=sys.stderr)
                self._line_open = False

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _draw_late(self) -> None:
        with self._lock:
            if self._timer is not None:  # else the line has ended in the meantime
                self._draw()

    def _draw(self) -> None:
        with self._lock:
            self._cancel_timer()
            self._drawn_s = time.monotonic()
            seconds, text = self._last_s - self._started_s, self._what
            if self._total and self._count:
                to_go = seconds / self._count * (self._total - self._count)
                text += f"  {self._count}/{self._total}  {seconds:.0f} s, {to_go:.0f} s left  {self._note}"
            if self._live:
                line = escaping.one_line(text)[:110]
                print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
                self._line_open = True
            elif self._count or not self._total:
                say(text.rstrip())


class Silence:
    """Progress that prints nothing, for every rank but the first."""

    def start(self, what: str, total: int | None = None) -> None: ...
    def advance(self, n: int = 1, note: str = "") -> None: ...
    def say(self, text: str) -> None: ...
    def done(self) -> None: ...


def artifact(name: str, committed: Artifact, created: bool, as_json: bool) -> None:
    """Report a step's artifact. created: false if it was current already."""
    summary, path = committed.manifest["summary"], committed.path
    if as_json:
        print(json.dumps({"step": name, "path": str(path), "made": created, "summary": summary}))
        return
    say(f"{name}: {path}" + (f" in {_cost(committed)}" if created else " is current"))
    if created:
        for line in _facts(summary):
            say(f"  {line}")
        voter_report.report(path)


def _cost(committed: Artifact) -> str:
    """Format time and memory of a step, and in brackets what `lorapar plan` had estimated."""
    actual, planned = actual_and_planned(committed.manifest["provenance"])
    costs = [(actual.seconds, planned.seconds, "s"), (actual.mib, planned.mib, "MiB")]
    return ", ".join(
        f"{value:.0f} {unit}" + ("" if estimate is None else f" (planned {estimate:.0f})")
        for value, estimate, unit in costs
        if value is not None
    )


def _facts(summary: dict[str, Any]) -> list[str]:
    lines = [f"{k}: {_short(v)}" for k, v in summary.items() if not isinstance(v, dict)]
    nested = [
        f"{k}: " + ", ".join(f"{n} {_short(v)}" for n, v in value.items())
        for k, value in summary.items()
        if isinstance(value, dict)
    ]
    return ["; ".join(lines), *nested] if lines else nested


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "–".join(_short(v) for v in value)
    return str(value)


def status(states: dict[str, State], as_json: bool) -> None:
    if as_json:
        print(json.dumps({name: {"state": s.state, "why": s.why} for name, s in states.items()}))
        return
    rows = table("step", "state", "why", text="why")
    rows.columns[1].justify = "left"
    for name, s in states.items():
        rows.add_row(name, s.state, s.why)
    show(rows)


def gib(mib: float) -> str:
    return f"{mib / 1024:.1f} GiB"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def manifest(committed: Artifact, as_json: bool) -> None:
    if as_json:
        print(json.dumps(committed.manifest))
        return
    say(str(committed.path))
    print(f"  took {_cost(committed)}")
    for line in _facts(committed.manifest["summary"]):
        write(f"  {line}")
    for name, entry in committed.manifest["files"].items():
        print(f"  {name}  {entry['size']} bytes  sha256 {entry['sha256'][:12]}")
    for name, entry in committed.manifest["inputs"].items():
        print(f"  from {name} {entry['key']}")
    voter_report.report(committed.path)


def samples(evaluation: Artifact, wrong: bool, limit: int, as_json: bool = False) -> None:
    """Print up to `limit` graded answers. wrong: only those that are not correct."""
    graded = read_samples(evaluation.path / "samples.jsonl")
    if not graded:
        say("no graded answers; metrics.json has what the task measures")
    for sample in [sample for sample in graded if not (wrong and sample.correct)][:limit]:
        row = asdict(sample)
        if as_json:
            print(json.dumps(row, ensure_ascii=False))
            continue
        system = f"System {row['system']}  " if row["system"] else ""
        gold = f"gold {row['gold']}  read {row['strict']}  " if row["gold"] is not None else ""
        extra = row["extra"]  # a field of the rows may be called `why`, too
        verdict = f" ({extra['verdict']}: {extra['why']})" if "verdict" in extra and extra.get("why") else ""
        write(f"--- {row['id']}  {system}{gold}{row['outcome']}{verdict}")
        write(f"{row['prompt']}{row['output']}")


def results(store: Store, steps: list[Step], by: str = "system", as_json: bool = False) -> None:
    """Print a table for each benchmark: accuracy of every target and group, with intervals and paired p."""
    tables = comparison.tables(store, steps, by)
    if as_json:
        print(json.dumps(tables))
        return
    for name, measurements in tables.items():
        if not measurements:  # the harness has tasks without an accuracy
            print(f"{name}: no graded answers; metrics.json of its artifacts has the harness's own figures\n")
            continue
        benchmark = results_table.build(name, measurements, details=True)
        rows = table(*benchmark.columns)
        for texts in benchmark.texts(to="–", before_p="\n"):
            rows.add_row(*texts)
        show(rows)
        print(f"{fewer}\n" if (fewer := comparison.answered_fewer(measurements)) else "")
    if tables:
        print(
            "accuracy in % [95 % interval]; p: paired test on the same items against the target to the left\n"
            "tokens: mean length of an answer"
        )
        if any(row["target"] in REGIONS for measurements in tables.values() for row in measurements):
            print("regions alone are tested against the model that they are of")


def places(store: Store, steps: dict[str, Step]) -> None:
    """Print the folder of each current artifact, with its share of active elements."""
    rows = table("artifact", "active elements", "where", text="where")
    for name, step in steps.items():
        now = state(store, step)
        if now.artifact is not None and now.state == "current":
            share = now.artifact.manifest["summary"].get("active_share")
            rows.add_row(name, "" if share is None else f"{share:.1%}", str(now.artifact.path))
    show(rows)


def choices(kinds: dict[str, dict[str, str]]) -> None:
    for kind, names in kinds.items():
        print(kind)
        width = max(14, *map(len, names))
        for name, text in names.items():
            print(f"  {name:<{width}} {text}")
