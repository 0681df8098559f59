"""How far RL has moved on System 1 prompts that it never trains on: a KL divergence every few steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from stages.packing.support import eval_mode

if TYPE_CHECKING:
    from stages.config import RlSection
    from stages.lora.grpo.sampler import RolloutSampler

NAME = "system1/kl_from_start"
"""In the history: KL(start ‖ policy) in nats per token."""


class KlProbe(TrainerCallback):
    """Logs KL(start ‖ policy), where start is the policy at the time this is built.

    It is estimated on one answer by the start to each prompt: the mean over their tokens of r − 1 − log r,
    where r is the policy's probability over the start's (http://joschu.net/blog/kl-approx.html). Both are
    distributions as rollouts are sampled from: at `rl.temperature`, and for the answers cut by `rl.top_p` and
    `rl.top_k`. It draws no number of the trainer's, and changes nothing.
    """

    def __init__(
        self,
        trainer: Any,
        prompts: list[list[int]],
        writer: RolloutSampler,
        rl: RlSection,
    ) -> None:
        self.trainer, self.every, self.batch = trainer, rl.kl_probe_steps, rl.per_device_train_batch_size
        with trainer.memory("while the drift was prepared"), eval_mode(writer.adapted):
            answers = writer.sample(prompts, f"{trainer.args.seed} drift")  # the same in every process
            self.ids, self.mask, self.keep = _padded(prompts, answers, trainer.accelerator.device)
            self.start = self._log_probs()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            self.trainer._metrics["train"][NAME].append(self.divergence())

    def divergence(self) -> float:
        change = (self._log_probs() - self.start)[self.mask[:, -self.keep :].bool()]
        return float((change.expm1() - change).mean())

    @torch.no_grad()
    def _log_probs(self) -> Tensor:
        """(prompts, longest answer); any number behind the end of an answer."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        with eval_mode(model):
            found, *_ = self.trainer._get_per_token_logps_and_entropies(
                model, self.ids, self.mask, self.keep, self.batch
            )
        return found.float()  # type: ignore[no-any-return]


def _padded(
    prompts: list[list[int]], answers: list[list[int]], device: torch.device
) -> tuple[Tensor, Tensor, int]:
    """Token ids and mask, (prompts, longest prompt + longest answer), and the longest answer's length."""
    before, keep = max(map(len, prompts)), max(map(len, answers))
    ids = torch.zeros(len(prompts), before + keep, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        at = slice(before - len(prompt), before + len(answer))
        ids[row, at] = torch.tensor(prompt + answer, device=device)
        mask[row, at] = 1
    return ids, mask, keep
