"""Train the active System 1 elements by TRL's SFTTrainer, from the initial adapter or that of RL.

With `sft.rounds: 2`, a second variant of the stage trains the System 2 elements on System 2 rows, from there.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from stages.config import BaselineSection, DataSection, LoraSection, ModelSection, PromptSection, SftSection
from stages.lora import examples
from stages.lora.adapter import fsdp
from stages.lora.training import longest_batch, loop, protected_kl
from stages.lora.training.health import ProgressCallback, RunInfo, row_ids
from stages.models.tokenizer import load_tokenizer
from stages.packing.support import has_active_dropout
from stages.packing.trainer_inputs import accept_packed
from stages.prompts.renderer import Renderer, Row
from stages.records import read_labels
from stages.runtime import distributed

if TYPE_CHECKING:
    from trl import SFTConfig

    from stages.pipeline.context import StageContext
    from stages.progress import Progress
    from stages.store.checkpoints import Checkpoints

PINNED: dict[str, Any] = {
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


def run(
    context: StageContext,
    model: ModelSection,
    data: DataSection,
    prompt: PromptSection,
    lora: LoraSection,
    baseline: BaselineSection | None,
    sft: SftSection,
    seed: int,
) -> dict[str, Any]:
    """Write `adapter/` (plain PEFT for the unchanged base) and `history.json`; returns what was trained."""
    from datasets import Dataset

    from stages.sft.sft_trainer import SftTrainer

    labels = read_labels(context.labels)
    renderer = Renderer(load_tokenizer(model), sft.prompt or prompt, labels)
    rows, too_long = renderer.rows(examples.trained_by_sft(labels, sft, seed, context.variant), data)
    _warn(rows, renderer, sft, context.progress)
    masks = "rl" if context.variant else "sft"
    start = loop.StartingAdapter.from_artifacts(masks, context.adapter("sft", "rl", "score"), context.masks)
    steps = loop.steps_of(math.ceil(len(rows) / sft.batch_size), sft)
    base = fsdp.load(model, sft.launch)
    peft_model = start.attach(base, lora, baseline, sft.lora_dropout, seed)
    fsdp.shard_base(peft_model, model, sft.launch)
    names = row_ids(lambda: {tuple(row.input_ids): row.id for row in rows}, "input_ids", "attention_mask")
    knobs = (
        f"sft.per_device_train_batch_size from {sft.per_device_train_batch_size}, "
        "or set sft.gradient_checkpointing"
    )
    trainer = SftTrainer(
        model=peft_model,
        args=_arguments(sft, steps, seed, context.checkpoints),
        train_dataset=Dataset.from_list([{"input_ids": r.input_ids, "labels": r.labels} for r in rows]),
        processing_class=renderer.tokenizer,
        run_info=RunInfo(names, knobs),
        loraplus_lr_ratio=sft.loraplus_lr_ratio,
        packed=sft.padding_free == "auto",
        share_prefix=not has_active_dropout(peft_model),
    )
    accept_packed(base)
    trainer.add_callback(longest_batch.longest_of_sft(trainer, rows, sft.per_device_train_batch_size))
    title = f"sft on {len(rows)} {'System 2 ' if context.variant else ''}rows"
    trainer.add_callback(ProgressCallback(context.progress, title, steps, ("loss", "learning_rate")))
    protected_kl.watch(trainer, start, context.protected, renderer)
    summary = loop.train(trainer, peft_model, start, context.out, model, context.checkpoints)
    left_out = len(labels) - len(examples.with_response(examples.with_targets(labels, sft)))
    without = {"without_response": left_out} if left_out else {}
    return {"rows": len(rows), "too_long": too_long, **without, "prompt": renderer.digest(), **summary}


def _warn(rows: list[Row], renderer: Renderer, sft: SftSection, progress: Progress) -> None:
    """Warn of rows without a stop token at the end; say how many rows count twice in an epoch."""
    if endless := renderer.rows_without_stop(rows):
        count = f"{len(endless)} of {len(rows)} rows do not end in a stop token, such as {endless[0]}"
        progress.say(f"warning: {count}: the model may not learn to stop")
    processes = distributed.world_size()
    if repeated := -len(rows) % (sft.per_device_train_batch_size * processes) if processes > 1 else 0:
        progress.say(f"{processes} processes share {len(rows)} rows: {repeated} count twice in each epoch")


def _arguments(sft: SftSection, steps: int, seed: int, checkpoints: Checkpoints) -> SFTConfig:
    from trl import SFTConfig

    return SFTConfig(
        **loop.arguments(sft, steps, seed, checkpoints),
        **PINNED,
        loss_type=sft.loss_type,
        per_device_train_batch_size=sft.per_device_train_batch_size,
        gradient_accumulation_steps=loop.accumulation_steps(sft.batch_size, sft.per_device_train_batch_size),
    )
