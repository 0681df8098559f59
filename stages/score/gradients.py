"""Gradients of GRPO at an adapter that does not move, for scorers of the elements that RL is to train."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from stages.errors import UnusableResult
from stages.lora.adapter import adapter
from stages.lora.importance.scorers import Moments
from stages.lora.training import loop
from stages.lora.training.health import ProgressCallback

if TYPE_CHECKING:
    from torch import nn

    from stages.config import LaunchSection, RlSection
    from stages.lora.grpo.building import Grpo

BATCHES = 8
"""Batches of completions, each as large as a step of RL."""
SHOWN = {"reward": "reward", "frac_reward_zero_std": "groups without signal"}
"""Metrics on the progress line, and their names there."""


def without_updates(rl: RlSection, launch: LaunchSection) -> RlSection:
    """RL's settings, changed to run BATCHES steps that move no element, in the processes of `launch`."""
    # AdamW multiplies each step by the rate: without weight decay, a rate of 0 leaves every bit as it is.
    # More than one pass over a batch would sum the same gradient twice.
    still = {"learning_rate": 0.0, "weight_decay": 0.0, "loraplus_lr_ratio": None, "num_iterations": 1}
    # An epoch has at least one step, so BATCHES epochs have enough, and max_steps ends them.
    length = {"max_steps": BATCHES, "num_train_epochs": BATCHES}
    # The steps that RL keeps are later than these, and `building.optimizer_steps` would refuse them.
    unused = {"keep_steps": [], "report_to": [], "launch": launch}
    return rl.model_copy(update={**still, **length, **unused})


def measure(run: Grpo) -> tuple[dict[str, nn.Linear], Moments, dict[str, float]]:
    """Sum the gradients of GRPO's loss, and their squares, over BATCHES batches; and what these earned.

    run: with the settings of `without_updates`. A gradient is what RL's optimizer would get: of a whole step,
    clipped to `rl.max_grad_norm`. One tensor per LoRA weight, of the weight's full shape. Returns the LoRA
    layers, too. UnusableResult if no completion had an advantage.
    """
    trainer = run.build()
    layers = adapter.lora_layers(trainer.model)
    loop.refuse_untested(trainer)
    run.start.restore(trainer.model)
    # Nothing is packed: every element of the adapter gets a gradient, so that any may be chosen.
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    sums = Moments.of_no_example(layers)
    # A checkpoint would hold nothing but SFT's adapter, and the sums are not in it.
    trainer.args.save_strategy = SaveStrategy.NO
    trainer.remove_callback(PrinterCallback)
    title = f"score System 2 by RL's gradients, {run.prompts.system2_rows} prompts"
    # Patience above the number of steps: batches without a signal count as zeros, and do not end the run.
    trainer.add_callback(ProgressCallback(run.context.progress, title, SHOWN, BATCHES + 1))
    trainer.add_callback(_GradientSums(layers, sums))
    trainer.train()
    if not any(bool(square.any()) for square in sums.square.values()):
        raise UnusableResult(
            f"in {sums.examples} batches no group of completions had unequal rewards",
            "raise rl.num_generations or sft.system2_share, or leave out rl.rescore",
        )
    rewards = [row["reward"] for row in loop.history(trainer) if "reward" in row]
    return layers, sums, {"batches": sums.examples, **({"mean_reward": fmean(rewards)} if rewards else {})}


class _GradientSums(TrainerCallback):
    """Adds the gradient of each step to the sums, after all processes have averaged it."""

    def __init__(self, layers: dict[str, nn.Module], sums: Moments) -> None:
        self.layers, self.sums = layers, sums

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for name, layer in self.layers.items():
            # A batch without any advantage gives no gradient, or zeros. It counts in `examples` all the
            # same, so it lowers the mean.
            if layer.weight.grad is not None:
                gradient = layer.weight.grad.detach().float()
                self.sums.gradient[name] += gradient
                # The square of a whole batch's gradient: its noise is that of a step of RL.
                self.sums.square[name] += gradient.square()
        self.sums.examples += 1
