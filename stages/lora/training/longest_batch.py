"""The longest micro batch first: a lack of memory shows in the first seconds, not after hours."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from stages.engines.continuous_batching import padded

if TYPE_CHECKING:
    from stages.config import RlSection
    from stages.prompts.renderer import Row


class LongestBatch(TrainerCallback):
    """Forward and backward pass through the longest micro batch before step 1, without an update.

    No weight, metric or random state changes. A resumed run skips it.
    """

    def __init__(self, trainer: Any, loss: Callable[[], Tensor], title: str) -> None:
        """loss: computes the loss of that micro batch. title: names it in an error message."""
        self.trainer, self.loss, self.title = trainer, loss, title

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step:
            return
        trainer = self.trainer
        trainer.model.train()
        with (
            trainer.memory(f"in the longest micro batch, {self.title}"),
            torch.random.fork_rng(),
            trainer.accelerator.no_sync(trainer.model_wrapped),
        ):
            trainer.accelerator.backward(self.loss())
        trainer.model.zero_grad()
        trainer._metrics["train"].clear()


def longest_of_sft(trainer: Any, rows: list[Row], size: int) -> LongestBatch:
    """Dry run on the longest rows. size: rows per micro batch."""
    from accelerate.utils import send_to_device

    longest = sorted(rows, key=lambda row: len(row.input_ids))[-size:]

    def loss() -> Tensor:
        batch = trainer.data_collator([{"input_ids": r.input_ids, "labels": r.labels} for r in longest])
        inputs = send_to_device(batch, trainer.accelerator.device)
        value: Tensor = trainer.compute_loss(trainer.model_wrapped, inputs)
        trainer._total_train_tokens = 0  # compute_loss counts tokens
        return value

    return LongestBatch(trainer, loss, f"{len(longest)} rows of up to {len(longest[-1].input_ids)} tokens")


def longest_of_rl(trainer: Any, prompts: list[list[int]], rl: RlSection) -> LongestBatch:
    """Dry run on the longest prompts, with completions of `rl.max_completion_length` tokens."""
    groups = math.ceil(rl.per_device_train_batch_size / rl.num_generations)
    longest = sorted(prompts, key=len)[-groups:]
    rows = [ids for ids in longest for _ in range(rl.num_generations)][: rl.per_device_train_batch_size]
    width = len(longest[-1])

    def loss() -> Tensor:
        # Completions repeat their prompt, because the check in `supports_packing` compares real text.
        texts = [prompt * (1 + math.ceil(rl.max_completion_length / len(prompt))) for prompt in rows]
        sequences = [
            ids[: len(prompt) + rl.max_completion_length] for ids, prompt in zip(texts, rows, strict=True)
        ]
        ids, mask = padded(sequences, 0, trainer.accelerator.device)
        log_probs, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model_wrapped, ids, mask, rl.max_completion_length, compute_entropy=True
        )
        return log_probs.sum()  # type: ignore[no-any-return]

    return LongestBatch(
        trainer,
        loss,
        f"{len(rows)} completions of {rl.max_completion_length} tokens, prompts of up to {width}",
    )
