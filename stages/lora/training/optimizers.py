"""Learning rates: separate ones for A and B, and those of the warm-up steps."""

from __future__ import annotations

from typing import Any

from torch import nn


def split_rates(optimizer: Any, model: nn.Module, ratio: float) -> None:
    """LoRA+ (arXiv 2402.12354): let B learn `ratio` times as fast as A.

    A and B are told apart by parameter name, because PEFT's own helper takes every one-dimensional parameter
    for a B, and sparse weights are one-dimensional.
    """
    b_weights = {id(parameter) for name, parameter in model.named_parameters() if ".lora_B." in name}
    groups = []
    for group in optimizer.param_groups:
        halves: tuple[list[Any], list[Any]] = ([], [])  # A, B
        for parameter in group["params"]:
            halves[id(parameter) in b_weights].append(parameter)
        for parameters, rate in zip(halves, (group["lr"], group["lr"] * ratio), strict=True):
            if parameters:
                groups.append({**group, "params": parameters, "lr": rate})
    optimizer.param_groups[:] = groups


def full_warmup(schedule: Any, warmup_steps: int) -> Any:
    """The library's schedule, but that warm-up step i of w has i/w of the peak rate.

    The library has (i - 1)/w there, so that its first step does nothing. After the warm-up nothing changes.
    """
    from torch.optim.lr_scheduler import LambdaLR

    factor = schedule.lr_lambdas[0]  # the same for every group

    def share_of_peak(steps_done: int) -> float:
        return (steps_done + 1) / warmup_steps if steps_done < warmup_steps else factor(steps_done)

    return LambdaLR(schedule.optimizer, share_of_peak)
