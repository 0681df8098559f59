"""The GRPO trainer: TRL's, with System 1 replay, shared prompts, its own rollouts and exact resume.

Import it where RL begins: TRL loads vLLM with GRPOTrainer if it is installed, see `building.trainer_class`.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import split_tensor_dict

from stages.config import RlSection
from stages.lora.grpo import zero_signal
from stages.lora.grpo.int8 import CORRECTION_MAX
from stages.lora.grpo.prompts import EpochSeededSampler, ReplaySampler, RlPrompts
from stages.lora.grpo.rollouts import Generated, RolloutSampler, ThoughtLimit
from stages.lora.training.trainer import ResumableTrainer
from stages.packing import support, trainer_inputs
from stages.prompts import answers

log = logging.getLogger(__name__)


class GrpoTrainer(ResumableTrainer, GRPOTrainer):
    """GRPOTrainer with replay, shared prompts and rollouts of our own.

    Its overrides stand in the order of a step: batch, rollouts, rewards, loss.
    """

    BATCH_KEYS = ("prompt_ids", "prompt_mask")
    _buffered_inputs: Any
    _selection: zero_signal.Selection | None = None
    """The completions that the current training pass computes; None if it computes all."""
    _corrected: dict[str, Any] | None = None
    """The inputs of the current training pass if its completions were sampled in 8 bits, else None."""
    _equal: Tensor
    """(groups,): whether the completions of a group of this step earned the same."""

    def __init__(
        self,
        rl: RlSection,
        prompts: RlPrompts,
        sampler: RolloutSampler,
        thought_limit: ThoughtLimit | None,
        rewards: list[Callable[..., Any]],
        arguments: GRPOConfig,
    ) -> None:
        """Train the model that `sampler` samples from, whose base then takes packed rows."""
        super().__init__(
            model=sampler.adapted,
            reward_funcs=rewards,
            args=arguments,
            train_dataset=prompts.rows,
            processing_class=sampler.renderer.tokenizer,
            row_ids=lambda: prompts.ids,
            memory_hint=f"rl.per_device_train_batch_size from {rl.per_device_train_batch_size}, "
            f"or rl.max_completion_length from {rl.max_completion_length}",
        )
        self.rl, self.prompts, self.sampler, self.thought_limit = rl, prompts, sampler, thought_limit
        self.prefix_sharing = rl.prefix_sharing == "auto"
        if self.prefix_sharing and support.has_active_dropout(sampler.adapted):
            self.prefix_sharing = False
            said = "with dropout each completion is computed with a prompt of its own; see rl.lora_dropout"
            log.warning(said)
        trainer_inputs.accept_packed(sampler.adapted.get_base_model())

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        order = super()._get_train_sampler(dataset)
        if self.rl.replay_prompts:
            order = ReplaySampler(order, self.prompts.replayed, self.rl.replay_prompts)
        return EpochSeededSampler(order, self)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """The next micro batch: whole groups where prompts are shared; TRL shuffles completions over all.

        Groups are ordered by length, except for bnpo, whose loss depends on what shares a micro batch.
        """
        if not self.prefix_sharing or not self.model.training or self.args.loss_type == "bnpo":
            return super()._prepare_inputs(generation_batch)
        slices = self.args.steps_per_generation
        if self._step % slices == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            batch = trainer_inputs.by_length(batch, self.args.num_generations)
            self._buffered_inputs = split_tensor_dict(batch, slices)
        inputs = self._buffered_inputs[self._step % slices]
        self.window.append(inputs)
        return inputs

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        batch = super()._generate_and_score_completions(inputs)  # here TRL computes the advantages
        if self.model.training:
            # TRL's counts no group without any reward; it has no signal either.
            self._metrics["train"]["frac_reward_zero_std"][-1] = self._equal.float().mean().item()
        return batch

    def _tokenize_prompts(self, prompts: list[str]) -> Any:
        # TRL would have the tokenizer add its special tokens to a rendered chat a second time.
        return [self.prompts.tokens[prompt] for prompt in prompts], None, {}

    def _generate(self, prompts: list[str]) -> Any:
        generated = super()._generate(prompts)
        if self.thought_limit is None:
            return generated
        # TRL trains no token under a zero of its tool mask, made for replies of tools.
        prompt_ids, ids, _, *rest = generated
        written = list(map(self.thought_limit.written, prompt_ids, ids))
        counts = [(float(0 in tokens), float(sum(tokens))) for tokens in written]
        counted = self.accelerator.gather(torch.tensor(counts, device=self.accelerator.device))
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["completions/closed_share"].append(counted[:, 0].mean().item())
        metrics["completions/mean_length"][-1] = counted[:, 1].mean().item()
        return prompt_ids, ids, written, *rest

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """Token ids of completions and their log-probabilities: by vLLM, or without these by `sampler`."""
        seed = f"{self.args.seed} rollouts {self.state.global_step} {self.accelerator.process_index}"

        def generate(prompts: list[list[int]], longest: int, of_round: str = "") -> Generated:
            if self.args.use_vllm:
                self.vllm_generation.max_completion_length = longest
                return super(GrpoTrainer, self)._generate_single_turn(prompts, *args, **kwargs)
            completions = self.sampler.sample(prompts, seed + of_round, longest)
            # Without 8 bits they are the policy's own, which the loss computes.
            logprobs = [c.logprobs for c in completions] if self.sampler.in_int8 else None
            return [c.ids for c in completions], logprobs

        if self.thought_limit is None:
            return generate(prompt_ids, self.rl.max_completion_length)
        return self.thought_limit.complete(prompt_ids, generate)

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: list[list[int]]
    ) -> Tensor:
        """Rewards of all processes, (completions, functions).

        What is logged of the rewards and lengths of all completions is logged for each system, too.
        """
        # TRL's own texts lack the tags of some thoughts.
        texts = [
            self.sampler.renderer.read(list(tokens), prompt)
            for prompt, tokens in zip(prompts, completion_ids_list, strict=True)
        ]
        rewards = super()._calculate_rewards(inputs, prompts, texts, completion_ids_list)
        if self.prompts.fast:
            answer_format = self.sampler.renderer.section.answer_format
            worked = [
                prompt in self.prompts.fast and answers.works_out(text, answer_format)
                for prompt, text in zip(prompts, texts, strict=True)
            ]
            at_most_0 = self.accelerator.gather(torch.tensor(worked, device=rewards.device))
            rewards[at_most_0] = rewards[at_most_0].clamp(max=0)
        totals = zero_signal.total_rewards(rewards, self.reward_weights)
        self._equal = zero_signal.equal_groups(totals, self.num_generations)
        if self.rl.replay_prompts and self.model.training:
            replayed = self.prompts.replayed_prompts
            is_system1 = torch.tensor([prompt in replayed for prompt in prompts], device=rewards.device)
            lengths = torch.tensor(list(map(len, completion_ids_list)), device=rewards.device)
            is_system1, lengths = self.accelerator.gather([is_system1, lengths])
            given = totals, is_system1, lengths.float(), self._equal, self.num_generations
            for name, value in zero_signal.metrics_by_system(*given):
                self._metrics["train"][name].append(value)
        return rewards

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss, from the completions with an advantage alone.

        All are computed where there is a KL term or a router's loss, and without shared prompts: TRL's way.
        """
        if self.sampler.in_int8:
            # TRL asks for the policy's log-probabilities before it reads the advantages, which they weigh.
            self._corrected = inputs = dict(inputs)
        if not self.prefix_sharing or self.beta or self.aux_loss_enabled:
            return super()._compute_loss(model, inputs)
        metrics = self._metrics["train"]
        self._selection = zero_signal.Selection.from_batch(inputs)
        metrics["completions_skipped"].append(1 - len(self._selection.rows) / len(inputs["advantages"]))
        try:
            with zero_signal.metrics_of_computed(metrics, self._selection):
                return super()._compute_loss(model, inputs)
        finally:
            self._selection = None

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        selection = self._selection
        if selection is None or len(selection.rows) == len(input_ids):
            passed = self._logprobs(model, input_ids, attention_mask, *args, **kwargs)
        else:
            ids, mask = input_ids[selection.rows], attention_mask[selection.rows]
            log_probs, entropies, _ = self._logprobs(model, ids, mask, *args, **kwargs)
            assert entropies is not None
            passed = *selection.expand(log_probs, entropies), None
        if self._corrected is not None:
            inputs, self._corrected = self._corrected, None
            # The policy's probability of each token over the sampler's, (completions, tokens). It is never
            # negative, so as a factor of the advantage it is that of the loss, clipped or not. Logged uncut.
            ratios = (passed[0].detach() - inputs["sampling_per_token_logps"]).exp()
            inputs["advantages"] = inputs["advantages"][:, None] * ratios.clamp(max=CORRECTION_MAX)
            largest = ratios[inputs["completion_mask"].bool()].max()
            self._metrics["train"]["sampling/raw_ratio/max"].append(largest.item())
        return passed

    def _logprobs(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities and entropies of completions, (rows, logits_to_keep) each; TRL's auxiliary loss.

        Packed passes (`completion_logprobs`) have no auxiliary loss, and zeros after the end of a completion,
        where TRL's own pass has arbitrary numbers. Without a gradient, for the reference and the policy that
        sampled, dropout is off, or equal models would seem to differ.
        """
        with nullcontext() if torch.is_grad_enabled() else support.eval_mode(self.model):
            packable = self.prefix_sharing and not compute_aux_loss
            if not (packable and self._supports_packing(model, input_ids, attention_mask)):
                return super()._get_per_token_logps_and_entropies(
                    model,
                    input_ids,
                    attention_mask,
                    logits_to_keep,
                    batch_size,
                    compute_entropy,
                    compute_aux_loss,
                    **kwargs,
                )
            outputs = []
            size = batch_size or len(input_ids)
            for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True):
                *values, computed = trainer_inputs.completion_logprobs(
                    model, ids, mask, logits_to_keep, self.temperature
                )
                if torch.is_grad_enabled():
                    self._metrics["train"]["tokens_saved"].append(1 - computed / ids.numel())
                outputs.append(values)
        log_probs, entropies = (torch.cat(tensors) for tensors in zip(*outputs, strict=True))
        return log_probs, entropies if compute_entropy else None, None

    def restore_counters(self) -> None:
        """A checkpoint falls between two generations, when no completion is in use."""
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        self._buffered_inputs = None
