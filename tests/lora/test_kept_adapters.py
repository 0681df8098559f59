"""Adapters that RL keeps on its way."""

import json

import pytest
import torch
from conftest import make_steps
from results import artifacts

from stages.errors import ConfigError
from stages.lora.adapter import adapter
from stages.pipeline.resolve import resolved
from stages.pipeline.steps import plan_steps

THREE = ("rl.max_steps=3", "rl.num_train_epochs=9")


def test_the_adapter_of_a_step_is_that_of_a_run_up_to_it(own, tmp_path):
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def even(completions, **_):\n    return [float(len(c) % 2) for c in completions]\n")
    given = (*THREE, f"rl.rewards_file={rewards}", "rl.rewards={even: 1}", "rl.learning_rate=0.01")
    config = own(*given, "rl.keep_steps=[1, 3]", "eval.targets=[rl-1, rl]", "eval.benchmarks.demo.limit=2")
    made = artifacts(config)
    first, last = (adapter.read(made["rl"].kept_adapter(step)) for step in ("1", "3"))
    end = adapter.read(made["rl"].adapter)
    assert all(torch.equal(value, last[name]) for name, value in end.items())
    assert any(not torch.equal(value, first[name]) for name, value in end.items())
    assert json.loads((made["eval:rl-1@demo"].path / "metrics.json").read_text())["target"] == "rl-1"


def test_only_runs_that_keep_a_step_have_another_key(begun):
    plain, same, kept = (
        plan_steps(resolved(begun(*THREE, *more)))["rl"].key
        for more in ((), ("rl.keep_steps=[]",), ("rl.keep_steps=[2]",))
    )
    assert plain == same != kept


def test_a_step_after_the_last_one_cannot_be_kept(begun):
    with pytest.raises(ConfigError, match="9 is more than the . steps of RL"):
        make_steps(begun("rl.max_steps=null", "rl.keep_steps=[9]"), "score", "partition", "sft", "rl")
