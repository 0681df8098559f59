"""DAPO's dynamic sampling: before a step, groups without a signal are replaced by groups of others.

A group has no signal if all its completions earned the same reward: every advantage in it is zero. Groups of
replayed System 1 prompts are kept even so: they teach again as soon as the policy begins to fail them. The
new prompts follow from the seed and the step alone, so a resumed run draws the same.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from stages.lora.grpo.replay import equal_groups, total_rewards

if TYPE_CHECKING:
    from stages.lora.grpo.trainer import GrpoTrainer


@dataclass(frozen=True)
class Completions:
    """The completions of a step once every group has been replaced that could be."""

    ids: list[Any]
    logprobs: list[Any] | None
    """Those that vLLM told; None without vLLM."""
    rewards: Tensor
    """(completions of all processes, reward functions)"""


def replace_zero_signal_groups(
    trainer: GrpoTrainer, inputs: list[dict[str, Any]], attempts: int
) -> tuple[list[dict[str, Any]], Completions]:
    """Sample the completions of a step, and up to `attempts` times replace the groups without a signal.

    inputs: the rows of this process, one for each completion. Returns the rows in the end, and what is known
    of their completions. Rewards are asked for once more, for all completions, whenever groups are replaced.
    """
    group_size = trainer.num_generations
    ids, logprobs = trainer.sample(inputs, attempt=0)
    rewards = trainer.score(inputs, ids)
    unused: list[int] | None = None
    replaced = 0
    for attempt in range(1, attempts + 1):
        groups = _zero_signal_groups(trainer, inputs, rewards)
        if groups and unused is None:
            unused = _unused_prompts(trainer, inputs)
        groups = groups[: len(unused or ())]
        if not unused or not groups:
            break
        trainer._pending_extra_logs.clear()  # of completions that are dropped now
        trainer._pending_metrics.clear()
        changed: list[int] = []
        for group in groups:  # every process takes the same prompts from the list, also for others' groups
            row = trainer.train_dataset[unused.pop()]
            positions = _local_positions(trainer, group, len(inputs))
            changed += positions
            for position in positions:
                inputs[position] = row
        new_ids, new_logprobs = trainer.sample([inputs[position] for position in changed], attempt)
        for position, tokens, values in zip(changed, new_ids, new_logprobs, strict=True):
            ids[position], logprobs[position] = tokens, values
        # Rewards are gathered across processes, so all completions are scored again, but only those of the
        # new groups are taken. Both sides are (groups, completions of one, functions); the left one is a view
        # of `rewards`, (completions, functions), which the assignment fills.
        scored = trainer.score(inputs, ids).view(-1, group_size, rewards.shape[1])
        rewards.view(scored.shape)[groups] = scored[groups]
        replaced += len(groups)
    trainer._metrics["train"]["resampled/groups"].append(replaced)
    trainer._metrics["train"]["resampled/completions"].append(replaced * group_size)
    return inputs, Completions(ids, None if None in logprobs else logprobs, rewards)


def _zero_signal_groups(trainer: GrpoTrainer, inputs: list[dict[str, Any]], rewards: Tensor) -> list[int]:
    """Groups without a signal, counted over all processes, but for those of replayed prompts."""
    from accelerate.utils import gather_object

    prompts = gather_object([row["prompt"] for row in inputs])[:: trainer.num_generations]
    equal = equal_groups(total_rewards(rewards, trainer.reward_weights), trainer.num_generations).tolist()
    kept = trainer.prompts.replayed_prompts
    return [group for group, same in enumerate(equal) if same and prompts[group] not in kept]


def _unused_prompts(trainer: GrpoTrainer, inputs: list[dict[str, Any]]) -> list[int]:
    """Rows that are neither replayed nor in the step, in an order drawn for this step."""
    from accelerate.utils import gather_object

    in_step = set(gather_object([row["prompt"] for row in inputs]))
    system2_prompts = trainer.prompts.prompts[: trainer.prompts.system2_rows]
    rows = [row for row, prompt in enumerate(system2_prompts) if prompt not in in_step]
    random.Random(f"{trainer.args.seed} resample {trainer.state.global_step}").shuffle(rows)
    return rows


def _local_positions(trainer: GrpoTrainer, group: int, completions: int) -> list[int]:
    """Positions of a group's completions among those of this process, which has `completions` of them."""
    # The group's first completion, counted from the first one of this process: each process holds
    # `completions` of them in a row. It is negative, or too large, for groups of other processes.
    first = group * trainer.num_generations - trainer.accelerator.process_index * completions
    return [i for i in range(first, first + trainer.num_generations) if 0 <= i < completions]
