"""Groups of completions without a signal: all earned the same reward, so that every advantage is zero.

DAPO's dynamic sampling replaces them by groups of other prompts before a step. Groups of replayed System 1
prompts are kept even so: they teach again as soon as the policy begins to fail them. The new prompts follow
from the seed and the step alone, so a resumed run draws the same.

What is left of them costs only its sampling: training passes skip completions with zero advantage, which
contribute no gradient. Each supported loss is Σᵢ fᵢ · Aᵢ / n, plus the KL term if there is one. Without it, a
completion with Aᵢ = 0 adds exactly zero, and the normaliser n counts all completions, skipped ones included.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from torch import Tensor

from stages.lora.grpo.metrics import equal_groups, total_rewards

if TYPE_CHECKING:
    from stages.lora.grpo.trainer import GrpoTrainer


PASS_METRICS = ("entropy", "tokens_saved")
"""Metrics that TRL and `GrpoTrainer._logprobs` log in a training pass, of the rows that it computes."""


Completions = tuple[list[Any], list[Any] | None, Tensor]
"""Token ids, log-probabilities that vLLM told (None without vLLM), and rewards.

Rewards are those of all processes, (completions, reward functions).
"""


def replace_zero_signal_groups(
    trainer: GrpoTrainer, inputs: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], Completions]:
    """Sample the completions of a step; up to `rl.dynamic_sampling` times replace groups without a signal.

    inputs: the rows of this process, one for each completion. Returns the rows in the end, and what is known
    of their completions. Rewards are asked for once more, for all completions, whenever groups are replaced.
    """
    group_size = trainer.num_generations
    ids, logprobs = trainer.sample(inputs, attempt=0)
    rewards = trainer.score(inputs, ids)
    unused: list[int] | None = None
    replaced = 0
    for attempt in range(1, trainer.rl.dynamic_sampling + 1):
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
    return inputs, (ids, None if None in logprobs else logprobs, rewards)


def _zero_signal_groups(trainer: GrpoTrainer, inputs: list[dict[str, Any]], rewards: Tensor) -> list[int]:
    """Groups without a signal, counted over all processes, but for those of replayed prompts."""
    prompts = gather_object([row["prompt"] for row in inputs])[:: trainer.num_generations]
    equal = equal_groups(total_rewards(rewards, trainer.reward_weights), trainer.num_generations).tolist()
    kept = trainer.prompts.replayed_prompts
    return [group for group, same in enumerate(equal) if same and prompts[group] not in kept]


def _unused_prompts(trainer: GrpoTrainer, inputs: list[dict[str, Any]]) -> list[int]:
    """Rows that are neither replayed nor in the step, in an order drawn for this step."""
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


@dataclass(frozen=True)
class Selection:
    """The rows of a micro batch that a training pass computes."""

    rows: Tensor
    """(computed,), in order."""
    written: Tensor
    """(rows, tokens): 1 for each token that the model wrote, 0 for padding and what closed its thought."""
    old_logprobs: Tensor | None
    """Log-probabilities at sampling, (rows, tokens), the policy's or the sampler's, if they are known."""
    has_gradient: bool
    """False if every advantage is zero."""

    @classmethod
    def from_batch(cls, inputs: dict[str, Any]) -> Selection:
        rows = inputs["advantages"].nonzero().flatten()
        written = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        # If no row has an advantage, compute the shortest one as a stand-in, whose gradient is zero: every
        # process has to join the backward pass, or DDP hangs.
        computed = rows if len(rows) else inputs["completion_mask"].sum(1).argmin()[None]
        sampled = inputs.get("old_per_token_logps", inputs.get("sampling_per_token_logps"))
        return cls(computed, written, sampled, len(rows) > 0)

    def expand(self, log_probs: Tensor, entropies: Tensor) -> tuple[Tensor, Tensor]:
        """Extend values of the computed rows, (computed, tokens) each, to all rows, (rows, tokens) each.

        A skipped row gets its old log-probabilities, so that its ratio is 1; if they are None, TRL takes the
        policy's own instead, and zeros give the ratio 1, too. It gets the mean entropy of the computed
        tokens, so that the mean that TRL logs does not change.
        """
        shape, written = self.written.shape, self.written[self.rows]
        skipped = log_probs.new_zeros(shape) if self.old_logprobs is None else self.old_logprobs
        mean = (entropies * written).sum() / written.sum().clamp(min=1)
        return (
            skipped.index_copy(0, self.rows, log_probs),
            mean.expand(shape).index_copy(0, self.rows, entropies),
        )


@contextmanager
def metrics_of_computed(metrics: dict[str, list[float]], selection: Selection) -> Iterator[None]:
    """Context of a training pass: undo what it logs in PASS_METRICS if it computed only a stand-in row."""
    logged = {name: list(metrics[name]) for name in PASS_METRICS if name in metrics}
    yield
    if not selection.has_gradient:
        for name in PASS_METRICS:
            metrics.pop(name, None)  # an empty list would be logged as None
        metrics.update(logged)
