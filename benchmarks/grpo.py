"""The two sides of rl.py: TRL's GRPOTrainer on plain LoRA and lorapar's trainer, step by step.

rl.py says what is measured, and how completions are ended.
"""

import argparse
import gc
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from measure import in_turns, now, random_masks, twin
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PrinterCallback, TrainerCallback
from transformers.trainer_utils import SaveStrategy
from trl import GRPOTrainer

from stages.config import LoraSection, ModelSection, PromptSection, RlSection
from stages.config.rl import RolloutsSection
from stages.engines import Sampling, continuous_batching
from stages.lora.adapter import adapter
from stages.lora.adapter.elements import sparsify
from stages.lora.adapter.merge import MergedCopy
from stages.lora.grpo import building, vllm_rollouts
from stages.lora.grpo.prompts import RlPrompts
from stages.lora.grpo.rollouts import RolloutSampler
from stages.models.base import load_base
from stages.models.tokenizer import load_tokenizer
from stages.prompts.renderer import Renderer
from stages.rewards import calls
from stages.runtime.resources import BatchSize
from stages.store.checkpoints import Checkpoints

SIDES = ("TRL", "lorapar")
INT8 = "lorapar, int8"
"""A third side, which samples in 8 bits."""
PARTS = ("whole step", "rollouts", "loss + backward", "update", "rest")
PICK = continuous_batching._Batcher._sample


@dataclass(frozen=True)
class Shape:
    prompts: int
    group: int
    prompt: int
    completion: tuple[int, int]
    micro_batch: int

    def __str__(self) -> str:
        low, high = self.completion
        return f"{self.prompts} prompts × {self.group} completions of {low}-{high} tokens"


@dataclass(frozen=True)
class Batch:
    """What one step of either side works on."""

    prompts: dict[str, list[int]]
    """Text → token ids."""
    lengths: list[int]
    """Of the completions, in the order of the rows that are sampled."""

    def rows(self) -> Dataset:
        return Dataset.from_list([{"prompt": text} for text in self.prompts])


class Ends:
    """Lets completion i of a step end after `lengths[i]` tokens, the stop token included."""

    def __init__(self, stops: list[int]) -> None:
        self.stops = stops
        self.lengths: list[int] = []

    def write(self, logits: Tensor, items: Iterable[int], written: Iterable[int]) -> None:
        """Change the logits (rows, vocabulary) of these completions, of which so much is written."""
        logits[:, self.stops] = -torch.inf
        pairs = zip(items, written, strict=True)
        last = [row for row, (item, number) in enumerate(pairs) if number + 1 == self.lengths[item]]
        if last:
            logits[last] = -torch.inf
            logits[last, self.stops[0]] = 0

    def on_theirs(self, model: Any) -> None:
        usual = model.generate

        def generate(**given: Any) -> Tensor:
            force = _Force(self, given["input_ids"].shape[1])
            return usual(**given, logits_processor=LogitsProcessorList([force]))  # type: ignore[no-any-return]

        model.generate = generate

    def on_ours(self) -> None:
        def pick(writer: Any, logits: Tensor, lines: list[Any]) -> list[int]:
            self.write(logits, [line.item for line in lines], [len(line.ids) for line in lines])
            return PICK(writer, logits, lines)

        continuous_batching._Batcher._sample = pick  # type: ignore[method-assign, assignment]


class _Force(LogitsProcessor):
    def __init__(self, ends: Ends, width: int) -> None:
        self.ends, self.width = ends, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows, tokens = input_ids.shape
        self.ends.write(scores, range(rows), [tokens - self.width] * rows)
        return scores


class Side(TrainerCallback):
    """One trainer, and the seconds of its last step by part."""

    def __init__(self, trainer: Any, ends: Ends) -> None:
        self.trainer, self.ends = trainer, ends
        self.written: list[int] = []
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self)
        sample, clip = trainer._generate_single_turn, trainer._clip_grad_norm

        def sampled(*arguments: Any, **given: Any) -> Any:
            made = sample(*arguments, **given)
            self.written = [len(ids) for ids in made[0]]
            return made

        def clipped(*arguments: Any) -> Any:
            self.clipping = now()
            return clip(*arguments)

        trainer._generate_single_turn = self._added(sampled, "rollouts")
        trainer._prepare_inputs = self._added(trainer._prepare_inputs, "inputs")
        trainer.training_step = self._added(trainer.training_step, "training_step")
        trainer._clip_grad_norm = clipped

    def _added(self, method: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*arguments: Any, **given: Any) -> Any:
            begun = now()
            made = method(*arguments, **given)
            self.seconds[part] += now() - begun
            return made

        return call

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.begun = now()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.seconds["update"] = now() - self.clipping

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.seconds["whole step"] = now() - self.begun

    def step(self, batch: Batch) -> dict[str, float]:
        """Seconds of each of PARTS."""
        self.ends.lengths = batch.lengths
        self.ends.on_ours()  # its place is one for all sides
        self.trainer.train_dataset = batch.rows()
        self.seconds = {"rollouts": 0.0, "inputs": 0.0, "training_step": 0.0}
        self.trainer.train()
        assert self.written == batch.lengths, (self.written, batch.lengths)
        made = self.seconds
        made["loss + backward"] = made["training_step"] - made["inputs"]
        made["rest"] = made["whole step"] - made["rollouts"] - made["loss + backward"] - made["update"]
        return {part: made[part] for part in PARTS}


