"""How long each step will take on this machine: tokens are counted, speeds are measured on the model.

A forward pass, a training step and a step of generation are timed for about a second each. What nobody can
know before is assumed: half of the rows are System 1, completions are as long as they may be, and servers
start at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from stages.benchmarks import benchmarks
from stages.config import Config, PromptSection, Voter
from stages.data.rows import read
from stages.labelling.personas import SHOTS, Brief, personas, shots
from stages.language.prompts import IGNORED, Renderer
from stages.lora.regions import strategies
from stages.models.tokenizer import load_tokenizer
from stages.pipeline.plan import Step
from stages.records import Example

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stages.models.layout import Flat

SAMPLE = 32
"""Rows from which lengths are taken."""
ROWS, NEW = 16, 8
"""Rows of a probe, and the tokens it generates."""
SYSTEM1 = 0.5
"""Share of System 1 among the rows, before anybody has voted."""


@dataclass(frozen=True)
class Speeds:
    """Seconds, on this machine and for this model."""

    forward: float
    """Per token of a forward pass."""
    train: float | None
    """Per token of a forward and backward pass through an adapter; None where it was not measured."""
    token: float
    """Per token generated, in a batch of ROWS."""


@dataclass(frozen=True)
class Lengths:
    """Mean numbers of tokens."""

    prompt: float
    row: float
    """Prompt and reference response."""


def estimate(config: Config, steps: list[Step]) -> dict[str, float | None]:
    """Seconds for each step; None where it is done elsewhere, or by code that is not ours."""
    tokenizer = load_tokenizer(config.model)
    rows = {name: _items(config, name) for name in config.eval.benchmarks}
    rows["train"] = read(config.data) if config.data.path else []
    sample = next((examples for examples in (rows["train"], *rows.values()) if examples), [])[:SAMPLE]
    if not sample:
        return dict.fromkeys(step.name for step in steps)
    # A model without chat template has other prompts for its stages; the lengths differ little.
    prompt = config.prompt if tokenizer.chat_template else PromptSection(template="plain")
    renderer = Renderer(tokenizer, prompt)
    lengths = Lengths(
        fmean(len(renderer.prompt_ids(example.prompt)) for example in sample),
        fmean(len(renderer.row(example).input_ids) for example in sample),
    )
    trains = config.baseline is None and any(step.stage.name in ("score", "sft", "rl") for step in steps)
    measured = _measure(config, tokenizer, lengths, trains)
    number = len(rows["train"])
    of_stage: dict[str, Callable[[str], float | None]] = {
        "classify": lambda variant: _votes(config, rows[variant], tokenizer, measured),
        "score": lambda _: _score(config, number, lengths, measured),
        "partition": lambda _: 0.0,
        "sft": lambda _: _sft(config, number, lengths, measured),
        "rl": lambda _: _rl(config, number, lengths, measured),
        "eval": lambda variant: _answers(config, variant.partition("@")[2], rows, lengths, measured),
    }
    found: dict[str, float | None] = {}
    for step in steps:
        of = of_stage.get(step.stage.name)
        found[step.name] = of(step.variant) if of else None
    return found


def _items(config: Config, name: str) -> list[Example]:
    section = config.eval.benchmarks[name]
    module = benchmarks.pick(section.kind)
    return list(module.load(section)) if hasattr(module, "load") else []


def _votes(
    config: Config, examples: list[Example], tokenizer: PreTrainedTokenizerBase, measured: Speeds
) -> float | None:
    section = config.classify
    if section.strategy != "vote" or not examples:
        return 0.0
    if any(voter.model or voter.urls for voter in section.voters):
        return None
    tokens = sum(
        _ballot(config, voter, examples[:SAMPLE], tokenizer) * voter.samples for voter in section.voters
    )
    return tokens * len(examples) * measured.forward


def _ballot(config: Config, voter: Voter, sample: list[Example], tokenizer: PreTrainedTokenizerBase) -> float:
    """Mean tokens of a voter's question, without the beginning that all its questions share."""
    from stages.models.layout import common

    worked = shots(SHOTS, voter.shots) if personas.has(voter.persona, "few-shot") else ()
    brief = Brief(config.model.title, config.classify.show_answer, voter.words, worked)
    rows = []
    for example in sample:
        text = personas.pick(voter.persona)(example, brief).text
        plain = text if isinstance(text, str) else "\n".join(message["content"] for message in text)
        rows.append(list(tokenizer(plain)["input_ids"]))
    return fmean(map(len, rows)) - (common(rows) if len(rows) > 1 else 0)


