"""Make the initial adapter A₀, B₀ and score the importance of each of its elements for both systems."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from stages.config import DataSection, LoraSection, ModelSection, PromptSection, RlSection, ScoreSection
from stages.lora import examples
from stages.lora.adapter import adapter, fsdp
from stages.lora.importance.masks import flatten_weights, read_importance, write_importance
from stages.lora.importance.scorers import Moments, formula_of, moments, scorers
from stages.lora.importance.strategies import check_importance
from stages.models.tokenizer import load_tokenizer
from stages.pipeline.context import StageContext
from stages.prompts.renderer import Renderer, Row
from stages.records import Example, Labelled, read_labels, write_labels
from stages.rewards import loading
from stages.runtime import distributed, resources
from stages.runtime.batch_size import BatchSize
from stages.score import pilot


@dataclass(frozen=True)
class Scoring:
    """The sections that the stage reads."""

    context: StageContext
    model: ModelSection
    data: DataSection
    prompt: PromptSection
    lora: LoraSection
    score: ScoreSection
    seed: int
    protect: str | None
    rl: RlSection

    @property
    def scorer(self) -> str:
        """The name of the scorer."""
        return self.rl.rescore if self.context.variant == "rl" and self.rl.rescore else self.score.scorer

    @cached_property
    def is_sharded(self) -> bool:
        return fsdp.is_sharded(self.score.launch)

    @cached_property
    def labels(self) -> list[Labelled]:
        """Those of the rows to score; none if these are the protected ones."""
        return read_labels(self.context.labels) if "classify" in self.context.inputs else []

    @cached_property
    def renderer(self) -> Renderer:
        return Renderer(load_tokenizer(self.model), self.score.prompt or self.prompt, self.labels)

    @cached_property
    def batch_size(self) -> BatchSize:
        """Examples per forward pass: halved if memory runs out, but fixed for a sharded base.

        All processes of a sharded base have to make as many passes; one that halved its batches would make
        more.
        """
        size, hint = self.score.batch_size, "shorten the rows by data.max_length, or set model.load_in_4bit"
        if self.is_sharded:
            return BatchSize("score.batch_size", size, "lower score.batch_size", size)
        return BatchSize("score.batch_size", size, hint)

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """The trainable part of a tensor of a weight's full shape, in float32."""
        return adapter.trainable_part(name, tensor, self.lora).detach().float()


def run(context: StageContext, **sections: Any) -> dict[str, Any]:
    """Write `init/` (plain PEFT), `shapes.json` and, if there are labels, `importance.safetensors`.

    The variant `rl` scores the adapter of SFT instead, and writes no `init/`; `protected` scores the initial
    one for the protected rows in `protect`, and writes those that are held out. Importance is one float32 per
    element of the trainable part of each LoRA weight, stored under `s1/` and `s2/`. Returns for each system
    the number of examples, their mean loss (in a pilot run: before the step on them) and the share of the
    formula's second-order term or, with a pilot run, its number of steps.
    """
    run = Scoring(context, **sections)
    if scorers.has_trait(run.scorer, "rollouts"):
        return _by_rollouts(run)
    model, elements = _adapted(run)
    if "classify" not in context.inputs and context.variant != examples.PROTECTED:
        return {"elements": elements}
    groups, counts = _examples(run)
    summary = {"elements": elements, **counts}
    scores: dict[Any, dict[str, Tensor]] = {}
    for group, chosen in groups.items():
        rows, long = run.renderer.rows(chosen, run.data)
        is_system = group != examples.PROTECTED
        title = f"System {group}" if is_system else "the protected rows"
        scores[group], statistics = _score_rows(run, model, rows, title)
        name = f"system{group}" if is_system else group
        summary[name] = {"examples": len(rows), "too_long": long, **statistics}
    if distributed.is_main():
        write_importance(context.out / "importance.safetensors", scores)
    return {**summary, **fsdp.local_share(model), "prompt": run.renderer.digest()}


