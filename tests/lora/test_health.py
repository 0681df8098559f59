"""A run that cannot go well stops before it does harm, and says where."""

import pytest
import torch
from conftest import labels_of, make_step
from results import untimed
from trl import GRPOTrainer, SFTTrainer

from stages.errors import OutOfMemoryError, UnusableResult
from stages.lora.adapter.adapter import ADAPTER

SFT = ["sft.max_steps=3", "sft.num_train_epochs=3", "sft.save_steps=1", "sft.system2_share=0"]


def endless_gradient(model, loss):
    """The loss itself stays finite."""
    values = next(p for p in model.parameters() if p.requires_grad)
    return loss + torch.where(values > -9e9, 0.0, values.sqrt()).sum()


@pytest.mark.parametrize(
    ("trainer", "spoil", "said"),
    [
        (SFTTrainer, lambda model, loss: loss * float("nan"), "loss is nan"),
        (GRPOTrainer, endless_gradient, "gradient norm is nan"),
    ],
    ids=["loss of sft", "gradient of rl"],
)
def test_a_non_finite_number_stops_before_the_step_and_names_rows(own, monkeypatch, trainer, spoil, said):
    stage, system = ("sft", 1) if trainer is SFTTrainer else ("rl", 2)
    config, usual = own(*SFT, "rl.start_from=init", "rl.max_steps=3", "rl.save_steps=1"), trainer.compute_loss

    def compute_loss(self, model, *inputs, **options):
        loss = usual(self, model, *inputs, **options)
        return spoil(model, loss) if self.state.global_step + 1 == 2 else loss

    monkeypatch.setattr(trainer, "compute_loss", compute_loss)
    with pytest.raises(UnusableResult, match=rf"{said} in step 2, rows \w+") as caught:
        make_step(config, stage)
    named = str(caught.value).partition("rows ")[2].split(", ")
    assert set(named) <= {row.example.id for row in labels_of(config) if row.system == system}
    saved = {path.name for path in config.root.glob(f"{stage}/checkpoints/*/checkpoint-*")}
    assert saved == {"checkpoint-1"}


@pytest.mark.parametrize(
    ("stage", "number", "said"),
    [
        ("sft", 1, r"in the longest micro batch, 4 rows of up to \d+ tokens"),
        ("rl", 1, r"in the longest micro batch, 8 completions of 12 tokens, prompts of up to \d+"),
        ("sft", 2, r"in step 1, input_ids of 4 × \d+ tokens"),
    ],
)
def test_out_of_memory_names_step_lengths_and_setting(own, monkeypatch, stage, number, said):
    """The longest micro batch is tried before anything."""
    calls = []

    def supports_packing(*_):
        calls.append(None)
        if len(calls) == number:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr("stages.packing.support.supports_packing", supports_packing)
    with pytest.raises(OutOfMemoryError, match=f"out of memory {said}") as caught:
        make_step(own("rl.start_from=init"), stage)
    assert caught.value.exit_code == 74
    assert f"lower {stage}.per_device_train_batch_size from " in caught.value.hint


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_the_rehearsal_changes_nothing(own, monkeypatch, stage):
    """With dropout, which draws random numbers."""
    config = own(f"{stage}.lora_dropout=0.1", "rl.start_from=init", "sft.learning_rate=0.02")

    def trained() -> tuple[bytes, list[dict[str, float]]]:
        artifact = make_step(config, stage, force=True)
        return (artifact.adapter / ADAPTER).read_bytes(), untimed(artifact.path)

    rehearsed = trained()
    monkeypatch.setattr("stages.lora.training.health.LongestBatch.on_train_begin", lambda *_, **__: None)
    assert trained() == rehearsed
