"""Learning rates: of A and B apart, and of the first steps."""

from __future__ import annotations

from typing import Any


class LoraPlus:
    """Stands before a Trainer among the bases of a class: B learns `ratio` times as fast as A.

    LoRA+, arXiv 2402.12354. By our names: PEFT's own helper takes every packed, one-dimensional parameter for a B.
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
            groups += [
                {**group, "params": half, "lr": rate}
                for half, rate in zip(halves, rates, strict=True)
                if half
            ]
        optimizer.param_groups[:] = groups
        return optimizer


class WarmUp:
    """Stands before a Trainer among the bases of a class: step i of w warm-up steps has i/w of the peak rate.

    The library's schedules have (i - 1)/w there, so that their first step does nothing. All later steps are
    theirs.
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