def _adapted(run: Scoring) -> tuple[PeftModel, int]:
    """The model with the adapter to score, a new one if there is none, and the number of its elements."""
    context, lora = run.context, run.lora
    base = fsdp.load(run.model, run.score.launch)
    start = context.adapter("sft", "score")
    model = adapter.attach(base, lora, start) if start else adapter.initial(base, lora, run.seed)
    layers = adapter.lora_layers(model).items()
    shapes = {name: adapter.scored_shape(name, layer.weight, lora) for name, layer in layers}
    if distributed.is_main():
        if not start:
            adapter.save(model, context.out / "init", run.model)
        (context.out / "shapes.json").write_text(json.dumps(shapes, indent=1))
    fsdp.shard_base(model, run.model, run.score.launch)
    return model, sum(rows * columns for rows, columns in shapes.values())


def _examples(run: Scoring) -> tuple[dict[Any, list[Example]], dict[str, Any]]:
    """The examples to score by group, a system or the protected rows, and counts for the summary.

    Of the protected rows those are written on which SFT and RL measure their drift, if they fit.
    """
    counts = {}
    if run.context.variant == examples.PROTECTED:
        assert run.protect is not None
        scored, held_out, left_out = examples.protected(run.protect, run.score, run.seed)
        groups: dict[Any, list[Example]] = {examples.PROTECTED: scored}
        longest = run.data.max_length
        fitting = [row for row in held_out if len(run.renderer.row(row).input_ids) <= longest]
        if distributed.is_main():
            rows = (Labelled(row, None, {}) for row in fitting)
            write_labels(run.context.out / "held_out.jsonl", rows)
        counts["held_out"] = len(fitting)
    else:
        groups = {**examples.scored(run.labels, run.score, run.seed)}
        left_out = len(run.labels) - len(examples.with_response(run.labels))
    return groups, counts | ({"without_response": left_out} if left_out else {})


def _by_rollouts(run: Scoring) -> dict[str, Any]:
    """Score every element for System 2 by RL's gradients at SFT's adapter.

    System 1's scores stay those of `score`: GRPO's gradients say what RL has to learn, and what RL may
    spoil is System 1, which SFT has learnt already.
    """
    from stages.lora.grpo.building import Grpo  # the trainer, which other scorers do not need
    from stages.score import gradients

    context, rl = run.context, gradients.without_updates(run.rl, run.score.launch)
    grpo = Grpo(
        context=context, model=run.model, prompt=run.prompt, lora=run.lora, baseline=None, seed=run.seed,
        rl=rl, sandbox=rl.sandbox if loading.needs_sandbox(rl.rewards, rl.rewards_file) else None,
    )  # fmt: skip
    layers, sums, statistics = gradients.measure(grpo)
    if not distributed.is_main():
        return {}
    previous = context.inputs["score"].path
    shutil.copyfile(previous / "shapes.json", context.out / "shapes.json")
    system2 = _scores(run, layers, sums)
    check_importance(flatten_weights(system2), "System 2")
    system1 = read_importance(previous / "importance.safetensors")[1]
    write_importance(context.out / "importance.safetensors", {1: system1, 2: system2})
    elements = sum(tensor.numel() for tensor in system2.values())
    return {"elements": elements, "system2": statistics, "prompt": grpo.renderer.digest()}


