"""score: make the initial adapter A₀, B₀ and score the importance of each of its elements for both systems.

With `rl.rescore`, a second variant of the stage scores the elements of SFT's adapter.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from stages.config import DataSection, LaunchSection, LoraSection, ModelSection, PromptSection, ScoreSection
from stages.lora import examples
from stages.lora.adapter import adapter, fsdp
from stages.lora.importance import pilot
from stages.lora.importance.masks import flatten_weights, write_importance
from stages.lora.importance.scorers import Moments, moments, scorers
from stages.lora.importance.strategies import check_importance
from stages.models.base import load_base
from stages.models.tokenizer import load_tokenizer
from stages.prompts.renderer import Renderer, Row
from stages.records import read_labels
from stages.runtime import distributed, resources
from stages.runtime.batch_size import BatchSize

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

    from stages.pipeline.context import StageContext
    from stages.progress import Progress

log = logging.getLogger(__name__)


def run(
    job: StageContext,
    model: ModelSection,
    data: DataSection,
    prompt: PromptSection,
    lora: LoraSection,
    score: ScoreSection,
    seed: int,
) -> dict[str, Any]:
    """Write `init/` (plain PEFT), `shapes.json` and, if there are labels, `importance.safetensors`.

    The variant `rl` scores the adapter of SFT instead, and writes no `init/`. Importance is one float32 per
    element of the trainable part of each LoRA weight, stored under `s1/` and `s2/`. Returns for each system
    the number of examples, their mean loss (in a pilot run: before the step on them) and the share of the
    formula's second-order term or, with a pilot run, its number of steps.
    """
    base = load_base(model, fsdp.load_device(score.launch))
    tuned = job.adapter("sft")
    peft_model = adapter.attach(base, lora, tuned) if tuned else adapter.initial(base, lora, seed)
    layers = adapter.lora_layers(peft_model)
    shapes = {name: adapter.scored_shape(name, layer.weight, lora) for name, layer in layers.items()}
    if distributed.is_main():
        if not tuned:
            adapter.save(peft_model, job.out / "init", model)
        (job.out / "shapes.json").write_text(json.dumps(shapes, indent=1))
    summary: dict[str, Any] = {"elements": sum(rows * columns for rows, columns in shapes.values())}
    if "classify" not in job.inputs:
        return summary
    fsdp.shard_base(peft_model, score.launch)
    labels = read_labels(job.labels)
    if left_out := len(labels) - len(examples.with_response(labels)):
        summary["without_response"] = left_out
    renderer = Renderer(load_tokenizer(model), score.prompt or prompt, labels)
    size = _batch_size(score)
    scores = {}
    for system, chosen in examples.scored(labels, score, seed).items():
        rows, long = renderer.rows(chosen, data)
        # The blocks that the other system left in torch's memory pool are too small for the longest rows.
        resources.release_memory()
        steps = min(pilot.STEPS, len(rows)) if scorers.has_trait(score.scorer, "pilot") else 1
        batches = [rows[step::steps] for step in range(steps)]
        job.progress.start(f"score System {system}", sum(len(_local_rows(batch)) for batch in batches))

        def sums_of(batch: list[Row]) -> Moments:
            return _moments(peft_model, batch, size, score.launch, renderer, job.progress)

        scores[system], statistics = _importance(peft_model, batches, sums_of, lora, score.scorer)
        check_importance(flatten_weights(scores[system]), system)
        summary[f"system{system}"] = {"examples": len(rows), "too_long": long, **statistics}
    if distributed.is_main():
        write_importance(job.out / "importance.safetensors", scores)
    return {**summary, **fsdp.local_share(peft_model), "prompt": renderer.digest()}


def _local_rows(rows: list[Row]) -> list[Row]:
    """The rows that this process computes: every n-th of n processes, beginning with its rank."""
    return rows[distributed.rank() :: distributed.world_size()]


def _batch_size(score: ScoreSection) -> BatchSize:
    """Examples of a forward pass; processes that share one base compute alike, and none goes its own way."""
    if fsdp.is_sharded(score.launch):
        return BatchSize("score.batch_size", score.batch_size, "lower score.batch_size", score.batch_size)
    return BatchSize(
        "score.batch_size", score.batch_size, "shorten the rows by data.max_length, or set model.load_in_4bit"
    )


def _moments(
    model: PeftModel,
    rows: list[Row],
    size: BatchSize,
    launch: LaunchSection,
    renderer: Renderer,
    progress: Progress,
) -> Moments:
    """Compute the sums over these rows, split over all processes; each process returns the totals.

    Batches hold rows of similar length, so that they need little padding. The longest rows come first: later
    batches then fit into the memory that the first ones took. With the shortest first, each batch would need
    larger blocks than are free, a fifth more memory in all on a CPU.
    """
    local = sorted(_local_rows(rows), key=lambda row: -len(row.input_ids))
    model.requires_grad_(False)
    model.eval()
    layers, pad = adapter.lora_layers(model), renderer.tokenizer.pad_token_id
    sums = moments(model, layers, local, size, progress.advance, pad)
    if fsdp.is_sharded(launch):
        # Each pass through a sharded base needs all processes. The first has the most rows; processes with
        # fewer batches make up for it with passes over some row, whose results are discarded.
        own, most = (math.ceil(n / size.now) for n in (len(local), len(rows[:: distributed.world_size()])))
        moments(model, layers, rows[:1] * (most - own), replace(size, now=1), lambda _: None, pad)
    _all_reduce(sums)
    return sums


def _all_reduce(sums: Moments) -> None:
    """Replace the sums in every process by their totals over all processes."""
    device = next(iter(sums.gradient.values())).device
    counts = torch.tensor([sums.examples, sums.loss], dtype=torch.float64, device=device)
    distributed.all_reduce([counts, *sums.gradient.values(), *sums.square.values()])
    sums.examples, sums.loss = int(counts[0]), float(counts[1])


def _importance(
    model: PeftModel,
    batches: list[list[Row]],
    sums_of: Callable[[list[Row]], Moments],
    lora: LoraSection,
    scorer: str,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Score the trainable part of each weight by the scorer's formula, and return statistics for the summary.

    batches: those of a pilot run, one per step; for other scorers one batch of all rows.
    """
    formula, layers = scorers.pick(scorer), adapter.lora_layers(model)
    # The formula's arguments after the value: the value after a pilot run, or mean gradient and Fisher.
    if scorers.has_trait(scorer, "pilot"):
        trained, loss = pilot.run(layers, lora, batches, sums_of)
        statistics = {"mean_loss": loss / sum(map(len, batches)), "pilot_steps": len(batches)}

        def arguments(name: str) -> tuple[Tensor, ...]:
            return (trained[name],)

    else:
        [rows] = batches
        sums = sums_of(rows)
        statistics = {
            "mean_loss": sums.loss / sums.examples,
            "second_order": _second_order(model, sums, lora),
        }

        def arguments(name: str) -> tuple[Tensor, ...]:
            return sums.gradient[name] / sums.examples, sums.square[name] / sums.examples

    scores = {}
    for name, layer in layers.items():
        tensors = (layer.weight, *arguments(name))  # each of the weight's full shape
        scores[name] = formula(*(adapter.trainable_part(name, t, lora).detach().float() for t in tensors))
    return scores, statistics


def _second_order(model: PeftModel, sums: Moments, lora: LoraSection) -> float:
    """Share of the second-order term over all elements: Σ ½Fφ² / (Σ |gφ| + Σ ½Fφ²)."""
    first = second = 0.0
    for name, layer in adapter.lora_layers(model).items():
        value, gradient, square = (
            adapter.trainable_part(name, t, lora).float()
            for t in (layer.weight.detach(), sums.gradient[name], sums.square[name])
        )
        first += float((gradient / sums.examples * value).abs().sum())
        second += float((0.5 * square / sums.examples * value.square()).sum())
    return second / (first + second) if first + second else 0.0
