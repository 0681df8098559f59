"""The prompts that RL draws from: System 2 rows, and System 1 rows that are replayed or held out."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from stages.config import RlSection
from stages.errors import DataError
from stages.prompts.renderer import Renderer
from stages.records import Example, Labelled, decided, of_system, problems
from stages.rewards import loading

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RlPrompts:
    """Rendered prompts and what rewards read of their rows."""

    rows: Dataset
    """Those to train on, with the text of the prompt and the columns that rewards read. The last `replayed`
    ones are of System 1."""
    tokens: dict[str, list[int]]
    """Text of a prompt → token ids."""
    ids: dict[tuple[int, ...], str]
    """Token ids of a prompt → id of its row."""
    replayed: int
    held_out: list[list[int]]
    """Token ids of System 1 prompts that RL never trains on."""
    long: int
    """How many prompts to train on are too long."""
    encoded: frozenset[str]
    """Columns that hold JSON, because their values have several types, or are lists or objects."""

    @property
    def slow(self) -> int:
        """How many rows are not replayed ones."""
        return len(self.rows) - self.replayed

    @cached_property
    def prompts(self) -> list[str]:
        """The text of each row's prompt."""
        return list(self.rows["prompt"])

    @cached_property
    def _fast(self) -> frozenset[str]:
        return frozenset(self.prompts[self.slow :])

    def is_replayed(self, prompt: str) -> bool:
        """Whether a prompt, by its text, is one of System 1 that is replayed."""
        return prompt in self._fast

    @classmethod
    def of(
        cls,
        labels: list[Labelled],
        renderer: Renderer,
        rl: RlSection,
        functions: dict[str, Callable[..., Any]],
        seed: int,
    ) -> RlPrompts:
        """functions: the rewards by name.

        DataError if a row to train on lacks a column that a reward reads, or if rows are too few. A System 1
        row that lacks one is not replayed.
        """
        from datasets import Dataset

        needed = {name: loading.columns(name, function) for name, function in functions.items()}
        columns = {column for wanted in needed.values() for column in wanted}
        examples = of_system(labels, 2) if rl.data == "system2" else decided(labels)
        trained = [_row(example, renderer) for example in examples]
        loading.require(needed, trained)
        fast = [_row(row.example, renderer) for row in labels if row.system == 1 and rl.data == "system2"]
        # Of one question there may be rows with several responses, and even with both labels.
        other = {row["question"] for row in trained}
        fast = list({row["prompt"]: row for row in fast if row["question"] not in other}.values())
        tokens = {row["prompt"]: renderer.ids(row["prompt"]) for row in trained + fast}
        kept, long = _fitting(trained, tokens, rl)
        if rl.replayed or rl.too_long != "error":
            fast, long_fast = _fitting(fast, tokens, rl)
            long += long_fast if rl.replayed else 0
        else:  # no reason to stop: only the drift is measured on them
            fast = [row for row in fast if len(tokens[row["prompt"]]) <= rl.max_prompt_length]
        random.Random(f"{seed} held out").shuffle(fast)
        held_out, fast = fast[: rl.kl_probe_prompts], fast[rl.kl_probe_prompts :]
        replayed = [row for row in fast if all(row.get(name) is not None for name in columns)]
        replayed = replayed if rl.replayed else []
        _enough(kept, replayed, rl, long)
        used = kept + replayed
        if large := loading.beyond(used, columns):
            raise DataError(f"numbers of more than 64 bits, for a reward, in {', '.join(sorted(large))}")
        there = set().union(*used)
        asked = there & set().union(*(loading.named(function) for function in functions.values()))
        read = {"prompt", "question", *columns} | loading.optional(used) | asked
        as_json = loading.encoded(used, read)
        return cls(
            rows=Dataset.from_list(
                [{n: json.dumps(row.get(n)) if n in as_json else row.get(n) for n in read} for row in used]
            ),
            tokens=tokens,
            ids={tuple(tokens[row["prompt"]]): row["id"] for row in used},
            replayed=len(replayed),
            held_out=[tokens[row["prompt"]] for row in held_out],
            long=long,
            encoded=as_json,
        )


def _row(example: Example, renderer: Renderer) -> dict[str, Any]:
    """The fields that a reward may read, and the text of the prompt."""
    return {
        **example.extra,
        "id": example.id,
        "question": example.prompt,
        "gold": example.gold,
        "response": example.response,
        "answer_format": renderer.section.answer_format,
        "prompt": renderer.prompt(example.prompt, of=example),
    }


def _fitting(
    rows: list[dict[str, Any]], tokens: dict[str, list[int]], rl: RlSection
) -> tuple[list[dict[str, Any]], int]:
    """The rows to train on, and the number of rows whose prompt is too long.

    `rl.too_long` says whether those are an error, are left out, or are cut, which changes `tokens`.
    """
    kept = [row for row in rows if len(tokens[row["prompt"]]) <= rl.max_prompt_length]
    long = len(rows) - len(kept)
    if long and rl.too_long == "error":
        lengths = {row["id"]: len(tokens[row["prompt"]]) for row in rows}
        raise problems(
            f"longer than rl.max_prompt_length {rl.max_prompt_length}",
            [
                f"{name} has {length} tokens"
                for name, length in lengths.items()
                if length > rl.max_prompt_length
            ],
            "raise it, or --set rl.too_long=drop (or truncate_left)",
        )
    if long:
        log.warning(
            "%d of %d prompts are longer than rl.max_prompt_length %d", long, len(rows), rl.max_prompt_length
        )
    if rl.too_long == "truncate_left":
        tokens.update({row["prompt"]: tokens[row["prompt"]][-rl.max_prompt_length :] for row in rows})
        return rows, long
    return kept, long


def _enough(kept: list[dict[str, Any]], replayed: list[dict[str, Any]], rl: RlSection, long: int) -> None:
    """DataError unless one step can be filled."""
    wanted = rl.prompts_per_step - rl.replayed
    if len(kept) < wanted:
        raise DataError(
            f"{len(kept)} RL prompts ({long} too long) are fewer than the {wanted} of a step",
            "lower rl.prompts_per_step, raise rl.max_prompt_length, or bring more System 2 rows",
        )
    if len(replayed) < rl.replayed:
        raise DataError(
            f"{len(replayed)} System 1 rows can be replayed, fewer than the {rl.replayed} of a step",
            "they need the fields that the rewards read, short prompts, and rl.kl_probe_prompts are held "
            "out; lower rl.system1_share",
        )
