"""RL's elements chosen by RL's own gradients."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_steps
from results import artifacts

from stages.errors import UnusableResult
from stages.lora.adapter import adapter
from stages.lora.grpo import building
from stages.lora.importance.masks import Masks, flatten_weights, read_importance
from stages.lora.importance.scorers import scorers
from stages.pipeline.resolve import resolved
from stages.pipeline.steps import plan_steps
from stages.plan.preflight import problems
from stages.score import gradients

SCORED = ("rl.rescore=grpo_sign", "score.examples=4", "sft.learning_rate=0.1")


def test_an_element_scores_by_how_far_its_gradient_keeps_its_sign():
    steady, noisy = torch.tensor([2.0, 2.0]), torch.tensor([5.0, -1.0])  # two batches each, both of mean 2
    gradients_ = torch.stack([steady, noisy, torch.zeros(2)])  # (elements, batches)
    score = scorers.pick("grpo_sign")(torch.ones(3), gradients_.mean(1), gradients_.square().mean(1))
    # g² / √F: 4 / 2 for the steady one, 4 / √13 for the other.
    torch.testing.assert_close(score, torch.tensor([2.0, 4 / 13**0.5, 0.0]))


def test_system_2_is_scored_by_gradients_that_move_nothing(own, tmp_path, monkeypatch):
    weights, batches = {}, []

    class Watched(gradients._GradientSums):
        def on_pre_optimizer_step(self, *args, **kwargs):
            batches.append({name: layer.weight.grad.clone() for name, layer in self.layers.items()})
            super().on_pre_optimizer_step(*args, **kwargs)

        def on_train_end(self, *_, **__):
            weights.update({name: layer.weight.clone() for name, layer in self.layers.items()})

    monkeypatch.setattr(gradients, "_GradientSums", Watched)
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def even(completions, **_):\n    return [float(len(c) % 2) for c in completions]\n")
    earned = (f"rl.rewards_file={rewards}", "rl.rewards={even: 1}")
    config = own(*SCORED, *earned, "partition.rl_density=0.1")
    made = artifacts(config, "score", "partition:sft", "sft", "partition:rl")
    before = adapter.read(made["sft"].adapter)
    assert weights and all(torch.equal(before[name], value) for name, value in weights.items())
    first, again = (
        read_importance(made[name].path / "importance.safetensors") for name in ("score", "score:rl")
    )
    assert torch.equal(flatten_weights(first[1]), flatten_weights(again[1]))
    scores = flatten_weights(again[2])
    per_batch = torch.stack([flatten_weights(batch) for batch in batches])  # (batches, elements)
    assert len(per_batch) == gradients.BATCHES
    mean, fisher = per_batch.mean(0), per_batch.square().mean(0)
    torch.testing.assert_close(scores, mean.square() / fisher.sqrt().clamp(min=1e-30), rtol=1e-4, atol=0)
    active = Masks.load(made["partition:rl"].path / "masks.safetensors", "rl").active
    chosen = flatten_weights(active)
    assert int(chosen.sum()) == len(chosen) // 10
    assert scores[chosen].min() >= scores[~chosen].max()


@pytest.mark.slow
def test_equal_rewards_are_no_score(begun):
    with pytest.raises(UnusableResult, match="in 8 batches no group of completions had unequal rewards"):
        make_steps(begun(*SCORED), "score", "partition:sft", "sft")


def test_steps_that_rl_keeps_do_not_stop_its_scores(begun):
    config = resolved(begun(*SCORED, "rl.max_steps=60", "rl.keep_steps=[20, 40]", "rl.num_iterations=2"))
    still = gradients.without_updates(config.rl, config.score.launch)
    assert building.optimizer_steps(SimpleNamespace(system2_rows=1000), still) == gradients.BATCHES
    assert still.num_iterations == 1  # a second pass would sum each gradient twice


def test_rates_of_rl_do_not_make_its_scores_stale(begun):
    def key(*settings: str) -> str:
        return plan_steps(resolved(begun(*SCORED, *settings)))["score:rl"].key

    assert key() == key("rl.learning_rate=0.5", "rl.max_steps=7", "rl.num_iterations=2")
    assert len({key(), key("rl.temperature=0.5"), key("rl.rescore=taylor2")}) == 3


def test_what_stops_it_is_found_before_the_first_vote(begun, monkeypatch):
    config = resolved(begun(*SCORED, "rl.launch.backend=ddp", "sft.launch.backend=ddp"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    steps = [step for name, step in plan_steps(config).items() if name == "score:rl"]
    assert [str(one) for one in problems(config, steps) if "2 GPUs are visible to one process" in str(one)]
    hint = steps[0].stage.memory_hint(config, "rl")
    assert hint.startswith("rl.per_device_train_batch_size")
