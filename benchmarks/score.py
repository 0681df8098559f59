"""What per-example gradients cost: the moments of `lorapar score` against a plain forward and backward.

    python benchmarks/score.py MODEL [--examples 32] [--batch 8] [--prompt 60] [--answer 8-40] [--pairs 5]

Plain: `model(input_ids, attention_mask, labels)` by transformers and its backward pass, for the gradient of
every LoRA weight, on the rows padded on the right, in batches of similar length. Ours: `moments` of the same
batches, the sums of every example's gradients and of their squares. Both on one model in eval mode, in turns,
in an order drawn at random; one pass each before warms up. A time is that of all batches; the padding is in
it on both sides. Rows are random token ids: `--prompt` without a label, then an answer of a length drawn from
`--answer`. The ratio is plain / ours, the median of pairs, with a bootstrap interval.
"""

import argparse
import random
import statistics
from typing import Any

import torch
from measure import from_to, in_turns, machine, options, ratio, timed
from torch.nn.utils.rnn import pad_sequence

from stages.config import LoraSection, ModelSection
from stages.lora.adapter import adapter
from stages.lora.importance.scorers import moments
from stages.models.base import load_base
from stages.prompts.renderer import IGNORED, Row
from stages.runtime.resources import BatchSize

WAYS = ("plain", "ours")
PAD = 0


def rows(given: argparse.Namespace, vocabulary: int) -> list[Row]:
    """From the longest to the shortest, as score sorts them."""
    draw = random.Random(0)
    made = []
    for number in range(given.examples):
        answer = draw.randint(*from_to(given.answer))
        ids = [draw.randrange(10, vocabulary) for _ in range(given.prompt + answer)]
        made.append(Row(f"row {number}", ids, [IGNORED] * given.prompt + ids[given.prompt :]))
    return sorted(made, key=lambda row: -len(row.input_ids))


def plain(model: Any, weights: list[torch.nn.Parameter], batches: list[list[Row]]) -> None:
    for batch in batches:
        ids, labels, mask = (
            pad_sequence(list(map(torch.tensor, values)), True, fill).to(model.device)
            for values, fill in (
                ([row.input_ids for row in batch], PAD),
                ([row.labels for row in batch], IGNORED),
                ([[1] * len(row.input_ids) for row in batch], 0),
            )
        )
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    for weight in weights:
        weight.grad = None


def main() -> None:
    rows_of = {"examples": 32, "batch": 8, "prompt": 60, "answer": "8-40"}
    given = options(__doc__, "model", **rows_of, pairs=5, dtype="float32", attention="eager").parse_args()
    base = load_base(ModelSection(name=given.model, dtype=given.dtype, attention=given.attention))
    model = adapter.initial(base, LoraSection(), seed=0).eval()
    layers = adapter.lora_layers(model)
    weights = [layer.weight for layer in layers.values()]
    made = rows(given, base.config.vocab_size)
    batches = [made[i : i + given.batch] for i in range(0, len(made), given.batch)]

    def seconds(way: str, _: int) -> float:
        for weight in weights:  # `moments` wants none of them
            weight.requires_grad_(way == "plain")
        if way == "plain":
            return timed(plain, model, weights, batches)
        size = BatchSize("score.batch_size", given.batch, "")
        return timed(moments, model, layers, made, size, lambda _: None, PAD)

    found = in_turns(WAYS, given.pairs, seconds)
    print("ratio", ratio(found["plain"], found["ours"]))
    print(
        f"{given.model}, {given.dtype}, attention {given.attention}, {given.examples} rows of {given.prompt} "
        f"+ {given.answer} tokens in batches of {given.batch}, {given.pairs} pairs, {machine(base.device)}"
    )
    tokens = sum(len(row.input_ids) for row in made)
    for way in WAYS:
        middle = statistics.median(found[way])
        print(f"{way:<5} {middle:.4g} s, {tokens / middle:.0f} tokens/s")


if __name__ == "__main__":
    main()
