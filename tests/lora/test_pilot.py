"""Importance by a pilot run: AdamW on all elements, against the same by autograd."""

import pytest
import torch
from conftest import labels_of, make_steps
from results import artifacts
from test_scorers import adapted, rows

from stages.config import LoraSection
from stages.lora.adapter import adapter
from stages.lora.importance.masks import read_importance
from stages.lora.importance.scorers import moments, scorers
from stages.models.tokenizer import load_tokenizer
from stages.packing.losses import answer_losses, collate
from stages.prompts.renderer import Renderer
from stages.runtime.batch_size import BatchSize
from stages.score import pilot

LR = pilot.LR
BATCHES = [rows()[:3], rows()[3:5], rows()[5:]]


def by_autograd(model, lora) -> dict[str, torch.Tensor]:
    """The weights after one AdamW step for each batch, on the mean of the rows' losses."""
    layers = adapter.lora_layers(model)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([layer.weight for layer in layers.values()], lr=LR, weight_decay=0)
    for batch in BATCHES:
        optimizer.zero_grad()
        answer_losses(model, collate(batch, 0, torch.device("cpu"))).mean().backward()
        for name, layer in layers.items():
            whole = torch.zeros_like(layer.weight)
            adapter.trainable_part(name, whole, lora).fill_(1)
            layer.weight.grad *= whole
        optimizer.step()
    return {name: layer.weight.detach() for name, layer in layers.items()}


@pytest.mark.parametrize("compensate", [False, True])
def test_a_pilot_run_is_plain_training_and_leaves_the_layers_as_they_were(tiny, compensate):
    lora = LoraSection(r=3, compensate=compensate)
    wanted = by_autograd(adapted(tiny, lora, torch.float64), lora)
    model = adapted(tiny, lora, torch.float64)
    model.requires_grad_(False)
    layers = adapter.lora_layers(model)
    before = {name: layer.weight.clone() for name, layer in layers.items()}

    def gradients(batch):
        return moments(model, layers, batch, BatchSize("score.batch_size", 4, ""), lambda _: None, 0)

    after, loss = pilot.run(layers, lora, BATCHES, gradients)
    assert loss == pytest.approx(7 * 5.5, rel=0.1)  # a random model, 256 tokens
    moved = 0.0
    for name, layer in layers.items():
        # Losses are float32, and AdamW moves an element by a whole rate where its gradient is all rounding.
        torch.testing.assert_close(after[name], wanted[name], rtol=0, atol=1e-2 * LR)
        assert torch.equal(layer.weight, before[name]) and layer.weight.grad is None
        distance = scorers.pick("moved")(before[name], after[name])
        moved += float(adapter.trainable_part(name, distance, lora).sum())
        adapter.trainable_part(name, distance, lora).zero_()
        assert not distance.any(), name  # what is not trained has not moved
    assert moved > 0


def test_scorer_moved_makes_masks_that_sft_trains(begun):
    config = begun(
        "score.scorer=moved", "score.examples=6", "lora.init=default", "partition.strategy=topk",
        "partition.density=0.25", "sft.max_steps=1", "sft.learning_rate=0.1",
    )  # fmt: skip
    made = artifacts(config, "classify:train", "score", "partition", "sft")
    summary = made["score"].manifest["summary"]["system1"]
    assert summary["examples"] == 6 and "second_order" not in summary and summary["mean_loss"] > 0
    scores = read_importance(made["score"].path / "importance.safetensors")
    largest = max(float(one.max()) for one in scores[1].values())
    assert summary["pilot_steps"] == 6
    assert 0 < largest <= 6.1 * pilot.LR  # six steps of AdamW, of one rate each at most
    assert any(not torch.equal(scores[1][name], scores[2][name]) for name in scores[1])
    trained = made["sft"].manifest["summary"]
    assert trained["frozen_drift"] == 0 and 0.25 <= trained["active_share"] <= 0.2501


def test_rows_that_are_dropped_leave_no_empty_step(begun):
    """The examples are fewer than the steps of the pilot run would be, and of these some are too long."""
    renderer = Renderer(load_tokenizer(begun().model), begun().prompt)
    slow = [renderer.row(row.example) for row in labels_of(begun()) if row.system == 2]
    lengths = sorted(len(row.input_ids) for row in slow)
    few = ["score.scorer=moved", "score.examples=12", "data.too_long=drop"]
    config = begun(*few, f"data.max_length={lengths[len(lengths) // 2]}")
    summary = make_steps(config, "classify:train", "score")["score"][0].manifest["summary"]
    told = summary["system2"]
    assert told["pilot_steps"] == told["examples"] < 12 and told["too_long"]
