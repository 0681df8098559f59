"""Make the initial adapter A₀, B₀ and score the importance of each of its elements for both systems.

Variants of the stage score its elements for the rows of `partition.protect` and, with `rl.rescore`, the
elements of SFT's adapter.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stages.config import (
    DataSection,
    LaunchSection,
    LoraSection,
    ModelSection,
    PromptSection,
    RlSection,
    ScoreSection,
)
from stages.lora import examples
from stages.lora.adapter import adapter, fsdp
from stages.lora.importance.masks import flatten_weights, read_importance, write_importance
from stages.lora.importance.scorers import Moments, moments, scorers
from stages.lora.importance.strategies import check_importance
from stages.models.tokenizer import load_tokenizer
from stages.prompts.renderer import Renderer, Row
from stages.records import Example, Labelled, read_labels, write_labels
from stages.rewards import loading
from stages.runtime import distributed, resources
from stages.runtime.batch_size import BatchSize
from stages.score import pilot

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

    from stages.pipeline.context import StageContext
    from stages.progress import Progress


def run(
    context: StageContext,
    model: ModelSection,
    data: DataSection,
    prompt: PromptSection,
    lora: LoraSection,
    score: ScoreSection,
    seed: int,
    protect: str | None,
    rl: RlSection,
) -> dict[str, Any]:
    """Write `init/` (plain PEFT), `shapes.json` and, if there are labels, `importance.safetensors`.

    The variant `rl` scores the adapter of SFT instead, and writes no `init/`; `protected` scores the initial
    one for the protected rows in `protect`, and writes those that are held out. Importance is one float32 per
    element of the trainable part of each LoRA weight, stored under `s1/` and `s2/`. Returns for each system
    the number of examples, their mean loss (in a pilot run: before the step on them) and the share of the
    formula's second-order term or, with a pilot run, its number of steps.
    """
    scorer = rl.rescore if context.variant == "rl" and rl.rescore else score.scorer
    if scorers.has_trait(scorer, "rollouts"):
        return _by_rollouts(context, model, prompt, lora, score, rl, seed)
    base = fsdp.load(model, score.launch)
    start = context.adapter("sft", "score")
    peft_model = adapter.attach(base, lora, start) if start else adapter.initial(base, lora, seed)
    layers = adapter.lora_layers(peft_model)
    shapes = {name: adapter.scored_shape(name, layer.weight, lora) for name, layer in layers.items()}
    if distributed.is_main():
        if not start:
            adapter.save(peft_model, context.out / "init", model)
        (context.out / "shapes.json").write_text(json.dumps(shapes, indent=1))
    fsdp.shard_base(peft_model, model, score.launch)
    summary: dict[str, Any] = {"elements": sum(rows * columns for rows, columns in shapes.values())}
    protected = context.variant == examples.PROTECTED
    if "classify" not in context.inputs and not protected:
        return summary
    labels = [] if protected else read_labels(context.labels)
    left_out = len(labels) - len(examples.with_response(labels))
    renderer = Renderer(load_tokenizer(model), score.prompt or prompt, labels)
    groups: dict[Any, list[Example]] = {}
    if protected:
        assert protect is not None
        groups[examples.PROTECTED], held_out, left_out = examples.protected(protect, score, seed)
        summary["held_out"] = _hold_out(held_out, renderer, data, context.out / "held_out.jsonl")
    else:
        groups |= examples.scored(labels, score, seed)
    if left_out:
        summary["without_response"] = left_out
    size = _batch_size(score)
    scores: dict[Any, dict[str, Tensor]] = {}
    for group, chosen in groups.items():
        title = "the protected rows" if protected else f"System {group}"
        rows, long = renderer.rows(chosen, data)
        scores[group], statistics = _score_rows(
            peft_model, rows, title, scorer, size, score.launch, lora, renderer, context.progress
        )
        name = str(group) if protected else f"system{group}"
        summary[name] = {"examples": len(rows), "too_long": long, **statistics}
    if distributed.is_main():
        write_importance(context.out / "importance.safetensors", scores)
    return {**summary, **fsdp.local_share(peft_model), "prompt": renderer.digest()}


def _score_rows(
    model: PeftModel,
    rows: list[Row],
    title: str,
    scorer: str,
    size: BatchSize,
    launch: LaunchSection,
    lora: LoraSection,
    renderer: Renderer,
    progress: Progress,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Score the elements on the rows of one group, and return statistics for the summary, too."""
    # The blocks that another group left in torch's memory pool are too small for the longest rows.
    resources.release_memory()
    steps = min(pilot.STEPS, len(rows)) if scorers.has_trait(scorer, "pilot") else 1
    batches = [rows[step::steps] for step in range(steps)]
    progress.start(f"score {title}", sum(len(_local_rows(batch)) for batch in batches))

    def sums_of(batch: list[Row]) -> Moments:
        return _moments(model, batch, size, launch, renderer, progress)

    scores, statistics = _importance(model, batches, sums_of, lora, scorer)
    check_importance(flatten_weights(scores), title)
    return scores, statistics


