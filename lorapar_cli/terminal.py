"""Everything a person sees."""

import json
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from lorapar_cli import voter_report
from lorapar_cli.tables import percent, show, table
from stages.config import REGIONS
from stages.errors import LoraparError
from stages.evaluation.statistics import p_value
from stages.pipeline.state import State, state
from stages.pipeline.steps import Step
from stages.records import read_samples
from stages.report import comparison
from stages.store.artifacts import Artifact, Store
from stages.store.estimates import actual_and_planned

LINE_EVERY_S = 5
SETTLE_S = 0.2


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def nothing_to_do() -> None:
    say("nothing to do: every artifact is current")


def error(problem: LoraparError) -> None:
    with suppress(OSError):  # where a full disk has the log, the exit code still tells
        say(f"error: {problem}")
        if problem.hint:
            say(f"  hint: {problem.hint}")


class TerminalProgress:
    """One line that is rewritten on a terminal; elsewhere a line every few seconds.

    Answers come a batch at a time. So a line is drawn a moment after the first answer of a batch: else it
    would count that one alone.
    """

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._open = False
        self._lock = threading.RLock()
        self._timer: threading.Timer | None = None

    def start(self, what: str, total: int | None = None) -> None:
        with self._lock:
            self.done()
            self._what, self._total, self._count, self._note = what, total, 0, ""
            self._begun = self._last = time.monotonic()
            self._draw()

    def advance(self, n: int = 1, note: str = "") -> None:
        with self._lock:
            self._count, self._note, self._last = self._count + n, note, time.monotonic()
            if self._count == self._total:
                self._draw()
            elif self._timer is None and self._last - self._shown > (0.1 if self._live else LINE_EVERY_S):
                self._timer = threading.Timer(SETTLE_S, self._late)
                self._timer.daemon = True
                self._timer.start()

    def say(self, text: str) -> None:
        with self._lock:
            self.done()
            say(text)

    def done(self) -> None:
        """End the line that is open."""
        with self._lock:
            self._settle()
            if self._open:
                print(file=sys.stderr)
                self._open = False

    def _settle(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        with self._lock:
            if self._timer is not None:  # else the line has ended meanwhile
                self._draw()

    def _draw(self) -> None:
        with self._lock:
            self._settle()
            self._shown = time.monotonic()
            seconds, text = self._last - self._begun, self._what
            if self._total and self._count:
                left = seconds / self._count * (self._total - self._count)
                text += f"  {self._count}/{self._total}  {seconds:.0f} s, {left:.0f} s left  {self._note}"
            if self._live:
                print(f"\r\x1b[K{text.rstrip()[:110]}", end="", file=sys.stderr, flush=True)
                self._open = True
            elif self._count or not self._total:
                say(text.rstrip())


class Silence:
    """The Progress of a process that is not the first of its kind."""

    def start(self, what: str, total: int | None = None) -> None: ...
    def advance(self, n: int = 1, note: str = "") -> None: ...
    def say(self, text: str) -> None: ...
    def done(self) -> None: ...


def artifact(name: str, made: Artifact, now: bool, as_json: bool) -> None:
    if as_json:
        print(
            json.dumps(
                {"step": name, "path": str(made.path), "made": now, "summary": made.manifest["summary"]}
            )
        )
        return
    say(f"{name}: {made.path}" + (f" in {_spent(made)}" if now else " is current"))
    if now:
        for line in _facts(made.manifest["summary"]):
            say(f"  {line}")
        voter_report.report(made.path)


def _spent(made: Artifact) -> str:
    """Time and memory of a step, and in brackets what `lorapar plan` had told."""
    took, told = actual_and_planned(made.manifest["provenance"])
    parts = [f"{took.seconds:.0f} s" + (f" (planned {told.seconds:.0f})" if told.seconds is not None else "")]
    if took.mib is not None:
        parts.append(f"{took.mib:.0f} MiB" + (f" (planned {told.mib:.0f})" if told.mib is not None else ""))
    return ", ".join(parts)


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
    drawn = table("step", "state", "why", text="why")
    drawn.columns[1].justify = "left"
    for name, s in states.items():
        drawn.add_row(name, s.state, s.why)
    show(drawn)


def gib(mib: float) -> str:
    return f"{mib / 1024:.1f} GiB"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def manifest(made: Artifact, as_json: bool) -> None:
    if as_json:
        print(json.dumps(made.manifest))
        return
    say(str(made.path))
    print(f"  took {_spent(made)}")
    for line in _facts(made.manifest["summary"]):
        print(f"  {line}")
    for name, entry in made.manifest["files"].items():
        print(f"  {name}  {entry['size']} bytes  sha256 {entry['sha256'][:12]}")
    for name, entry in made.manifest["inputs"].items():
        print(f"  from {name} {entry['key']}")
    voter_report.report(made.path)


def samples(made: Artifact, wrong: bool, limit: int, as_json: bool = False) -> None:
    graded = read_samples(made.path / "samples.jsonl")
    if not graded:
        say("no graded answers; metrics.json has what the task measures")
    for sample in [sample for sample in graded if not (wrong and sample.correct)][:limit]:
        row = asdict(sample)
        if as_json:
            print(json.dumps(row, ensure_ascii=False))
            continue
        system = f"System {row['system']}  " if row["system"] else ""
        gold = f"gold {row['gold']}  read {row['strict']}  " if row["gold"] is not None else ""
        extra = row["extra"]  # the rows may have a field of that name
        verdict = f" ({extra['verdict']}: {extra['why']})" if "verdict" in extra and extra.get("why") else ""
        print(f"--- {row['id']}  {system}{gold}{row['outcome']}{verdict}")
        print(f"{row['prompt']}{row['output']}")


def results(store: Store, steps: list[Step], by: str = "system", as_json: bool = False) -> None:
    """One table per benchmark: accuracy of every target and group with 95 % intervals and paired p-values."""
    tables = comparison.tables(store, steps, by)
    if as_json:
        print(json.dumps(tables))
        return
    for name, rows in tables.items():
        if not rows:  # of the harness's tasks that have no accuracy
            print(f"{name}: no graded answers; metrics.json of its artifacts has the harness's own figures\n")
            continue
        targets = list(dict.fromkeys(row["target"] for row in rows))
        drawn = table(name, "n", *targets)
        groups: dict[str, dict[str, Any]] = {
            group: {} for group in dict.fromkeys(row["group"] for row in rows)
        }
        for row in rows:
            groups[row["group"]][row["target"]] = row
        for group, of in groups.items():
            n = max(row["n"] for row in of.values())
            drawn.add_row(group, str(n), *(_cell(of.get(target)) for target in targets))
        for group, of in groups.items():
            if any(row["tokens"] is not None for row in of.values()):
                drawn.add_row(f"tokens, {group}", "", *(_tokens(of.get(target)) for target in targets))
        whole = [next(r for r in rows if r["target"] == t and r["group"] == "all") for t in targets]
        if any(row["flexible"] != row["accuracy"] for row in whole):
            drawn.add_row("all, flexible", "", *(f"{percent(row['flexible'])}" for row in whole))
        for outcome in ("unparsed", "truncated", "refused"):
            if any(row[outcome] for row in whole):
                drawn.add_row(f"  {outcome}", "", *(str(row[outcome]) for row in whole))
        show(drawn)
        print(f"{fewer}\n" if (fewer := comparison.answered_fewer(rows)) else "")
    if tables:
        print(
            "accuracy in % [95 % interval]; p: paired test on the same items against the target to the left\n"
            "tokens: mean length of an answer"
        )
        if any(row["target"] in REGIONS for rows in tables.values() for row in rows):
            print("regions alone are tested against the model that they are of")


def _tokens(row: dict[str, Any] | None) -> str:
    return "–" if row is None or row["tokens"] is None else f"{row['tokens']:.0f}"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None or row["accuracy"] is None:
        return "–"
    p = "" if row["p"] is None else f"\n{p_value(row['p'])}"
    return f"{percent(row['accuracy'])} [{percent(row['low'])}–{percent(row['high'])}]{p}"


def places(store: Store, steps: dict[str, Step]) -> None:
    """Where each artifact lies, with the share of active elements."""
    drawn = table("artifact", "active elements", "where", text="where")
    for name, step in steps.items():
        now = state(store, step)
        if now.artifact is not None and now.state == "current":
            share = now.artifact.manifest["summary"].get("active_share")
            drawn.add_row(name, "" if share is None else f"{share:.1%}", str(now.artifact.path))
    show(drawn)


def choices(kinds: dict[str, dict[str, str]]) -> None:
    for kind, names in kinds.items():
        print(kind)
        for name, text in names.items():
            print(f"  {name:<14} {text}")
