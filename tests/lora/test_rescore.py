"""RL's elements chosen again: by importances at the adapter of SFT, or by RL's own gradients."""

from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, flags, make_steps
from results import artifacts

from stages.errors import UnusableResult
from stages.lora.adapter import adapter
from stages.lora.grpo import building
from stages.lora.importance.masks import Masks, flatten_weights, read_importance
from stages.lora.importance.scorers import scorers
from stages.pipeline.resolve import resolved
from stages.pipeline.run import pending_stages
from stages.pipeline.steps import plan_steps
from stages.plan.preflight import problems
from stages.report import elements
from stages.report.page import Pictures, Text
from stages.score import gradients
from stages.store.artifacts import Store

RL = ["rl.max_steps=1", "sft.learning_rate=0.1", "score.examples=4"]
AGAIN = "rl.rescore=taylor2"
SCORED = ("rl.rescore=grpo_sign", "score.examples=4", "sft.learning_rate=0.1")


def test_the_adapter_of_sft_is_scored_after_it_and_for_rl_alone(begun):
    before, now = (plan_steps(resolved(begun(*RL, *more))) for more in ((), (AGAIN,)))
    differ = [name for name in now if name not in before or now[name].key != before[name].key]
    assert [name for name in differ if not name.startswith("eval")] == ["score:rl", "partition:rl", "rl"]
    assert list(now["score:rl"].inputs) == ["classify:train", "sft"]
    assert list(now["partition:rl"].inputs) == ["score:rl"] and list(now["partition:sft"].inputs) == ["score"]
    config = resolved(begun(*RL, AGAIN, "eval.targets=[rl]"))
    pending = pending_stages(config, plan_steps(config), Store(config.root), None, "rl")
    assert [(task.stage.name, *task.variants) for task in pending] == [
        ("classify", "train"), ("score", "score"), ("partition", "sft"), ("sft",),
        ("score", "rl"), ("partition", "rl"), ("rl",),
    ]  # fmt: skip


def test_importance_is_taken_where_sft_ended(begun):
    """Magnitude is |φ|: of the file that SFT wrote."""
    made = artifacts(begun(*RL, "rl.rescore=magnitude"), "score", "partition:sft", "sft")
    assert not (made["score:rl"].path / "init").exists()
    weights = adapter.read(made["sft"].adapter)
    found = read_importance(made["score:rl"].path / "importance.safetensors")
    assert all(torch.equal(value, weights[name].abs()) for name, value in found[2].items())


def test_each_step_of_score_can_be_made_alone(own, lorapar):
    command = ("score", ROOT / "configs/smoke.yaml", *flags(*own.home, *RL, AGAIN), "--only")
    for only, code, said in (
        ("score", 0, ""), ("rl", 66, "lorapar run"), ("sft", 78, "choose from: score, rl"),
    ):  # fmt: skip
        done = lorapar(*command, only)
        assert done.code == code and said in done.err


@pytest.mark.slow
def test_a_page_has_the_elements_of_both(begun):
    config = begun(*RL, AGAIN)
    parts = list(elements.parts(config, artifacts(config, "score", "partition", "sft")))
    at = parts.index(Text("For RL the elements were scored again, by taylor2 at the adapter of SFT."))
    assert parts[0].rows != parts[at + 1].rows
    drawn = [picture.svg for part in parts if isinstance(part, Pictures) for picture in part.figures]
    assert len(set(drawn)) == len(drawn)


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