def _score_rows(
    run: Scoring, model: PeftModel, rows: list[Row], title: str
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Score the elements on the rows of one group, and return statistics for the summary, too."""
    # The blocks that another group left in torch's memory pool are too small for the longest rows.
    resources.release_memory()
    steps = min(pilot.STEPS, len(rows)) if scorers.has_trait(run.scorer, "pilot") else 1
    batches = [rows[step::steps] for step in range(steps)]
    run.context.progress.start(f"score {title}", sum(len(_local_rows(batch)) for batch in batches))
    scores, statistics = _importance(
        run, adapter.lora_layers(model), batches, lambda b: _moments(run, model, b)
    )
    check_importance(flatten_weights(scores), title)
    return scores, statistics


def _local_rows(rows: list[Row]) -> list[Row]:
    """The rows that this process computes: every n-th of n processes, beginning with its rank."""
    return rows[distributed.rank() :: distributed.world_size()]


def _moments(run: Scoring, model: PeftModel, rows: list[Row]) -> Moments:
    """Compute the sums over these rows, split over all processes; each process returns the totals.

    Batches hold rows of similar length, so that they need little padding. The longest rows come first: later
    batches then fit into the memory that the first ones took. With the shortest first, each batch would need
    larger blocks than are free, a fifth more memory in all on a CPU.
    """
    local = sorted(_local_rows(rows), key=lambda row: -len(row.input_ids))
    model.requires_grad_(False)
    model.eval()
    layers, pad, size = adapter.lora_layers(model), run.renderer.tokenizer.pad_token_id, run.batch_size
    sums = moments(model, layers, local, size, run.context.progress.advance, pad)
    if run.is_sharded:
        # A sharded base gathers its layers in each pass, so all processes have to make as many passes. Rank r
        # of n has the rows r, r + n, …, and rank 0 the most. Ranks with fewer batches make the missing passes
        # with one row each, and drop the sums.
        own, most = (math.ceil(n / size.now) for n in (len(local), len(rows[:: distributed.world_size()])))
        moments(model, layers, rows[:1] * (most - own), replace(size, now=1), lambda _: None, pad)
    device = next(iter(sums.gradient.values())).device
    counts = torch.tensor([sums.examples, sums.loss], dtype=torch.float64, device=device)
    distributed.all_reduce([counts, *sums.gradient.values(), *sums.square.values()])
    sums.examples, sums.loss = int(counts[0]), float(counts[1])
    return sums


def _importance(
    run: Scoring,
    layers: dict[str, nn.Linear],
    batches: list[list[Row]],
    sums_of: Callable[[list[Row]], Moments],
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Score the trainable part of each weight by the scorer's formula, and return statistics for the summary.

    batches: those of a pilot run, one per step; for other scorers one batch of all rows.
    """
    if scorers.has_trait(run.scorer, "pilot"):
        trained, loss = pilot.run(layers, run.lora, batches, sums_of)
        formula = scorers.pick(run.scorer)
        scores = {
            name: formula(run.part(name, layer.weight), run.part(name, trained[name]))
            for name, layer in layers.items()
        }
        return scores, {"mean_loss": loss / sum(map(len, batches)), "pilot_steps": len(batches)}
    [rows] = batches
    sums = sums_of(rows)
    statistics = {"mean_loss": sums.loss / sums.examples, "second_order": _second_order(run, layers, sums)}
    return _scores(run, layers, sums), statistics


def _scores(run: Scoring, layers: dict[str, nn.Linear], sums: Moments) -> dict[str, Tensor]:
    """The formula's score of each element, from its value and the means of its gradient and of its square."""
    formula = formula_of(run.scorer, run.score.scorer_file)
    return {name: formula(*tensors) for name, *tensors in _means(run, layers, sums)}


def _means(
    run: Scoring, layers: dict[str, nn.Linear], sums: Moments
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Yield each weight's name and, of its trainable part: value, mean gradient, mean squared gradient."""
    for name, layer in layers.items():
        gradient, square = sums.gradient[name] / sums.examples, sums.square[name] / sums.examples
        yield name, run.part(name, layer.weight), run.part(name, gradient), run.part(name, square)


def _second_order(run: Scoring, layers: dict[str, nn.Linear], sums: Moments) -> float:
    """Share of the second-order term over all elements: Σ ½Fφ² / (Σ |gφ| + Σ ½Fφ²)."""
    first = second = 0.0
    for _, value, gradient, square in _means(run, layers, sums):
        first += float((gradient * value).abs().sum())
        second += float((0.5 * square * value.square()).sum())
    return second / (first + second) if first + second else 0.0
