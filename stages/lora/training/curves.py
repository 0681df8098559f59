"""Curves of a training run as one figure: loss, rewards and lengths by optimizer step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


History = list[dict[str, float]]
NO_SIGNAL = "frac_reward_zero_std"
"""Name of the values that are shares, and drawn in per cent."""


def draw(history: History, path: Path) -> None:
    """Write the figure as a PNG that does not tell when or where it was made."""
    history_figure(history).savefig(path, metadata={"Software": None})


def history_figure(history: History, only: str = "") -> Figure:
    """Draw the panels for which the history has values, or one alone. only: its title."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    titles = {title: series for title, series in panels(history).items() if only in ("", title)}
    columns = min(3, len(titles))
    rows = math.ceil(len(titles) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.0 * rows), dpi=120, layout="constrained")
    for position, (title, series) in enumerate(titles.items(), 1):
        axes = figure.add_subplot(rows, columns, position)
        for label, name in series.items():
            scale = 100 if name == NO_SIGNAL else 1
            curve = [(row["step"], scale * row[name]) for row in history if name in row and "step" in row]
            marker = "." if len(curve) < 60 else None
            axes.plot(*zip(*curve, strict=True), label=label, linewidth=1.3, marker=marker)
        axes.set(title=title, xlabel="optimizer step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(series) > 1:
            axes.legend(frameon=False, fontsize="small")
    return figure


def panels(history: History) -> dict[str, dict[str, str]]:
    """Title of a panel → label of a curve → name of its values; only what the history has."""
    names = {name for row in history for name in row}
    by_reward = {
        name.removeprefix("rewards/").removesuffix("/mean"): name
        for name in sorted(names)
        if name.startswith("rewards/") and name.endswith("/mean")
    }
    rewards = {"all, weighted": "reward"} if "reward" in names else {}
    if rewards and len(by_reward) > 1:
        rewards |= by_reward
    systems = {f"System {system}": f"system{system}/" for system in (1, 2)}
    series_by_title = {
        "loss": {"loss": "loss"},
        "reward": rewards | {label: f"{name}reward" for label, name in systems.items()},
        "groups without signal, %": {"groups": NO_SIGNAL},
        "completion length, tokens": {
            "mean": "completions/mean_length",
            "longest": "completions/max_length",
            **{label: f"{name}completions/mean_length" for label, name in systems.items()},
        },
        "gradient norm": {"norm": "grad_norm"},
    }
    existing = {
        title: {label: name for label, name in series.items() if name in names}
        for title, series in series_by_title.items()
    }
    return {title: series for title, series in existing.items() if series}
