"""The prompts that RL draws from, and their order: System 2 rows, and System 1 rows that are replayed."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler

from stages.config import FAST, RlSection
from stages.errors import DataError
from stages.prompts.renderer import Renderer
from stages.records import Example, Labelled, examples_of_system, labelled_examples
from stages.rewards import calls

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RlPrompts:
    """Rendered prompts and what rewards read of their rows."""

    rows: Dataset
    """Rows to train on: the text of the prompt and the fields that rewards read.

    The last `replayed` ones are of System 1."""
    tokens: dict[str, list[int]]
    """Text of a prompt → token ids."""
    ids: dict[tuple[int, ...], str]
    """Token ids of a prompt → id of its row."""
    replayed: int
    unrewardable: int
    """Number of System 1 rows that lack a column which a reward reads, so that they are not replayed."""
    long: int
    """Number of prompts to train on that are too long."""
    fast: frozenset[str] = frozenset()
    """The replayed prompts in the fast mode, where a completion that works its answer out earns nothing."""

    @property
    def system2_rows(self) -> int:
        """Number of rows that are not replayed; they come first."""
        return len(self.rows) - self.replayed

    @cached_property
    def replayed_prompts(self) -> frozenset[str]:
        """The prompts of the System 1 rows that are replayed."""
        return frozenset(list(self.rows["prompt"])[self.system2_rows :])

    @classmethod
    def from_labels(
        cls,
        labels: list[Labelled],
        renderers: dict[str, Renderer],
        rl: RlSection,
        functions: dict[str, Callable[..., Any]],
        seed: int,
    ) -> RlPrompts:
        """renderers: by mode. functions: the rewards by name.

        DataError if a row to train on lacks a column that a reward reads, or if rows are too few. A System 1
        row that lacks one is counted, and not replayed.
        """
        from datasets import Dataset

        needed = {name: calls.required_fields(function) for name, function in functions.items()}
        examples = examples_of_system(labels, 2) if rl.data == "system2" else labelled_examples(labels)
        trained = [row_fields(e, renderer) for e in examples for renderer in _of_system(renderers, 2)]
        calls.check_fields(needed, trained)
        easy = [row.example for row in labels if row.system == 1] if rl.replay_prompts else []
        # One row for each System 1 prompt: a question may have several responses, and even both labels.
        questions = {row["question"] for row in trained}
        rows = [row_fields(e, renderer) for e in easy for renderer in _of_system(renderers, 1)]
        system1 = list({row["prompt"]: row for row in rows if row["question"] not in questions}.values())
        ids = next(iter(renderers.values())).ids
        tokens = {row["prompt"]: ids(row["prompt"]) for row in trained + system1}
        fitting, too_long = _fitting(trained, tokens, rl)
        system1, too_long_system1 = _fitting(system1, tokens, rl)
        too_long += too_long_system1
        random.Random(f"{seed} held out").shuffle(system1)
        replayed = [row for row in system1 if not calls.missing_fields(needed, [row])]
        _check_enough(fitting, replayed, rl, too_long)
        rows = fitting + replayed
        fields = [json.dumps(passed) for passed in calls.passed_fields(rows, functions)]
        return cls(
            rows=Dataset.from_dict({"prompt": [row["prompt"] for row in rows], calls.FIELDS: fields}),
            tokens=tokens,
            ids={tuple(tokens[row["prompt"]]): row["id"] for row in rows},
            fast=frozenset(renderers[FAST].prompt(e.prompt, example=e) for e in easy if FAST in renderers),
            replayed=len(replayed),
            unrewardable=len(system1) - len(replayed),
            long=too_long,
        )


def _of_system(renderers: dict[str, Renderer], system: int) -> list[Renderer]:
    """Those of the modes under which RL asks a system's questions."""
    return [renderer for mode, renderer in renderers.items() if mode != FAST or system == 1]


def row_fields(example: Example, renderer: Renderer) -> dict[str, Any]:
    """The fields that a reward may read, and the text of the prompt."""
    return {
        **example.extra,
        "id": example.id,
        "question": example.conversation,
        "gold": example.gold,
        "response": example.response or None,
        "answer_format": renderer.section.answer_format,
        "prompt": renderer.prompt(example.prompt, example=example),
    }


