"""Learning rates: separate ones for A and B, and those of the warm-up steps."""

from __future__ import annotations

from typing import Any


class LoraPlus:
    """Mixin, to stand before a Trainer among the base classes: B learns `ratio` times as fast as A.

    LoRA+, arXiv 2402.12354. A and B are told apart by parameter name, because PEFT's own helper takes every
    one-dimensional parameter for a B, and packed weights are one-dimensional.
    """

    ratio: float | None = None
    model: Any

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if self.ratio is None:
            return optimizer
        second = {id(parameter) for name, parameter in self.model.named_parameters() if ".lora_B." in name}
        groups = []
        for group in optimizer.param_groups:
            halves: tuple[list[Any], list[Any]] = ([], [])
            for parameter in group["params"]:
                halves[id(parameter) in second].append(parameter)
            rates = (group["lr"], group["lr"] * self.ratio)
            for half, rate in zip(halves, rates, strict=True):
                if half:
                    groups.append({**group, "params": half, "lr": rate})
        optimizer.param_groups[:] = groups
        return optimizer


class WarmUp:
    """Mixin, to stand before a Trainer among the base classes: warm-up step i of w has i/w of the peak rate.

    The library's schedules have (i - 1)/w there, so that their first step does nothing. After the warm-up,
    the library's schedule applies unchanged.
    """

    args: Any
    lr_scheduler: Any

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        from torch.optim.lr_scheduler import LambdaLR

        if self.lr_scheduler is None:
            usual = super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]
            factor = usual.lr_lambdas[0]  # the same for every group
            warmup = self.args.get_warmup_steps(num_training_steps)

            def of_peak(done: int) -> float:
                return (done + 1) / warmup if done < warmup else factor(done)

            self.lr_scheduler = LambdaLR(usual.optimizer, of_peak)
        return self.lr_scheduler
