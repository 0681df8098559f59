"""Groups of GRPO that could teach nothing are drawn again before a step, with other prompts."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from torch import Tensor

from stages.lora.grpo.replay import equal_groups, summed

if TYPE_CHECKING:
    from stages.lora.grpo.prompts import RlPrompts


class Resampling:
    """Mixin for GRPOTrainer, to stand before the class that samples.

    Set `pool` and `attempts` before `train`.
    A group has nothing to teach if its completions earned the same. If it is of a prompt that is replayed, it
    stays: it is there to teach once it fails. The new prompts follow from the seed and the step alone, so a
    resumed run draws the same. Rewards are asked once more, for all completions, whenever a step draws again.
    """

    pool: RlPrompts
    attempts: int
    """How many times a step may draw again."""
    attempt = 0
    """What is sampled now: 0 is the step's first draw."""
    accelerator: Any
    args: Any
    model: Any
    num_generations: int
    reward_weights: Tensor
    state: Any
    train_dataset: Any
    processing_class: Any
    _metrics: Any
    _pending_extra_logs: Any
    _pending_metrics: Any
    _ready: tuple[list[Any], list[Any] | None, Tensor] | None = None
    """Completions of the step, their log-probabilities and rewards, for TRL's methods that ask for them."""

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        if self.attempts and self.model.training:
            inputs = self._drawn_again(list(inputs))
        return super()._generate_and_score_completions(inputs)  # type: ignore[misc]

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **given: Any) -> Any:
        if self._ready is None:
            return super()._generate_single_turn(prompt_ids, *args, **given)  # type: ignore[misc]
        return self._ready[:2]

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids: Any) -> Tensor:
        ready, self._ready = self._ready, None
        if ready is not None:
            return ready[2]
        return super()._calculate_rewards(  # type: ignore[misc, no-any-return]
            inputs, prompts, completions, completion_ids
        )

    def _drawn_again(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows of the step in the end; `_ready` then has what is known of them."""
        ids, chances = self._sampled(inputs, range(len(inputs)))
        rewards = self._rewards(inputs, ids)
        spare: list[int] | None = None
        drawn = 0
        for attempt in range(1, self.attempts + 1):
            again = self._to_draw(inputs, rewards)
            if again and spare is None:
                spare = self._spare(inputs)
            again = again[: len(spare or ())]
            if not spare or not again:
                break
            self._pending_extra_logs.clear()  # of completions that are dropped now
            self._pending_metrics.clear()
            self.attempt, changed = attempt, []
            for group in again:
                row = self.train_dataset[spare.pop()]
                places = self._local(group, len(inputs))
                changed += places
                for place in places:
                    inputs[place] = row
            for place, new, chance in zip(changed, *self._sampled(inputs, changed), strict=True):
                ids[place], chances[place] = new, chance
            # All are asked for, because processes add theirs together; what is kept keeps its first reward.
            found = self._rewards(inputs, ids).view(-1, self.num_generations, rewards.shape[1])
            rewards.view(found.shape)[again] = found[again]
            drawn += len(again)
        self.attempt = 0
        self._ready = ids, (None if None in chances else chances), rewards
        self._metrics["train"]["resampled/groups"].append(drawn)
        self._metrics["train"]["resampled/completions"].append(drawn * self.num_generations)
        return inputs

    def _sampled(self, inputs: list[dict[str, Any]], places: Any) -> tuple[list[Any], list[Any]]:
        """Completions for the prompts at these places, and log-probabilities, each None without vLLM."""
        if not len(places):
            return [], []
        prompts, *fields = self._tokenize_prompts([inputs[place]["prompt"] for place in places])  # type: ignore[attr-defined]
        ids, chances = super()._generate_single_turn(prompts, *fields, self.num_generations)  # type: ignore[misc]
        return list(ids), list(chances or [None] * len(ids))

    def _rewards(self, inputs: list[dict[str, Any]], ids: list[Any]) -> Tensor:
        """(completions, functions), of all processes."""
        texts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
        prompts = [row["prompt"] for row in inputs]
        return super()._calculate_rewards(inputs, prompts, texts, ids)  # type: ignore[misc, no-any-return]

    def _to_draw(self, inputs: list[dict[str, Any]], rewards: Tensor) -> list[int]:
        """Groups that can teach nothing, counted over all processes."""
        from accelerate.utils import gather_object

        prompts = gather_object([row["prompt"] for row in inputs])[:: self.num_generations]
        equal = equal_groups(summed(rewards, self.reward_weights), self.num_generations).tolist()
        return [
            i
            for i, (p, same) in enumerate(zip(prompts, equal, strict=True))
            if same and not self.pool.is_replayed(p)
        ]

    def _spare(self, inputs: list[dict[str, Any]]) -> list[int]:
        """Rows that are not replayed and not in the step, in an order drawn for this step."""
        from accelerate.utils import gather_object

        used = set(gather_object([row["prompt"] for row in inputs]))
        spare = [i for i, text in enumerate(self.pool.prompts[: self.pool.slow]) if text not in used]
        random.Random(f"{self.args.seed} resample {self.state.global_step}").shuffle(spare)
        return spare

    def _local(self, group: int, rows: int) -> list[int]:
        """The places in this process's `rows` completions that belong to a group."""
        first = group * self.num_generations - self.accelerator.process_index * rows
        return [i for i in range(first, first + self.num_generations) if 0 <= i < rows]
