"""Terminal output: messages, errors, tables, and the progress of a stage."""

import functools
import logging
import os
import re
import shutil
import sys
import time
from contextlib import suppress
from itertools import zip_longest
from typing import Any, Self

from stages import escaping
from stages.errors import LoraparError
from stages.pipeline.steps import Step
from stages.records import read_samples
from stages.report import comparison, voters
from stages.report.page import Grid
from stages.store.artifacts import Artifact, Store

NO_PROGRESS_BARS = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS")
"""Environment variables by which libraries draw no progress bars."""
NOTHING_TO_DO = "nothing to do: every artifact is current"
LOG_EVERY_S = 10
"""Seconds between two lines of a log on one task."""
_quiet = False


def set_quiet(is_quiet: bool) -> bool:
    """Print nothing from now on but errors, warnings and results, or all again; returns the argument."""
    global _quiet
    _quiet = is_quiet
    if is_quiet:
        os.environ |= dict.fromkeys(NO_PROGRESS_BARS, "1")
    return is_quiet


def say(text: str) -> None:
    if not _quiet:
        conclude(text)


@functools.cache
def console() -> Any:
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False)


def interactive() -> bool:
    """True if stderr is a terminal on which a line may be rewritten."""
    return not _quiet and sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def conclude(text: str) -> None:
    """Print a message that is printed even with --quiet."""
    with suppress(OSError):  # no work may end with its terminal, or on the log's full disk
        if interactive():
            console().print(escaping.terminal(text), soft_wrap=True)  # above a bar, if there is one
        else:
            print(escaping.terminal(text), file=sys.stderr, flush=True)


class LogHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            (conclude if record.levelno >= logging.WARNING else say)(self.format(record))
        except Exception:
            self.handleError(record)


def write(text: str) -> None:
    """Print a result, with control characters shown and not obeyed."""
    print(escaping.terminal(text))


def table(head: list[str], lines: list[list[str]], to_left: tuple[str, ...] = ()) -> None:
    """Print a table. Its first column and those of `to_left` are left-aligned, the others right-aligned.

    On a terminal that is narrower, each row is a list of its cells. A cell may have several lines.
    """
    from rich.cells import cell_len

    rows = [zip_longest(*(cell.split("\n") for cell in cells), fillvalue="") for cells in (head, *lines)]
    texts = [[escaping.terminal(text) for text in row] for cell_lines in rows for row in cell_lines]
    widths = [max(map(cell_len, column)) for column in zip(*texts, strict=True)]
    if sys.stdout.isatty() and sum(widths) + 2 * len(head) - 2 > shutil.get_terminal_size().columns:
        for first, *others in lines:
            write(f"{head[0]}: {first.strip()}")
            for name, cell in filter(all, zip(head[1:], others, strict=True)):
                write(f"  {name:<{max(map(len, head))}}  " + cell.replace("\n", ", "))
        return
    for cells in texts:
        spaces = [" " * (width - cell_len(cell)) for width, cell in zip(widths, cells, strict=True)]
        is_left = [i == 0 or name in to_left for i, name in enumerate(head)]
        padded = zip(cells, spaces, is_left, strict=True)
        print("  ".join(cell + space if left else space + cell for cell, space, left in padded).rstrip())


def _show_grid(grid: Grid | None) -> None:
    """Print a table of a report, if there is one, with its caption below."""
    if grid:
        table(grid.head, grid.rows)
        if grid.caption:
            write(grid.caption)


def error(problem: LoraparError, config: str = "") -> None:
    """Print an error and its hint. config: what the user typed, for the CONFIG of the hint's command."""
    conclude(f"error: {problem}")
    if problem.hint:
        hint = re.sub(r"(?<!\S)CONFIG(?!\S)", lambda _: config or "CONFIG", problem.hint)
        conclude(f"  hint: {hint}")


def artifact(step: Step, committed: Artifact, created: bool) -> None:
    """Report a step's artifact. created: false if it was current already."""
    cost = f" in {_cost(committed)}" if created else " is current"
    conclude(f"{step.name}: {committed.path}{cost}")
    if created and not _quiet:
        for line in _facts(committed):
            say(f"  {line}")
        _show_grid(voters.grid(committed.path))


