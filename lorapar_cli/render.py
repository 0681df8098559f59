"""Everything a person sees. rich is loaded only when a table is drawn."""

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from stages.artifacts import Artifact, Store
from stages.errors import LoraparError
from stages.pipeline import State, Step, state
from stages.records import read_jsonl

LINE_EVERY_S = 5


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def error(problem: LoraparError) -> None:
    say(f"error: {problem}")
    if problem.hint:
        say(f"  hint: {problem.hint}")


class Progress:
    """One line that is rewritten on a terminal; elsewhere a line every few seconds."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._open = False

    def start(self, what: str, total: int | None = None) -> None:
        self.done()
        self._what, self._total, self._count = what, total, 0
        self._begun, self._shown = time.monotonic(), 0.0
        self._draw("")

    def advance(self, n: int = 1, note: str = "") -> None:
        self._count += n
        now = time.monotonic()
        if self._count == self._total or now - self._shown > (0.1 if self._live else LINE_EVERY_S):
            self._draw(note)

    def say(self, text: str) -> None:
        self.done()
        say(text)

    def done(self) -> None:
        """End the line that is open."""
        if self._open:
            print(file=sys.stderr)
            self._open = False

    def _draw(self, note: str) -> None:
        self._shown = time.monotonic()
        seconds = self._shown - self._begun
        text = self._what
        if self._total and self._count:
            left = seconds / self._count * (self._total - self._count)
            text += f"  {self._count}/{self._total}  {seconds:.0f} s, {left:.0f} s left  {note}"
        if self._live:
            print(f"\r\x1b[K{text.rstrip()[:110]}", end="", file=sys.stderr, flush=True)
            self._open = True
        elif self._count or not self._total:
            say(text.rstrip())


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    return table


def _print(thing: Any) -> None:
    from rich.console import Console

    Console(highlight=False).print(thing)


def artifact(name: str, made: Artifact, now: bool, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"step": name, "path": str(made.path), "made": now, "summary": made.manifest["summary"]}))
        return
    say(f"{name}: {made.path}" + (f" in {made.manifest['provenance']['seconds']:.0f} s" if now else " is current"))
    if now:
        for line in _facts(made.manifest["summary"]):
            say(f"  {line}")


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
    table = _table("step", "state", "why")
    table.columns[1].justify = table.columns[2].justify = "left"
    for name, s in states.items():
        table.add_row(name, s.state, s.why)
    _print(table)


def manifest(made: Artifact, as_json: bool) -> None:
    if as_json:
        print(json.dumps(made.manifest))
        return
    say(str(made.path))
    for line in _facts(made.manifest["summary"]):
        print(f"  {line}")
    for name, entry in made.manifest["files"].items():
        print(f"  {name}  {entry['size']} bytes  sha256 {entry['sha256'][:12]}")
    for name, entry in made.manifest["inputs"].items():
        print(f"  from {name} {entry['key']}")


def samples(made: Artifact, wrong: bool, limit: int) -> None:
    rows = [row for _, row in read_jsonl(made.path / "samples.jsonl") if not (wrong and row["correct"])]
    for row in rows[:limit]:
        print(
            f"--- {row['id']}  System {row['system']}  gold {row['gold']}  read {row['strict']}  {'right' if row['correct'] else 'wrong'}"
        )
        print(f"{row['prompt']}{row['output']}")


def results(store: Store, steps: list[Step], by: str = "system", as_json: bool = False) -> None:
    """Accuracy per target and group with 95 % intervals, and the paired p-value against the target before."""
    rows = list(_compared(_answers(store, steps, by)))
    if as_json:
        print(json.dumps(rows))
        return
    table = _table("target", "group", "n", "accuracy", "95 %", "flexible", "unparsed", "cut off", "p")
    for r in rows:
        p = "" if r["p"] is None else f"{r['p']:.2g}"
        interval, n = f"{100 * r['low']:.1f}–{100 * r['high']:.1f}", r["n"]
        rates = f"{r['correct'] / n:.1%}", interval, f"{r['correct_flexible'] / n:.1%}"
        table.add_row(r["target"], r["group"], str(n), *rates, str(r["unparsed"]), str(r["truncated"]), p)
    _print(table)
    print("p: exact McNemar test on the same items against the target above")


Answers = dict[str, dict[str, dict[str, dict[str, Any]]]]
"""Per target and group: the graded answers by item."""


def _answers(store: Store, steps: list[Step], by: str) -> Answers:
    found: Answers = {}
    for step in steps:
        now = state(store, step)
        if now.state != "current" or now.artifact is None:
            continue
        for _, row in read_jsonl(now.artifact.path / "samples.jsonl"):
            group = f"system {row['system']}" if by == "system" else str(row["extra"].get(by))
            for name in ("all", group):
                found.setdefault(step.variant, {}).setdefault(name, {})[row["id"]] = row
    return found


def _compared(found: Answers) -> Iterator[dict[str, Any]]:
    from stages.benchmarks.statistics import paired_p, wilson

    groups = sorted({name for target in found.values() for name in target}, key=lambda name: (name != "all", name))
    against: str | None = None
    for target, answers in found.items():
        for group in groups:
            rows = answers.get(group, {})
            if not rows:
                continue
            counts = {name: sum(r[name] for r in rows.values()) for name in ("correct", "correct_flexible", "truncated")}
            low, high = wilson(counts["correct"], len(rows))
            before = found[against].get(group, {}) if against else {}
            p = None
            if before.keys() == rows.keys():
                p = paired_p([before[item]["correct"] for item in rows], [r["correct"] for r in rows.values()])
            unparsed = sum(r["strict"] is None for r in rows.values())
            numbers = {"n": len(rows), **counts, "low": low, "high": high, "unparsed": unparsed}
            yield {"target": target, "group": group, **numbers, "against": against, "p": p}
        against = target


def places(store: Store, steps: dict[str, Step]) -> None:
    """Where each artifact lies, with the share of active elements."""
    table = _table("artifact", "active elements", "where")
    table.columns[2].justify = "left"
    for name, step in steps.items():
        now = state(store, step)
        if now.artifact is not None and now.state == "current":
            share = now.artifact.manifest["summary"].get("active_share")
            table.add_row(name, "" if share is None else f"{share:.1%}", str(now.artifact.path))
    _print(table)


def choices(kinds: dict[str, dict[str, str]]) -> None:
    for kind, names in kinds.items():
        print(kind)
        for name, text in names.items():
            print(f"  {name:<14} {text}")
