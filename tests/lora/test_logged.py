"""The figure of what a training logs."""

from stages.lora.training import curves
from stages.lora.training.curves import draw  # conftest replaces it before the first test

HISTORY = [
    {"step": step, "loss": 1 / step, "reward": float(step), "rewards/a/mean": 1.0, "rewards/b/mean": 2.0}
    for step in (1, 2, 3)
]


def test_the_figure_has_a_panel_for_all_that_there_is_and_does_not_tell_when_it_was_made(tmp_path):
    drawn = {axes.get_title(): axes for axes in curves.history_figure(HISTORY).axes}
    assert list(drawn) == ["loss", "reward"]
    lines = {line.get_label(): list(line.get_ydata()) for line in drawn["reward"].lines}
    assert lines == {"all, weighted": [1, 2, 3], "a": [1, 1, 1], "b": [2, 2, 2]}
    draw(HISTORY, tmp_path / "one.png")
    draw(HISTORY, tmp_path / "two.png")
    made = (tmp_path / "one.png").read_bytes()
    assert made.startswith(b"\x89PNG") and made == (tmp_path / "two.png").read_bytes()
