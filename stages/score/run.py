"""Make the initial adapter A₀, B₀ and score the importance of each of its elements for both systems."""

import json
from typing import Any

from peft import PeftModel
from torch import Tensor

from stages.config import (
    AUTO,
    FAST,
    SLOW,
    DataSection,
    LoraSection,
    ModelSection,
    ModesSection,
    PromptSection,
    ScoreSection,
)
from stages.lora import examples
from stages.lora.adapter import adapter
from stages.lora.importance.masks import flatten_weights, write_importance
from stages.lora.importance.scorers import Moments, formula_of, moments
from stages.lora.importance.strategies import check_importance
from stages.models.base import load_base
from stages.models.tokenizer import load_tokenizer
from stages.pipeline.context import StageContext
from stages.prompts.renderer import Row, renderers_of
from stages.records import read_labels
from stages.runtime.resources import BatchSize, release_memory

GROUPS: dict[Any, tuple[str, str, str]] = {
    1: ("system1", "System 1", FAST),
    2: ("system2", "System 2", SLOW),
    examples.PROTECTED: ("protected", "the protected rows", AUTO),
}
"""Rows to score elements for → their name in the summary, what people call them, and the mode to ask in."""


def run(
    context: StageContext,
    model: ModelSection,
    data: DataSection,
    prompt: PromptSection,
    modes: ModesSection | None,
    lora: LoraSection,
    score: ScoreSection,
    seed: int,
    protect: str | None,
) -> dict[str, Any]:
    """Write `init/` (plain PEFT), `shapes.json` and, if there are labels, `importance.safetensors`.

    Importance is one float32 per element of the trainable part of each LoRA weight, by system. The variant
    `protected` writes that of the rows in `protect` alone. Returns for each of these the number of examples
    and their mean loss.
    """
    start, base = context.adapter, load_base(model)  # only the protected rows have a start to read
    adapted = adapter.attach(base, lora, start) if start else adapter.initial(base, lora, seed)
    layers = adapter.lora_layers(adapted).items()
    shapes = {name: adapter.scored_shape(name, layer.weight, lora) for name, layer in layers}
    summary: dict[str, Any] = {"elements": sum(rows * columns for rows, columns in shapes.values())}
    if not start:
        adapter.save(adapted, context.out / "init", model)
        (context.out / "shapes.json").write_text(json.dumps(shapes, indent=1))
    labels = read_labels(context.labels) if "classify" in context.inputs else []
    if protect and context.variant == examples.PROTECTED:
        groups, left_out = examples.protected(protect, score, seed)
    elif "classify" in context.inputs:
        groups, left_out = examples.scored(labels, score, seed)
    else:
        return summary  # the strategy reads no scores
    renderers = renderers_of(load_tokenizer(model), score.prompt or prompt, modes)
    scores = {}
    for group, chosen in groups.items():
        name, title, mode = GROUPS[group]
        renderer = renderers[mode if modes else ""]
        rows, long = renderer.rows(chosen, data)
        context.progress.start(f"score {title}", len(rows))
        hint = "shorten the rows by data.max_length, or set model.load_in_4bit"
        size = BatchSize("score.batch_size", score.batch_size, hint)
        sums = _sums(adapted, rows, size, context, renderer.tokenizer.pad_token_id)
        scores[group] = _scores(adapted, lora, sums, score)
        check_importance(flatten_weights(scores[group]), title)
        summary[name] = {"examples": len(rows), "too_long": long, "mean_loss": sums.loss / sums.examples}
    write_importance(context.out / "importance.safetensors", scores)
    counts = {"without_response": left_out} if left_out else {}
    return {**summary, **counts, "prompt": renderer.digest()}


def _sums(adapted: PeftModel, rows: list[Row], size: BatchSize, context: StageContext, pad: int) -> Moments:
    """Sum gradients and their squares over these rows, in batches of rows of similar length.

    The longest come first: later batches then fit into the memory that the first ones took. With the shortest
    first, each batch would need larger blocks than are free, a fifth more memory in all on a CPU.
    """
    # The blocks that the other system left in torch's memory pool are too small for the longest rows.
    release_memory()
    adapted.requires_grad_(False)
    adapted.eval()
    longest_first = sorted(rows, key=lambda row: -len(row.input_ids))
    return moments(adapted, adapter.lora_layers(adapted), longest_first, size, context.progress.advance, pad)


def _scores(adapted: PeftModel, lora: LoraSection, sums: Moments, score: ScoreSection) -> dict[str, Tensor]:
    """The score of each element."""
    formula, scores = formula_of(score.scorer, score.scorer_file), {}
    for name, layer in adapter.lora_layers(adapted).items():
        of_weight = (layer.weight, sums.gradient[name] / sums.examples, sums.square[name] / sums.examples)
        scores[name] = formula(*(adapter.trainable_part(name, x, lora).detach().float() for x in of_weight))
    return scores