def odd(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    return [float(len(ids) % 2) for ids in completion_ids]


class Bench:
    """The base model, and both sides of a shape on it."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.given, self.folder = given, folder
        self.section = ModelSection(name=given.model, dtype=given.dtype, attention=given.attention)
        self.base = load_base(self.section)
        tokenizer = load_tokenizer(self.section)
        section = PromptSection(template="chat" if tokenizer.chat_template else "plain")
        self.renderer = Renderer(tokenizer, section)
        self.base.generation_config.eos_token_id = self.renderer.stop_ids
        self.questions = _questions(given.prompts_file) if given.prompts_file else []
        self.words = [] if self.questions else _words(tokenizer)

    def batches(self, shape: Shape, number: int) -> list[Batch]:
        made = []
        for seed in range(number):
            draw = random.Random(seed)
            if self.questions:
                texts = [self.renderer.prompt(text) for text in draw.sample(self.questions, shape.prompts)]
            else:
                about = [round(shape.prompt * x) for x in (0.85, 1.15)]
                texts = [
                    "".join(draw.choices(self.words, k=draw.randint(*about))) for _ in range(shape.prompts)
                ]
            ids = self.renderer.tokenizer(texts)["input_ids"]
            lengths = [draw.randint(*shape.completion) for _ in range(shape.prompts * shape.group)]
            for row in range(round(self.given.equal * shape.prompts) * shape.group):
                if lengths[row] % 2 == 0:  # to an odd one, as all of its group have
                    lengths[row] += 1 if lengths[row] < shape.completion[1] else -1
            made.append(Batch(dict(zip(texts, ids, strict=True)), lengths))
        return made

    def side(self, name: str, base: Any, shape: Shape, batches: Sequence[Batch]) -> Side:
        """One of SIDES, on `base` itself, ready for these batches."""
        section = RlSection(
            max_steps=1, warmup_ratio=0, lr_scheduler_type="constant", prompts_per_step=shape.prompts,
            num_generations=shape.group, per_device_train_batch_size=shape.micro_batch,
            max_completion_length=shape.completion[1], rewards={"odd": 1.0},
            rollouts=RolloutsSection(int8=name == INT8),
        )  # fmt: skip
        stops = self.renderer.stop_ids
        rollouts = vllm_rollouts.arguments(section, base, stops)
        arguments = building._arguments(section, 1, 0, Checkpoints(self.folder, ""), rollouts)
        arguments.save_strategy = SaveStrategy.NO
        ends = Ends(stops)
        if name == "TRL":
            model = adapter.initial(base, LoraSection(), seed=0)
            ends.on_theirs(model)
            tokenizer = self.renderer.tokenizer
            trainer = GRPOTrainer(model, odd, arguments, batches[0].rows(), processing_class=tokenizer)
        else:
            trainer = self._ours(base, section, arguments, batches, ends)
        return Side(trainer, ends)

    def _ours(
        self, base: Any, section: RlSection, arguments: Any, batches: Sequence[Batch], ends: Ends
    ) -> Any:
        """As `stages.rl.run` makes it, from random masks."""
        merged = MergedCopy(base)
        model = adapter.initial(base, LoraSection(), seed=0)
        tokens = {text: ids for batch in batches for text, ids in batch.prompts.items()}
        rewards = [calls.with_checks("odd", odd)]
        pool = RlPrompts(batches[0].rows(), tokens, {}, 0, 0, 0)
        sampling = Sampling(section.max_completion_length, tuple(self.renderer.stop_ids), 1.0)
        size = BatchSize("rl.rollouts.batch_size", section.rollouts.batch_size, "")
        writer = RolloutSampler(model, merged, self.renderer, sampling, size, section.rollouts.int8)
        trainer = building.trainer_class(False)(section, pool, writer, None, rewards, arguments)
        sparsify(model, random_masks(adapter.lora_layers(model), self.given.share))
        return trainer

    def pairs(self, shape: Shape) -> tuple[list[Batch], dict[str, list[dict[str, float]]]]:
        """The batches that count, and for each side the seconds of its steps on them."""
        batches = self.batches(shape, self.given.pairs + 1)
        seconds = self._seconds(shape, batches)
        gc.collect()
        return batches[1:], seconds

    def _seconds(self, shape: Shape, batches: list[Batch]) -> dict[str, list[dict[str, float]]]:
        names = [*SIDES, INT8] if self.given.int8 else SIDES
        sides = {name: self.side(name, twin(self.base), shape, batches) for name in names}
        return in_turns(names, self.given.pairs, lambda name, number: sides[name].step(batches[number]))


def _questions(path: str) -> list[str]:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return sorted({json.loads(line)["question"] for line in lines})


def _words(tokenizer: Any) -> list[str]:
    """Texts of one token each which stay one token beside each other: words with a space before them.

    A tokenizer of bytes has none; then letters.
    """
    texts = {tokenizer.decode([i]) for i in range(len(tokenizer))}
    plain = [text for text in texts if text.isascii() and text.strip().isalpha()]
    words = sorted(text for text in plain if text[0] == " " and text[1:].isalpha()) or sorted(plain)
    most = min(map(len, tokenizer(words)["input_ids"]))  # one, and what is added to every text
    return [w for w, ids in zip(words, tokenizer(words)["input_ids"], strict=True) if len(ids) == most]
