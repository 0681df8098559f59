"""What the rl stage makes of its settings."""

import json

import pytest
from conftest import make_step


@pytest.fixture
def ready(begun):
    """The config of a run whose RL can start, in one step from the initial adapter."""
    return lambda *more: begun("rl.start_from=init", "rl.max_steps=1", *more)


def test_a_person_s_reward_gets_the_sandbox(ready, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def mine(completions, sandbox, **_):\n"
        "    assert sandbox.name == 'unsafe-no-sandbox'\n"
        "    return [float(sum(map(ord, text)) % 7) for text in completions]\n"
        "def other(completions, **given):\n"
        "    return [float('sandbox' in given)] * len(completions)\n"
    )
    rewards = [f"rl.rewards_file={path}", "rl.rewards={mine: 1, other: 1}"]
    made = make_step(ready(*rewards, "rl.sandbox.backend=unsafe-no-sandbox"), "rl")
    (step,) = json.loads((made.path / "history.json").read_text())
    assert step["rewards/mine/std"] > 0 and step["rewards/other/mean"] == 0
