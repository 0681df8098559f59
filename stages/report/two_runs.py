"""Two runs side by side: what each target of both answers to the items that both were asked."""

from collections.abc import Iterator
from contextlib import suppress

from stages.config import Config
from stages.errors import ConfigError
from stages.pipeline.state import leaves
from stages.report.comparison import Answers, shares_by_item
from stages.report.page import Grid, PageSection, render
from stages.report.run_page import titles_of
from stages.sweep.values import NothingToShow, Value, accuracy, difference

CAPTION = (
    "Accuracy in % on the items that both runs were asked [95 % interval over items]; the difference in "
    "points, with a paired test. It says nothing about other seeds: a table of several does (lorapar sweep)."
)
Pair = tuple[Value, Value, Value]
"""Accuracies of a target in the first and in the second run, and what the second has more."""


def pairs(first: dict[str, Answers], second: dict[str, Answers]) -> dict[str, dict[str, Pair]]:
    """Compare two runs by benchmark and target. ConfigError if no target of both was asked the same items.

    An item is known by the hash of its content, so files of other names, or rows in another order, compare.
    """
    compared = {name: dict(_pairs(of, second[name])) for name, of in first.items() if name in second}
    if not any(compared.values()):
        raise ConfigError(
            "the two runs have no target and no item in common", "evaluate both on the same file"
        )
    return {name: of for name, of in compared.items() if of}


def _pairs(first: Answers, second: Answers) -> Iterator[tuple[str, Pair]]:
    for target in (target for target in first if target in second):
        of_runs = [shares_by_item(answers[target]["all"]) for answers in (first, second)]
        common = of_runs[0].keys() & of_runs[1].keys()
        old, new = ([{item: share for item, share in run.items() if item in common}] for run in of_runs)
        with suppress(NothingToShow):
            yield target, (accuracy(old), accuracy(new), difference(old, new))


def page(configs: list[Config], names: list[str], compared: dict[str, dict[str, Pair]]) -> str:
    """Render the page, with the settings in which the runs differ. names: what to call each run."""
    titles, (old, new) = titles_of(configs[0]), [leaves(config.model_dump(mode="json")) for config in configs]
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    settings = Grid(
        ["setting", *names], [[key, *(str(of.get(key, "–")) for of in (old, new))] for key in keys]
    )
    grids = [
        Grid(
            [benchmark, "n", *names, "difference"],
            [[titles.get(target, target), str(values[0].n), *(value.text() for value in values)]
             for target, values in of.items()],
            CAPTION,
        )
        for benchmark, of in compared.items()
    ]  # fmt: skip
    sections = [PageSection("results", "Results", [*grids]), PageSection("settings", "Settings", [settings])]
    return render(f"lorapar: {' and '.join(names)}", [], sections)