def _fitting(
    rows: list[dict[str, Any]], tokens: dict[str, list[int]], rl: RlSection
) -> tuple[list[dict[str, Any]], int]:
    """The rows to train on, and the number of rows whose prompt is too long.

    `rl.too_long` says whether those are left out or are cut, which changes `tokens`.
    """
    fitting = [row for row in rows if len(tokens[row["prompt"]]) <= rl.max_prompt_length]
    long = len(rows) - len(fitting)
    if long:
        log.warning(
            "%d of %d prompts are longer than rl.max_prompt_length %d", long, len(rows), rl.max_prompt_length
        )
    if rl.too_long == "truncate_left":
        tokens.update({row["prompt"]: tokens[row["prompt"]][-rl.max_prompt_length :] for row in rows})
        return rows, long
    return fitting, long


def _check_enough(
    fitting: list[dict[str, Any]], replayed: list[dict[str, Any]], rl: RlSection, long: int
) -> None:
    """DataError unless one step can be filled."""
    needed = rl.prompts_per_step - rl.replay_prompts
    if len(fitting) < needed:
        raise DataError(
            f"{len(fitting)} RL prompts ({long} too long) are fewer than the {needed} of a step",
            "lower rl.prompts_per_step, raise rl.max_prompt_length, or bring more System 2 rows",
        )
    if len(replayed) < rl.replay_prompts:
        raise DataError(
            f"{len(replayed)} System 1 rows can be replayed, fewer than the {rl.replay_prompts} of a step",
            "they need a short prompt and every field that the rewards read; lower rl.system1_share",
        )


class ReplaySampler(Sampler[int]):
    """TRL's order of rows, with a fixed number of System 1 rows in each step.

    The data set has System 2 rows first and the replayed System 1 rows at its end. An epoch draws each System
    2 row at most once. It draws all System 1 rows before it repeats one; the next epoch begins anew. No row
    is twice in a step, which needs `per_step` ≤ `replayed`.
    """

    def __init__(self, inner: Any, replayed: int, per_step: int) -> None:
        """inner: TRL's RepeatSampler. replayed: rows at the end, drawn `per_step` at a time."""
        self.inner, self.replayed, self.per_step = inner, replayed, per_step
        self.system2 = inner.num_samples - replayed
        self.generator = inner.generator

    def __len__(self) -> int:
        inner = self.inner
        return self._batches() * inner.batch_size * inner.mini_repeat_count * inner.repeat_count

    def _batches(self) -> int:
        return self.system2 // (self.inner.batch_size - self.per_step)

    def __iter__(self) -> Iterator[int]:
        system2_rows = self._shuffled(range(self.system2))
        queue: list[int] = []  # System 1 rows still to be drawn in this round
        size = self.inner.batch_size - self.per_step
        for batch in range(self._batches()):
            if len(queue) < self.per_step:
                # Begin a new round, every row once. Before it come the rows left over from the last round,
                # and in it they come at the end: the per_step rows that are taken next are all different,
                # because queue and not_queued are disjoint and have replayed ≥ per_step rows together.
                every = range(self.system2, self.system2 + self.replayed)
                not_queued = self._shuffled([row for row in every if row not in queue])
                queue = [*queue, *not_queued, *self._shuffled(queue)]
            system1_rows, queue = queue[: self.per_step], queue[self.per_step :]
            # Mixed within the step, so that the last process or micro batch is not all of one kind.
            step = self._shuffled([*system2_rows[batch * size :][:size], *system1_rows])
            for _ in range(self.inner.repeat_count):
                yield from (row for row in step for _ in range(self.inner.mini_repeat_count))

    def _shuffled(self, rows: Sequence[int]) -> list[int]:
        return [rows[i] for i in torch.randperm(len(rows), generator=self.generator).tolist()]


class EpochSeededSampler(Sampler[int]):
    """A sampler whose order follows from the seed and the epoch alone.

    Checkpoints do not hold the state of a sampler's generator.
    """

    def __init__(self, inner: Any, trainer: Any) -> None:
        """inner: a sampler that draws from its `generator`."""
        self.inner, self.trainer = inner, trainer

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[int]:
        # int() alone would count 1.9999999 as epoch 1. Epochs are at most 10⁶ (`num_train_epochs`), so no two
        # pairs of seed and epoch have the same number.
        epoch = int(round(self.trainer.state.epoch or 0, 6))
        self.inner.generator.manual_seed(self.trainer.args.seed * 1_000_003 + epoch)
        return iter(self.inner)
