"""Settings of GRPO and of how its completions are sampled."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from stages.config.evaluation import SandboxSection
from stages.config.fields import (
    Section,
    ShareBelowOne,
    WithoutFalse,
    advanced,
    advanced_unkeyed,
    as_value_error,
    setting,
    unkeyed,
)
from stages.config.training import DROPOUT, SAVE_STEPS, WARMUP, AutoOff, TrainSection


class RolloutsSection(Section):
    engine: Literal["transformers", "vllm_colocate"] = setting("transformers")
    """What samples the completions: the trainer itself, or vLLM on its GPU."""
    batch_size: PositiveInt = unkeyed(64)
    """Completions that engine transformers samples at a time; halved if memory runs out."""
    int8: bool = advanced(False)
    """On a CPU in float32, sample in 8 bits, faster, and correct the loss for it."""
    gpu_memory_utilization: float | None = unkeyed(None, gt=0, lt=1)
    """Share of the GPU's memory for vLLM; none: what it needs."""
    correction: Literal["sequence_mask", "sequence_truncate", "token_mask", "token_truncate", "none"] = (
        advanced("sequence_mask")
    )
    """Mask or truncate large ratios of the trainer's probabilities to vLLM's."""

    def conflicts(self, registries: Mapping[str, Any]) -> Iterator[str]:
        if self.int8 and self.engine != "transformers":
            yield f"int8 goes with engine transformers; {self.engine} has vLLM's own quantization"


class RlSection(TrainSection):
    start_from: Literal["sft", "init"] = advanced("sft")
    """Adapter to start from: that of SFT's last round, or the initial one."""
    learning_rate: PositiveFloat = setting(5e-6, "Peak learning rate; the default is the paper's.")
    warmup_ratio: ShareBelowOne = advanced(0.1, WARMUP)
    weight_decay: NonNegativeFloat = advanced(0.1, "Weight decay.")
    max_grad_norm: PositiveFloat = advanced(0.1, "Norm to which gradients are clipped.")
    data: Literal["system2", "all"] = setting("system2", "Rows to train on; undecided ones are never used.")
    prompts_per_step: PositiveInt = setting(32, "Prompts per optimizer step.")
    system1_share: ShareBelowOne = setting(0.0)
    """Share of prompts_per_step that are System 1 rows, replayed so that RL does not unlearn them."""
    num_generations: int = setting(8, "Completions per prompt (group size).", gt=1)
    per_device_train_batch_size: PositiveInt = setting(8)
    """Completions per pass; must divide prompts_per_step × num_generations."""
    prefix_sharing: AutoOff = advanced("auto")
    """auto: a prompt once for all its completions, where the model allows it; off: TRL's way."""
    temperature: PositiveFloat = setting(1.0, "Sampling temperature (the paper: 0.9).")
    top_k: NonNegativeInt = advanced(0, "Most likely tokens to sample from (the paper: 50); 0: all.")
    max_prompt_length: PositiveInt = setting(128, "Longest prompt in tokens.")
    too_long: Literal["drop", "truncate_left"] = advanced("drop")
    """What to do with prompts longer than max_prompt_length; truncate_left keeps their end."""
    max_completion_length: PositiveInt = setting(256, "Longest completion in tokens.")
    max_thinking_length: PositiveInt | None = advanced(None)
    """Tokens after which an open thought is closed; none: it may take all."""
    beta: NonNegativeFloat = setting(0.0, "β: weight of the KL term (the paper: 0.04); 0: no KL term.")
    kl_reference: Literal["auto", "base", "sft"] = advanced("auto")
    """Model that the KL term holds on to; auto: sft if RL starts there."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = setting("dapo")
    """How token losses are averaged, as in TRL (the paper: grpo)."""
    rewards: Annotated[dict[str, float], WithoutFalse] = setting({"correctness": 2.0}, min_length=1)
    """Reward functions and their weights: of `lorapar list rewards` or of rewards_file."""
    rewards_file: str | None = unkeyed(None, "Python file with your own rewards, with TRL's signature.")
    sandbox: SandboxSection = advanced_unkeyed(SandboxSection(), "Sandbox of rewards that run code.")
    rollouts: RolloutsSection = setting(RolloutsSection(), "How completions are sampled.")
    lora_dropout: ShareBelowOne = advanced(0.0, DROPOUT)
    save_steps: PositiveInt = advanced_unkeyed(5, SAVE_STEPS)
    max_zero_signal_steps: PositiveInt = advanced_unkeyed(20)
    """Stop after this many steps in a row in which no group's rewards differ."""

    def conflicts(self, registries: Mapping[str, Any]) -> Iterator[str]:
        if (self.prompts_per_step * self.num_generations) % self.per_device_train_batch_size:
            yield (
                f"per_device_train_batch_size {self.per_device_train_batch_size} does not divide "
                f"{self.prompts_per_step} × {self.num_generations}"
            )
        if not any(self.rewards.values()):
            yield "rewards: every weight is 0, so no completion earns anything"
        if self.kl_reference == "sft" and self.start_from != "sft":
            yield f"kl_reference sft goes with start_from sft, got start_from {self.start_from}"
        if self.system1_share and self.data == "all":
            yield "system1_share goes with data system2; data all draws from both systems"
        if self.system1_share and not 0 < self.replay_prompts < self.prompts_per_step:
            yield (
                f"system1_share {self.system1_share} of {self.prompts_per_step} prompts is "
                f"{self.replay_prompts}; a step needs at least one prompt of each system"
            )
        rollouts = self.rollouts
        with_vllm = rollouts.engine != "transformers" and rollouts.correction != "none"
        if self.top_k and (with_vllm or rollouts.int8):
            sampler, remedy = ("vLLM", "correction: none") if with_vllm else ("int8", "int8: false")
            yield (
                f"top_k {self.top_k} with rollouts by {sampler}: the correction would compare probabilities "
                f"of the cut distribution with the trainer's; leave it at 0, or set rollouts.{remedy}"
            )
        if rollouts.int8 and self.lora_dropout:
            yield f"rollouts.int8 goes with lora_dropout 0, got {self.lora_dropout}"
        for name in self.rewards if registries else ():
            as_value_error(partial(registries["rewards"].check, name, self.rewards_file))

    @property
    def replay_prompts(self) -> int:
        return round(self.system1_share * self.prompts_per_step)
