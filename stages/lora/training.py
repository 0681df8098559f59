"""What SFT and RL truly share: trainer arguments, packing, progress, health, and the proof that frozen elements stayed."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback

from stages.config import TrainSection
from stages.errors import ArtifactError, ConfigError, MeaninglessError
from stages.lora import adapter
from stages.lora.packed import PackedLinear

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import Trainer

    from stages.pipeline import Progress

log = logging.getLogger(__name__)


def arguments(section: TrainSection, steps: int, seed: int, out: Path) -> dict[str, Any]:
    """The arguments of TRL's configs that both trainers take; every one that TRL's own defaults have moved is pinned."""
    cpu = not torch.cuda.is_available()
    if torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        raise ConfigError(f"{torch.cuda.device_count()} GPUs are visible to one process", "choose one: CUDA_VISIBLE_DEVICES=0")
    # The library's `constant` passes over the warm-up without a word.
    scheduler = "constant_with_warmup" if section.scheduler == "constant" else section.scheduler
    return {
        "output_dir": str(out),
        "learning_rate": section.lr,
        "lr_scheduler_type": scheduler,
        "warmup_steps": min(math.ceil(section.warmup * steps), steps - 1),  # the first warm-up step has a rate of 0
        "weight_decay": section.weight_decay,
        "adam_beta1": section.adam_beta1,
        "adam_beta2": section.adam_beta2,
        "max_grad_norm": section.max_grad_norm,
        "max_steps": steps,
        "seed": seed,
        "data_seed": seed,
        "gradient_checkpointing": section.gradient_checkpointing,
        "use_cpu": cpu,
        "bf16": False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "dataloader_pin_memory": not cpu,
    }


def pack(model: PeftModel, active: dict[str, Tensor]) -> None:
    """Replace every LoRA layer by one whose active elements alone are parameters.

    Call it when the trainer is built and before it trains: TRL copies `default` to `ref` by plain parameter names.
    ArtifactError unless the masks are for exactly these weights.
    """
    layers = adapter.lora_layers(model)
    if layers.keys() != active.keys():
        odd = sorted(layers.keys() ^ active.keys())[0]
        raise ArtifactError(f"masks do not fit the adapter: {odd} is on one side only")
    for name, layer in layers.items():
        mask = adapter.full_mask(name, active[name], layer.weight)
        parent = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(parent, nn.ModuleDict)
        parent["default"] = PackedLinear(layer, mask)
    number = sum(int(mask.sum()) for mask in active.values())
    if number == 0:
        raise MeaninglessError("no element is active in this stage", "raise partition.theta, alpha or beta")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == number, (trainable, number)


class Watch(TrainerCallback):
    """Reports progress and stops a run whose loss or gradient is not finite."""

    def __init__(self, progress: Progress, what: str, steps: int, shown: tuple[str, ...]) -> None:
        self.progress, self.shown = progress, shown
        self.history: list[dict[str, float]] = []
        progress.start(what, steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "train_runtime" in logs:
            return
        for name in ("loss", "grad_norm"):
            if name in logs and not math.isfinite(logs[name]):
                raise MeaninglessError(f"{name} is {logs[name]} at step {state.global_step}", "lower the learning rate")
        self.history.append({"step": state.global_step, **{k: float(v) for k, v in logs.items() if isinstance(v, int | float)}})
        self.progress.advance(1, "  ".join(f"{n.split('/')[-1]} {logs[n]:.3g}" for n in self.shown if n in logs))


def train(trainer: Trainer, model: PeftModel, active: dict[str, Tensor], start: Path, out: Path, name: str) -> dict[str, Any]:
    """Pack, train, write `adapter/` below `out`, and prove from that file that only active elements differ from `start`.

    Returns steps, numbers of elements and `frozen_drift`, the largest difference of an inactive element: 0, or an
    AssertionError, for then a promise of the code is broken.
    """
    pack(model, active)
    trainer.remove_callback(PrinterCallback)  # it prints each step as a dict; `Watch` reports it
    trainer.train()
    if trainer.state.global_step == 0:
        raise MeaninglessError("training did no step", "there are fewer rows than one step takes")
    adapter.save(model, out / "adapter", name)
    before, after = adapter.read(start), adapter.read(out / "adapter")
    drift, moved = 0.0, 0
    for key, old in before.items():
        mask = adapter.full_mask(key, active[key], old)
        change = (after[key] - old).abs()
        drift = max(drift, float(change[~mask].max()) if bool((~mask).any()) else 0.0)
        moved += int((change[mask] > 0).sum())
    assert drift == 0.0, f"frozen elements moved by up to {drift}"
    if moved == 0:
        log.warning("training moved no element: every gradient was zero")
    total = sum(mask.numel() for mask in active.values())
    number = sum(int(mask.sum()) for mask in active.values())
    return {
        "steps": trainer.state.global_step,
        "elements": total,
        "active": number,
        "active_share": number / total,
        "moved": moved,
        "frozen_drift": drift,
    }


def steps_of(batches: int, section: TrainSection, passes: int = 1) -> int:
    """Optimizer steps for `epochs` passes over so many batches, each used `passes` times; at most `max_steps`."""
    steps = math.ceil(batches * section.epochs * passes)
    return min(steps, section.max_steps or steps)