def _cost(committed: Artifact) -> str:
    provenance = committed.manifest["provenance"]
    peak = max(provenance.get("peak_mib", {}).values(), default=0)
    return f"{provenance['seconds']:.0f} s, {peak:.0f} MiB"


def _facts(committed: Artifact) -> list[str]:
    """Write an artifact's summary: its values in one line, and a line for each group of values."""
    summary = committed.manifest["summary"]
    values = [f"{k}: {_short(v)}" for k, v in summary.items() if not isinstance(v, dict)]
    groups = {k: v.items() for k, v in summary.items() if isinstance(v, dict)}
    lines = [f"{k}: " + ", ".join(f"{n} {_short(v)}" for n, v in group) for k, group in groups.items()]
    return ["; ".join(values), *lines] if values else lines


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "–".join(_short(v) for v in value)
    return str(value)


def gib(mib: float) -> str:
    return f"{mib / 1024:.1f} GiB"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def manifest(committed: Artifact) -> None:
    say(str(committed.path))
    print(f"  took {_cost(committed)}")
    for line in _facts(committed):
        write(f"  {line}")
    for name, entry in committed.manifest["files"].items():
        print(f"  {name}  {entry['size']} bytes  sha256 {entry['sha256'][:12]}")
    for name, entry in committed.manifest["inputs"].items():
        print(f"  from {name} {entry['key']}")
    _show_grid(voters.grid(committed.path))


def samples(evaluation: Artifact, wrong: bool, limit: int) -> None:
    """Print up to `limit` graded answers. wrong: only those that are not correct."""
    graded = read_samples(evaluation.path / "samples.jsonl")
    if not graded:
        say("no graded answers; metrics.json has what the task measures")
    for sample in [sample for sample in graded if not (wrong and sample.correct)][:limit]:
        system = f"System {sample.system}  " if sample.system else ""
        gold = f"gold {sample.gold}  read {sample.strict}  " if sample.gold is not None else ""
        extra = sample.extra  # a field of the rows may be called `why`, too
        verdict = f" ({extra['verdict']}: {extra['why']})" if "verdict" in extra and extra.get("why") else ""
        write(f"--- {sample.id}  {system}{gold}{sample.outcome}{verdict}")
        write(f"{sample.prompt}{sample.output}")


def results(store: Store, steps: list[Step], by: str = "system") -> None:
    """Print a table for each benchmark: accuracy of every target and group, with intervals and paired p."""
    for name, of_benchmark in comparison.measured(store, steps, by).items():
        _show_grid(comparison.grid(name, of_benchmark, {}))
        print()


class TerminalProgress:
    """Progress of the steps of one stage, as a context: a bar on a terminal, else lines of a log."""

    def __init__(self, title: str = "") -> None:
        """title: of the stage, with its position in the run."""
        self.title, self._task, self._done, self._note = title, "", 0, ""
        self._total: int | None = None
        self._begun = self._logged = 0.0
        self._bar: Any = None
        self._row: Any = None

    def __enter__(self) -> Self:
        if interactive():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"), console=console(), transient=True,
            )  # fmt: skip
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done()
        if self._bar:
            self._bar.stop()

    def start(self, task: str, total: int | None = None) -> None:
        self.done()
        self._task, self._total, self._done, self._note = task, total, 0, ""
        self._begun = self._logged = time.monotonic()
        if self._bar:
            self._row = self._bar.add_task(f"{self.title} {task}".strip(), total=total, note="")
        elif not total:
            say(task)

    def advance(self, n: int = 1, note: str = "") -> None:
        self._done, self._note = self._done + n, note
        if self._row is not None:
            self._bar.update(self._row, advance=n, note=note)
        elif self._task and self._total and time.monotonic() - self._logged >= LOG_EVERY_S:
            self._log()

    def say(self, text: str) -> None:
        say(text)

    def done(self) -> None:
        """End the task. A log gets a last line on it."""
        if self._row is not None:
            self._bar.remove_task(self._row)
            self._row = None
        elif self._task and self._total:
            self._log()
        self._task = ""

    def _log(self) -> None:
        self._logged = time.monotonic()
        count = f"{self._done}/{self._total} in {duration(self._logged - self._begun)}"
        say("  ".join(filter(None, (self._task, count, self._note))))
