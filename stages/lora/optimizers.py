"""Learning rates of A and B apart, by our names: PEFT's own helper takes every packed, one-dimensional parameter for a B."""

from __future__ import annotations

from typing import Any


class LoraPlus:
    """Stands before a Trainer among the bases of a class: B learns `ratio` times as fast as A (LoRA+, arXiv 2402.12354)."""

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
            groups += [{**group, "params": half, "lr": rate} for half, rate in zip(halves, rates, strict=True) if half]
        optimizer.param_groups[:] = groups
        return optimizer
