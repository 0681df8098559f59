"""Torture: random faults by the hundred, with a table at the end. `make torture` tries all, CI a sample.

LORAPAR_TORTURE=full is for all; LORAPAR_SEED repeats what a run has printed.
"""

import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

FULL = os.environ.get("LORAPAR_TORTURE") == "full"
SEED = int(os.environ.get("LORAPAR_SEED") or random.SystemRandom().randrange(10**6))
COLUMNS = ("seed", "tried", "seconds", "found", "lost", "tracebacks", "hangs", "left behind")
KEY = "torture"


@dataclass
class Tally:
    """What a kind of fault has done; only `tried` may be above zero."""

    kind: str
    random: random.Random
    tried: int = 0
    skipped: bool = False
    """It cannot be tried on this machine."""
    lost: list[str] = field(default_factory=list)
    """Artifacts that are gone, that differ, or that are damaged and were believed."""
    tracebacks: list[str] = field(default_factory=list)
    """Also errors that call themselves defects."""
    hangs: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    """Processes that outlived their command."""


@pytest.fixture
def tally(request: pytest.FixtureRequest, record_property) -> Iterator[Tally]:
    name = request.node.name
    found = Tally(name.removeprefix("test_").replace("_", " "), random.Random(f"{SEED} {name}"))
    begun = time.monotonic()
    yield found
    faults = [found.lost, found.tracebacks, found.hangs, found.left]
    numbers, wrong = list(map(len, faults)), sum(faults, [])
    seconds = round(time.monotonic() - begun)
    record_property(KEY, [found.kind, SEED, found.tried, seconds, sum(numbers), *numbers])
    assert (found.tried or found.skipped) and not wrong, "\n".join(wrong[:20])


def pytest_terminal_summary(terminalreporter) -> None:
    reports = [r for part in terminalreporter.stats.values() for r in part if hasattr(r, "user_properties")]
    rows = [value for report in reports for key, value in report.user_properties if key == KEY]
    if not rows:
        return
    terminalreporter.section("torture")
    width = max(len(str(row[0])) for row in rows)
    terminalreporter.write_line(" " * width + "".join(f"{name:>13}" for name in COLUMNS))
    for kind, *numbers in sorted(rows):
        terminalreporter.write_line(f"{kind:<{width}}" + "".join(f"{number:>13}" for number in numbers))
