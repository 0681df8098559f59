"""KL probe: how far RL has moved on System 1 prompts that it never trains on, every few steps."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from stages.lora.adapter import fsdp
from stages.lora.training.curves import KL_FROM_START
from stages.packing.batch import padded
from stages.packing.support import eval_mode

if TYPE_CHECKING:
    from stages.lora.grpo.trainer import GrpoTrainer


class KlProbe(TrainerCallback):
    """Logs KL(start ‖ policy), where start is the policy at the time this is built.

    The start answers each prompt once, sampled like a rollout (`rl.temperature`, `rl.top_p`, `rl.top_k`). The
    estimate is the mean over the answers' tokens of r − 1 − log r, where r is the policy's probability over
    the start's, both at `rl.temperature` (http://joschu.net/blog/kl-approx.html). Sampling uses a random
    generator of its own, so the trainer's results do not change.
    """

    def __init__(self, trainer: GrpoTrainer) -> None:
        self.trainer, prompts, sampler = trainer, trainer.prompts.held_out, trainer.sampler
        with trainer.memory("while the drift was prepared"):
            with fsdp.unsharded(trainer.model):
                # The same in every process, and the start's own: 8 bits would sample from another model.
                completions = replace(sampler, in_int8=False).sample(prompts, f"{trainer.args.seed} drift")
            # Prompts end and answers begin in one column, as TRL has them.
            prompt_ids, prompt_mask = padded(prompts, 0, trainer.accelerator.device)
            answer_ids, answer_mask = padded(
                [completion.ids for completion in completions], 0, trainer.accelerator.device, "right"
            )
            self.ids = torch.cat([prompt_ids, answer_ids], 1)
            self.mask = torch.cat([prompt_mask, answer_mask], 1)
            self.keep = answer_ids.shape[1]
            self.start = self._log_probs()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.trainer.rl.kl_probe_steps == 0 or state.global_step >= state.max_steps:
            self.trainer._metrics["train"][KL_FROM_START].append(self.divergence())

    def divergence(self) -> float:
        """Mean KL(start ‖ policy) per token, in nats."""
        with self.trainer.memory("while the drift was measured"):
            on_answers = self.mask[:, -self.keep :].bool()  # (prompts, longest answer)
            log_ratio = (self._log_probs() - self.start)[on_answers]  # (answer tokens,)
        # r − 1 − log r is never negative, and of lower variance than −log r. Its expectation over the start's
        # own tokens is KL(start ‖ policy), because E[r] = 1. `rl.top_p` and `rl.top_k` cut the distribution
        # that the answers are drawn from, so with them the estimate is biased.
        return float((log_ratio.expm1() - log_ratio).mean())

    @torch.no_grad()
    def _log_probs(self) -> Tensor:
        """(prompts, longest answer); any number behind the end of an answer."""
        model = self.trainer.model
        with eval_mode(model):
            log_probs, *_ = self.trainer._get_per_token_logps_and_entropies(
                model, self.ids, self.mask, self.keep, self.trainer.args.per_device_train_batch_size
            )
        return log_probs.float()  # type: ignore[no-any-return]