def _by_rollouts(
    context: StageContext,
    model: ModelSection,
    prompt: PromptSection,
    lora: LoraSection,
    score: ScoreSection,
    rl: RlSection,
    seed: int,
) -> dict[str, Any]:
    """Score every element for System 2 by RL's gradients at SFT's adapter.

    System 1's scores stay those of `score`: GRPO's gradients say what RL has to learn, and what RL may
    spoil is System 1, which SFT has learnt already.
    """
    from stages.lora.grpo import building  # the trainer, which other scorers do not need
    from stages.lora.training import loop
    from stages.score import gradients

    start = loop.StartingAdapter(context.adapter("sft"), None)
    labels, rl = read_labels(context.labels), gradients.without_updates(rl, score.launch)
    sandbox = rl.sandbox if loading.needs_sandbox(rl.rewards, rl.rewards_file) else None
    say = context.progress.say
    grpo = building.build(
        labels, start, context.checkpoints, say, model, prompt, lora, None, rl, seed, sandbox
    )
    sums, statistics = gradients.measure(grpo, start, context.progress)
    if not distributed.is_main():
        return {}
    previous = context.inputs["score"].path
    shutil.copyfile(previous / "shapes.json", context.out / "shapes.json")
    assert rl.rescore is not None
    system2 = _scores(adapter.lora_layers(grpo.model), sums, lora, scorers.pick(rl.rescore))
    check_importance(flatten_weights(system2), "System 2")
    importance: dict[int | str, dict[str, Tensor]] = {
        1: read_importance(previous / "importance.safetensors")[1],
        2: system2,
    }
    write_importance(context.out / "importance.safetensors", importance)
    elements = sum(tensor.numel() for tensor in system2.values())
    return {"elements": elements, "system2": statistics, "prompt": grpo.renderer.digest()}


def _scores(
    layers: dict[str, torch.nn.Linear], sums: Moments, lora: LoraSection, formula: Callable[..., Tensor]
) -> dict[str, Tensor]:
    """The formula's score of each element, from its value and the means of its gradient and of its square."""
    number = sums.examples
    return {
        name: _score(
            formula, name, lora, layer.weight, sums.gradient[name] / number, sums.square[name] / number
        )
        for name, layer in layers.items()
    }


def _score(formula: Callable[..., Tensor], name: str, lora: LoraSection, *tensors: Tensor) -> Tensor:
    """The formula applied to the trainable part of tensors of a weight's full shape."""
    return formula(*(adapter.trainable_part(name, tensor, lora).detach().float() for tensor in tensors))


def _hold_out(held_out: list[Example], renderer: Renderer, data: DataSection, path: Path) -> int:
    """Write the rows on which SFT and RL measure their drift, if they fit; returns their number."""
    fitting = [row for row in held_out if len(renderer.row(row).input_ids) <= data.max_length]
    if distributed.is_main():
        write_labels(path, (Labelled(row, None, {}) for row in fitting))
    return len(fitting)


def _local_rows(rows: list[Row]) -> list[Row]:
    """The rows that this process computes: every n-th of n processes, beginning with its rank."""
    return rows[distributed.rank() :: distributed.world_size()]


def _batch_size(score: ScoreSection) -> BatchSize:
    """Examples per forward pass: halved if memory runs out, but fixed for a sharded base.

    All processes of a sharded base have to make as many passes; one that halved its batches would make more.
    """
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
        # A sharded base gathers its layers in each pass, so all processes have to make as many passes. Rank r
        # of n has the rows r, r + n, …, and rank 0 the most. Ranks with fewer batches make the missing passes
        # with one row each, and drop the sums.
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
    if scorers.has_trait(scorer, "pilot"):
        trained, loss = pilot.run(layers, lora, batches, sums_of)
        scores = {
            name: _score(formula, name, lora, layer.weight, trained[name]) for name, layer in layers.items()
        }
        return scores, {"mean_loss": loss / sum(map(len, batches)), "pilot_steps": len(batches)}
    [rows] = batches
    sums = sums_of(rows)
    statistics = {"mean_loss": sums.loss / sums.examples, "second_order": _second_order(model, sums, lora)}
    return _scores(layers, sums, lora, formula), statistics


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
