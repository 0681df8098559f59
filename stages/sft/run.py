"""Train the active System 1 elements by TRL's SFTTrainer, from the initial adapter or that of RL.

Which are active, `partition` has decided by a strategy of `lora/importance/strategies.py`.
"""

from __future__ import annotations

import math
from typing import Any

from trl import SFTConfig, SFTTrainer

from stages.config import DataSection, SftSection
from stages.lora import examples
from stages.lora.training import loop
from stages.lora.training.health import ProgressCallback, longest_of_sft
from stages.lora.training.start import Training
from stages.lora.training.trainer import ResumableTrainer
from stages.models.base import load_base
from stages.packing import trainer_inputs
from stages.packing.support import has_active_dropout
from stages.pipeline.context import StageContext
from stages.prompts.renderer import Row
from stages.store.checkpoints import Checkpoints

PINNED: dict[str, Any] = {
    "adam_beta2": 0.999,
    "remove_unused_columns": True,
    "shuffle_dataset": False,
    "completion_only_loss": None,  # the labels already leave out the prompt
    "assistant_only_loss": False,
    "max_length": None,  # rows are cut, dropped or refused by the renderer
    "packing": False,
    "padding_free": False,
    "dataset_kwargs": None,
    "eos_token": None,
}
"""The other arguments of SFTTrainer on which a result may depend; see `loop.PINNED`."""


def run(context: StageContext, sft: SftSection, data: DataSection, **sections: Any) -> dict[str, Any]:
    """Write `adapter/` (plain PEFT for the unchanged base) and `history.json`; returns what was trained."""
    run = Training(context=context, section=sft, **sections)
    rows: list[Row] = []
    too_long = 0
    for mode, chosen in examples.trained_by_sft(run.labels, sft, run.modes, run.seed).items():
        of_mode, longer = run.renderers[mode].rows(chosen, data)
        rows, too_long = rows + of_mode, too_long + longer
    if endless := run.renderer.rows_without_stop(rows):
        count = f"{len(endless)} of {len(rows)} rows do not end in a stop token, such as {endless[0]}"
        context.progress.say(f"warning: {count}: the model may not learn to stop")
    trainer = _trainer(run, sft, rows)
    figures = {"loss": "loss", "learning_rate": "rate"}
    trainer.add_callback(ProgressCallback(context.progress, f"sft on {len(rows)} rows", figures))
    summary = loop.train(trainer, run)
    return {"rows": len(rows), "too_long": too_long, "prompt": run.renderer.digest(), **summary}


def _trainer(run: Training, sft: SftSection, rows: list[Row]) -> SftTrainer:
    """The trainer on these rows, whose base model takes packed ones."""
    from datasets import Dataset

    steps = loop.steps_of(math.ceil(len(rows) / sft.batch_size), sft, stage="sft")
    base = load_base(run.model)
    model = run.attach(base)
    trainer = SftTrainer(
        model=model,
        args=_arguments(sft, steps, run.seed, run.context.checkpoints),
        train_dataset=Dataset.from_list([{"input_ids": r.input_ids, "labels": r.labels} for r in rows]),
        processing_class=run.renderer.tokenizer,
        row_ids=lambda: {tuple(row.input_ids): row.id for row in rows},
        memory_hint=f"sft.per_device_train_batch_size from {sft.per_device_train_batch_size}, "
        "or set sft.gradient_checkpointing",
        share_prefix=not has_active_dropout(model),
    )
    trainer_inputs.accept_packed(base)
    trainer.add_callback(longest_of_sft(trainer, rows))
    return trainer


def _arguments(sft: SftSection, steps: int, seed: int, checkpoints: Checkpoints) -> SFTConfig:
    return SFTConfig(
        **loop.arguments(sft, steps, seed, checkpoints),
        **PINNED,
        loss_type="nll",
        per_device_train_batch_size=sft.per_device_train_batch_size,
        gradient_accumulation_steps=loop.accumulation_steps(sft.batch_size, sft.per_device_train_batch_size),
    )


class SftTrainer(ResumableTrainer, SFTTrainer):
    """SFTTrainer with packed rows and exact resume; its overrides stand in the order of a step."""

    def __init__(self, *, share_prefix: bool, **arguments: Any) -> None:
        """Train a model that then must `accept_packed` rows.

        share_prefix: compute the beginning that rows of a micro batch have in common once.
        """
        super().__init__(**arguments)
        self.share_prefix = share_prefix

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        # A packed row has no router's loss: a mixture of experts is padded.
        given = inputs["input_ids"], inputs["attention_mask"]
        if not self.aux_loss_enabled and self._supports_packing(model, *given):
            inputs = trainer_inputs.sft_inputs(inputs, self.share_prefix)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def restore_counters(self) -> None:
        """No checkpoint holds the count of tokens, but the log does."""
        self._total_train_tokens = self.state.log_history[-1]["num_tokens"]