def _score(config: Config, rows: int, lengths: Lengths, measured: Speeds) -> float:
    if strategies.has(config.partition.strategy, "unscored"):
        return 0.0
    return 2 * min(config.score.examples, rows / 2) * lengths.row * (measured.train or 0.0)


def _sft(config: Config, rows: int, lengths: Lengths, measured: Speeds) -> float | None:
    from stages.lora.training import steps_of

    sft = config.sft
    if measured.train is None:
        return None
    used = rows if sft.data == "all" else rows * SYSTEM1 * (1 + sft.system2_share)
    return steps_of(math.ceil(used / sft.batch_size), sft) * sft.batch_size * lengths.row * measured.train


def _rl(config: Config, rows: int, lengths: Lengths, measured: Speeds) -> float | None:
    from stages.lora.training import steps_of

    rl = config.rl
    if measured.train is None:
        return None
    used = rows if rl.data == "all" else rows * (1 - SYSTEM1)
    steps = steps_of(int(used // (rl.prompts_per_step - rl.replayed)), rl, rl.iterations)
    samples = rl.prompts_per_step * rl.group
    prompts = rl.prompts_per_step if rl.shared_prompts == "auto" and not rl.dropout else samples
    learned = (prompts * lengths.prompt + samples * rl.max_completion) * measured.train
    read = rl.prompts_per_step * lengths.prompt  # rollouts read each prompt once in any case
    sampled = read * measured.forward + samples * rl.max_completion * measured.token
    return steps * (learned + sampled / rl.iterations)


def _answers(
    config: Config, name: str, rows: dict[str, list[Example]], lengths: Lengths, measured: Speeds
) -> float | None:
    section = config.eval.benchmarks[name]
    if not rows[name]:
        return None
    written = 0 if section.mode == "likelihood" else section.max_new_tokens
    each = lengths.prompt * (1 + section.shots) * measured.forward + written * measured.token
    return len(rows[name]) * section.samples * each


def _measure(config: Config, tokenizer: PreTrainedTokenizerBase, lengths: Lengths, trains: bool) -> Speeds:
    """trains: measure training, too. What is timed is computed as the stages compute it."""
    import torch

    from stages.engines import Sampling
    from stages.engines.generation import continuations
    from stages.models import flat
    from stages.models.base import load_base
    from stages.models.layout import Branch, Flat, Group

    base = load_base(config.model)
    size, prompt = max(2, round(lengths.row)), min(round(lengths.prompt), round(lengths.row) - 1)
    ids = torch.randint(10, base.config.vocab_size, (ROWS, size), device=base.device)
    rows = ids.tolist()
    row = None
    if flat.fits(base, rows[0]):
        targets = [[IGNORED] * prompt + line[prompt:] for line in rows]
        branches = [Branch(*pair) for pair in zip(rows, targets, strict=True)]
        row = Flat.of([Group([], branches)], base.device)

    @torch.no_grad()
    def forward() -> None:
        if row is None:
            base(input_ids=ids, logits_to_keep=1)
        else:
            flat.hidden(base, row.input_ids, row.position_ids, row)

    def generate(number: int) -> Callable[[], Any]:
        return lambda: list(continuations(base, tokenizer, rows, Sampling(number, ())))

    once = _seconds(forward)
    written = (_seconds(generate(NEW + 1)) - _seconds(generate(1))) / NEW
    step = _training(base, config, ids, row) if trains else None
    return Speeds(once / ids.numel(), step and step / ids.numel(), max(written, 0.0) / ROWS)


def _training(base: PreTrainedModel, config: Config, ids: Tensor, row: Flat | None) -> float:
    """Seconds of a forward and backward pass; how the adapter begins does not matter."""
    from stages.lora.adapter import initial
    from stages.models import flat

    lora = config.lora.model_copy(update={"init": "normal", "compensate": False})
    adapted = initial(base, lora, config.seed).train()

    def train() -> None:
        if row is None:
            adapted(input_ids=ids, labels=ids).loss.backward()
        else:
            flat.choose(adapted, row).log_probs.sum().backward()

    return _seconds(train)


def _seconds(call: Callable[[], Any]) -> float:
    """Time of one call, the mean over about a second, after one that does not count."""
    import torch

    def done() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    call()
    done()
    begun, number = time.perf_counter(), 0
    while number == 0 or time.perf_counter() - begun < 1:
        call()
        done()
        number += 1
    return (time.perf_counter() - begun) / number
