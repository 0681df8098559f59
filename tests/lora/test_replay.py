"""Steps of RL that mix both systems, and rewards without a signal."""

import json
from collections import Counter

import pytest
import torch
from conftest import labels_of, make_step, trainer_of
from results import artifacts, history
from trl.trainer.utils import RepeatSampler

from stages.errors import DataError, UnusableResult
from stages.lora.grpo import prompts
from stages.lora.grpo.prompts import ReplaySampler
from stages.lora.grpo.zero_signal import equal_groups, metrics_by_system, total_rewards
from stages.prompts.answers import works_out

REWARDS = """
def sometimes(completions, **_):
    CALLS.append(None)
    return [None if len(CALLS) == 2 else float(sum(map(ord, t)) % 97) for t in completions]

def never(completions, **_):
    return [None] * len(completions)

CALLS = []
"""


@pytest.fixture
def with_reward(own, tmp_path):
    """The config of an RL run from the initial adapter with one of these rewards."""
    file = tmp_path / "mine.py"
    file.write_text(REWARDS)
    start = ["rl.start_from=init", f"rl.rewards_file={file}", "rl.max_steps=3", "rl.num_train_epochs=9"]
    return lambda reward, *more: own(*start, f"rl.rewards={{{reward}: 2}}", *more)


@pytest.mark.parametrize(("first", "last", "per_step", "size"), [(10, 5, 1, 4), (30, 3, 2, 6), (4, 7, 2, 3)])
def test_the_order_of_mixed_rows(first, last, per_step, size):
    """Each first row once at most, the last rows all before one comes again, each step with its share."""
    usual = RepeatSampler(range(first + last), 2, size, 3, True, 7)
    mixed = ReplaySampler(usual, last, per_step)
    order = list(mixed)
    steps = [order[i : i + 2 * size * 3] for i in range(0, len(order), 2 * size * 3)]
    assert len(order) == len(mixed) and len(steps) == first // (size - per_step)
    drawn: Counter[int] = Counter(dict.fromkeys(range(first + last), 0))
    for step in steps:
        once = step[: 2 * size]
        assert step == once * 3 and once[::2] == once[1::2]
        assert sum(row >= first for row in once[::2]) == per_step and len(set(once)) == size
        drawn.update(once[::2])
        often = [number for row, number in drawn.items() if row >= first]
        assert max(often) - min(often) <= 1
    assert max(drawn[row] for row in range(first)) == 1
    assert list(mixed) != order  # as with TRL's, the next epoch has another order


def test_too_few_rows_to_replay_are_an_error(with_reward):
    rows, rl = [{}] * 4, with_reward("never", "rl.system1_share=0.25").rl
    with pytest.raises(DataError, match="0 System 1 rows can be replayed, fewer than the 1 of a step"):
        prompts._check_enough(rows, [], rl, 0)
    with pytest.raises(DataError, match=r"2 RL prompts \(7 too long\) are fewer than the 3 of a step"):
        prompts._check_enough(rows[:2], rows, rl, 7)


def test_steps_without_a_signal_are_counted_warned_of_and_stop_a_run(with_reward, caplog):
    made = make_step(with_reward("sometimes"), "rl")
    steps = history(made)
    assert ["reward" in step for step in steps] == [True, False, True]
    assert [step["frac_reward_zero_std"] for step in steps] == [0, 1, 0]
    assert made.manifest["summary"]["completions"] == 3 * 16
    assert "all rewards of each group were equal in step 2: it taught nothing" in caplog.text
    with pytest.raises(UnusableResult, match="were equal in 2 steps in a row, up to step 2"):
        make_step(with_reward("never", "rl.max_zero_signal_steps=2"), "rl")


def test_equal_groups_and_metrics_by_hand():
    """NaN stands for a completion that no reward judged."""
    nan = torch.nan
    rewards = torch.tensor([1.0, 1, 1, 0, 0, 0, 2, 1, 1, 1, 1, 1.00001, 1, nan, 1, nan, nan, 2, nan, 1, 2])
    assert equal_groups(rewards, 3).tolist() == [True, True, False, False, True, True, False]
    assert equal_groups(torch.tensor([nan, nan]), 2).tolist() == [True]
    total = total_rewards(torch.tensor([[1, 2], [nan, 2], [nan, nan]]), torch.tensor([1.0, 0.5]))
    assert total[:2].tolist() == [2, 1] and total[2].isnan()
    is_system1, lengths = torch.tensor([True, True, False, False, False, False]), torch.arange(6.0)
    rewards, equal = torch.tensor([1.0, 1, 2, nan, 4, 6]), torch.tensor([True, True, False])
    assert dict(metrics_by_system(rewards, is_system1, lengths, equal, 2)) == {
        "system1/reward": 1, "system1/completions/mean_length": 0.5, "system1/frac_reward_zero_std": 1,
        "system2/reward": 4, "system2/completions/mean_length": 3.5, "system2/frac_reward_zero_std": 0.5,
    }  # fmt: skip


@pytest.mark.slow
def test_modes_reach_sft_and_rl(begun, monkeypatch):
    """SFT: System 1 at once under fast and auto, worked rows under slow; RL: System 2 under auto and slow."""
    messages = {"fast": "Be quick.", "slow": "Think it over.", "auto": "As you like."}
    given = json.dumps({mode: {"system": text} for mode, text in messages.items()})
    config = begun(
        f"modes={given}", "sft.system2_share=0", "rl.system1_share=0.5", "rl.max_prompt_length=600"
    )
    made = artifacts(config, "score", "partition", "sft", "rl")
    kinds = Counter()
    sft, *_ = trainer_of(config, monkeypatch, "sft")
    texts = [sft.processing_class.decode(row) for row in sft.train_dataset["input_ids"]]
    rl = trainer_of(config, monkeypatch)[0]
    for stage, asked in (("sft", texts), ("rl", list(rl.train_dataset["prompt"]))):
        for text in asked:
            (mode,) = (mode for mode, message in messages.items() if message in text)
            system = next(row.system for row in labels_of(config) if row.example.prompt in text)
            kinds[stage, mode, system] += 1
            if stage == "sft":
                bare = not works_out(text.rpartition("assistant\n")[2], "hash")
                assert bare == (mode != "slow" and system == 1), text
    one, two = (sum(row.system == system for row in labels_of(config)) for system in (1, 2))
    assert kinds == {
        ("sft", "fast", 1): one, ("sft", "auto", 1): one, ("sft", "auto", 2): two,
        ("sft", "slow", 1): one, ("sft", "slow", 2): two,
        **{("rl", mode, 1): one for mode in messages}, ("rl", "auto", 2): two, ("rl", "slow", 2): two,
    }  # fmt: skip
    assert made["rl"].manifest["summary"]["steps"] > 0 and len(rl.prompts.fast) == one
