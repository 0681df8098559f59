"""Make the initial adapter A₀, B₀ and score the importance of each of its elements for both systems."""

from __future__ import annotations

import json
from typing import Any

from peft import PeftModel
from torch import Tensor

from stages.config import DataSection, LoraSection, ModelSection, PromptSection, ScoreSection
from stages.lora import examples
from stages.lora.adapter import adapter
from stages.lora.importance.masks import flatten_weights, write_importance
from stages.lora.importance.scorers import Moments, moments, scorers
from stages.lora.importance.strategies import check_importance
from stages.models.base import load_base
from stages.models.tokenizer import load_tokenizer
from stages.pipeline.context import StageContext
from stages.prompts.renderer import Renderer, Row
from stages.records import read_labels
from stages.runtime import resources
from stages.runtime.batch_size import BatchSize


def run(
    context: StageContext, model: ModelSection, data: DataSection, prompt: PromptSection, lora: LoraSection,
    score: ScoreSection, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Write `init/` (plain PEFT), `shapes.json` and, if there are labels, `importance.safetensors`.

    Importance is one float32 per element of the trainable part of each LoRA weight, stored under `s1/` and
    `s2/`. Returns for each system the number of examples, their mean loss and the share of the formula's
    second-order term.
    """
    adapted = adapter.initial(load_base(model), lora, seed)
    layers = adapter.lora_layers(adapted).items()
    shapes = {name: adapter.scored_shape(name, layer.weight, lora) for name, layer in layers}
    adapter.save(adapted, context.out / "init", model)
    (context.out / "shapes.json").write_text(json.dumps(shapes, indent=1))
    summary: dict[str, Any] = {"elements": sum(rows * columns for rows, columns in shapes.values())}
    if "classify" not in context.inputs:
        return summary
    labels = read_labels(context.labels)
    renderer = Renderer(load_tokenizer(model), score.prompt or prompt, labels)
    if left_out := len(labels) - len(examples.with_response(labels)):
        summary["without_response"] = left_out
    scores = {}
    for system, chosen in examples.scored(labels, score, seed).items():
        rows, long = renderer.rows(chosen, data)
        context.progress.start(f"score System {system}", len(rows))
        hint = "shorten the rows by data.max_length, or set model.load_in_4bit"
        size = BatchSize("score.batch_size", score.batch_size, hint)
        sums = _sums(adapted, rows, size, context, renderer.tokenizer.pad_token_id)
        scores[system], second_order = _scores(adapted, lora, sums, score.scorer)
        check_importance(flatten_weights(scores[system]), f"System {system}")
        summary[f"system{system}"] = {
            "examples": len(rows), "too_long": long, "mean_loss": sums.loss / sums.examples,
            "second_order": second_order,
        }  # fmt: skip
    write_importance(context.out / "importance.safetensors", scores)
    return {**summary, "prompt": renderer.digest()}


def _sums(adapted: PeftModel, rows: list[Row], size: BatchSize, context: StageContext, pad: int) -> Moments:
    """Sum gradients and their squares over these rows, in batches of rows of similar length.

    The longest come first: later batches then fit into the memory that the first ones took. With the shortest
    first, each batch would need larger blocks than are free, a fifth more memory in all on a CPU.
    """
    # The blocks that the other system left in torch's memory pool are too small for the longest rows.
    resources.release_memory()
    adapted.requires_grad_(False)
    adapted.eval()
    longest_first = sorted(rows, key=lambda row: -len(row.input_ids))
    return moments(adapted, adapter.lora_layers(adapted), longest_first, size, context.progress.advance, pad)


def _scores(
    adapted: PeftModel, lora: LoraSection, sums: Moments, scorer: str
) -> tuple[dict[str, Tensor], float]:
    """The score of each element, and the share of the second-order term: Σ ½Fφ² / (Σ |gφ| + Σ ½Fφ²)."""
    scores, first, second = {}, 0.0, 0.0
    for name, layer in adapter.lora_layers(adapted).items():
        of_weight = (layer.weight, sums.gradient[name] / sums.examples, sums.square[name] / sums.examples)
        value, gradient, square = (
            adapter.trainable_part(name, tensor, lora).detach().float() for tensor in of_weight
        )
        scores[name] = scorers.pick(scorer)(value, gradient, square)
        first += float((gradient * value).abs().sum())
        second += float((0.5 * square * value.square()).sum())
    return scores, second / (first + second) if first + second else 0.0
