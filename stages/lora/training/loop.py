"""The training loop of SFT and RL: trainer arguments, the run, and the proof that frozen elements stayed."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PrinterCallback

from stages.config import BaselineSection, LoraSection, ModelSection, TrainSection
from stages.config.fields import as_decimal_fraction
from stages.config.training import OPTIMIZERS
from stages.errors import ConfigError, UnusableResult
from stages.lora.adapter import adapter, baselines, elements, fsdp
from stages.lora.importance.masks import Masks
from stages.lora.training import curves
from stages.lora.training.watchdog import Watchdog
from stages.runtime import distributed
from stages.store.checkpoints import Checkpoints

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

LOGGING_DIR = "TENSORBOARD_LOGGING_DIR"
"""Environment variable from which transformers takes TensorBoard's folder."""
PINNED: dict[str, Any] = {
    "lr_scheduler_kwargs": None,
    "optim_args": None,
    "optim_target_modules": None,
    "adam_epsilon": 1e-8,
    "label_smoothing_factor": 0.0,
    "neftune_noise_alpha": None,
    "router_aux_loss_coef": None,
    "average_tokens_across_devices": True,
    "bf16": False,
    "fp16": False,
    "tf32": None,
    "torch_compile": False,
    "use_liger_kernel": False,
    "auto_find_batch_size": False,
    "full_determinism": False,
    "pad_to_multiple_of": None,
    "train_sampling_strategy": "random",
    "dataloader_drop_last": False,
    "dataloader_num_workers": 0,
    "ignore_data_skip": False,
    "accelerator_config": {
        "split_batches": False,
        "dispatch_batches": None,
        "even_batches": True,
        "use_seedable_sampler": True,
    },
}
"""Trainer arguments that lorapar has no setting for and that can change a result.

They are pinned, so that no default of the library decides.
"""
SAME_NAME = (
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "gradient_checkpointing",
)  # fmt: skip
"""Settings that the library has under the same name."""


def arguments(
    section: TrainSection, steps: int, seed: int, checkpoints: Checkpoints, passes: int = 1
) -> dict[str, Any]:
    """The arguments that the TRL configs of both trainers take.

    passes: optimizer steps per generation of GRPO; checkpoints fall between two generations.
    """
    cpu = not torch.cuda.is_available()
    check_machine(section, distributed.launched())
    # The library's `constant` ignores the warm-up without a warning.
    scheduler = (
        "constant_with_warmup" if section.lr_scheduler_type == "constant" else section.lr_scheduler_type
    )
    return PINNED | {
        "output_dir": str(checkpoints.folder),
        "optim": OPTIMIZERS[section.optim],
        **{name: getattr(section, name) for name in SAME_NAME},
        "lr_scheduler_type": scheduler,
        "warmup_steps": math.ceil(as_decimal_fraction(section.warmup_ratio) * steps),
        "max_steps": steps,
        "seed": seed,
        "data_seed": seed,
        "use_cpu": cpu,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": _trackers(section, checkpoints.folder),
        "save_strategy": "steps",
        "save_steps": math.ceil(section.save_steps / passes) * passes,
        "dataloader_pin_memory": not cpu,
        "ddp_find_unused_parameters": False,  # every LoRA layer is in every forward pass
    }


def check_machine(section: TrainSection, launched: bool) -> None:
    """Raise ConfigError if a package that the section names is not installed, or a GPU would be idle.

    launched: whether a launcher starts a process for each GPU.
    """
    if torch.cuda.device_count() > 1 and not launched:
        raise ConfigError(
            f"{torch.cuda.device_count()} GPUs are visible to one process",
            "use them: launch.backend=ddp; or choose one: CUDA_VISIBLE_DEVICES=0",
        )
    if section.optim == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "optimizer adamw_8bit: bitsandbytes is not installed", "pip install 'lorapar[qlora]'"
        )
    for name in section.report_to:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"report_to: {name} is not installed", f"pip install {name}")


def _trackers(section: TrainSection, checkpoints: Path) -> list[str] | str:
    """Trackers in `report_to`. For tensorboard, set its folder too: RUN/tensorboard/STAGE-KEY.

    Its default is in the checkpoint folder, which is cleared when the stage ends.
    """
    if "tensorboard" in section.report_to:
        # checkpoints is RUN/STAGE/checkpoints/KEY.
        run, stage = checkpoints.parents[2], checkpoints.parents[1].name
        folder = run / "tensorboard" / f"{stage}-{checkpoints.name}"
        configured = os.environ.get(LOGGING_DIR)
        # Unset, or set for an earlier stage of this process.
        if configured is None or Path(configured).parent == folder.parent:
            os.environ[LOGGING_DIR] = str(folder)
    return list(section.report_to) or "none"


def _finish_run(trackers: list[str]) -> None:
    """End the run of W&B, which a second round of SFT in this process would otherwise go on with."""
    if "wandb" in trackers:
        import wandb

        wandb.finish()


@dataclass(frozen=True)
class StartingAdapter:
    """The adapter and masks that a training stage starts from."""

    folder: Path | None
    """The other stage's adapter or the initial one; None for a new baseline, which is drawn from the seed."""
    active: dict[str, Tensor] | None
    """The elements that train, by LoRA weight; None for a baseline, of which everything trains."""

    @classmethod
    def from_artifacts(cls, stage: str, folder: Path | None, partition: Path | None) -> StartingAdapter:
        """The adapter in `folder` and the masks for `stage` in `partition`; a baseline has no partition."""
        return cls(folder, Masks.load(partition / "masks.safetensors", stage).active if partition else None)

    def attach(
        self,
        base: PreTrainedModel,
        lora: LoraSection,
        baseline: BaselineSection | None,
        dropout: float,
        seed: int,
    ) -> PeftModel:
        if baseline is not None:
            return baselines.attach(base, baseline, lora, seed, self.folder, dropout)
        assert self.folder is not None
        return adapter.attach(base, lora, self.folder, dropout)

    def restore(self, model: PeftModel) -> None:
        """Restore every LoRA weight from the file: TRL rounds the adapters of a 4-bit base to bfloat16."""
        assert self.folder is not None
        stored = adapter.read(self.folder)
        for copy in ("default", "ref"):
            for name, layer in adapter.lora_layers(model, copy).items():
                layer.weight.data = stored[name].to(layer.weight.device)


def train(
    trainer: Any,
    model: PeftModel,
    start: StartingAdapter,
    out: Path,
    base: ModelSection,
    checkpoints: Checkpoints,
) -> dict[str, Any]:
    """Pack, train from the newest checkpoint or else from `start`, and write the results below `out`.

    Writes `adapter/`, `history.json` and `curves.png`. Of several processes only the first writes, and the
    others return an empty dict; an assertion checks that all hold the same adapter. Returns the steps, the
    numbers of elements and `frozen_drift`: the largest difference of an inactive element between the file
    written and the one in `start`. It is 0; if a bit differs, which breaks a promise of the code, that is an
    AssertionError.
    """
    refuse_untested(trainer)
    initial = None
    if start.active is not None:
        start.restore(model)
        elements.sparsify(model, start.active)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trainable == sum(int(mask.sum()) for mask in start.active.values())
    else:
        initial = {name: p.detach().cpu().clone() for name, p in adapter.trained_parameters(model).items()}
    trainer.remove_callback(PrinterCallback)  # it prints each step as a dict; ProgressCallback reports it
    trainer.checkpoints = checkpoints
    resumed = checkpoints.newest()
    if resumed:
        log.info("resuming from %s", resumed.name)
    watchdog = Watchdog(checkpoints.folder, getattr(trainer, "num_iterations", 1))
    trainer.add_callback(watchdog)
    try:
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    finally:
        watchdog.stop()
        _finish_run(trainer.args.report_to)
    if trainer.state.global_step == 0:
        raise UnusableResult("training did no step", "there are fewer rows than one step takes")
    if distributed.world_size() > 1:
        assert distributed.all_equal(_digest(model)), "the processes ended with different adapters"
    if not distributed.is_main():
        return {}
    adapter.save(model, out / "adapter", base)
    if initial is not None:
        baselines.save(model, out / "adapter")
    logged = history(trainer)
    (out / "history.json").write_text(json.dumps(logged, indent=1), encoding="utf-8")
    curves.draw(logged, out / "curves.png")
    folder = out / "adapter"
    counts = verify_frozen(start, folder) if initial is None else _count_moved(initial, folder)
    if counts["moved"] == 0:
        log.warning("training moved no element: every gradient was zero")
    protected_kl = [row[curves.PROTECTED_KL] for row in logged if curves.PROTECTED_KL in row][-1:]
    return {
        "steps": trainer.state.global_step,
        **fsdp.local_share(model),
        **counts,
        **({"protected_kl": protected_kl[0]} if protected_kl else {}),
    }


def refuse_untested(trainer: Any) -> None:
    """Reject accelerate settings (FSDP, DeepSpeed, mixed precision) that would silently corrupt training."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ConfigError(
            "launch.config asks for FSDP or DeepSpeed by accelerate, which was not tested",
            "leave launch.config out and use launch.backend=fsdp2, which divides the base model",
        )
    kind = trainer.accelerator.mixed_precision
    if kind != "no":
        raise ConfigError(
            f"launch.config: mixed_precision {kind} would change results, and no artifact records it",
            "set mixed_precision to no in that file",
        )


def _digest(model: PeftModel) -> str:
    """sha256 over the trained parameters."""
    digest = hashlib.sha256()
    for _, weight in sorted(adapter.trained_parameters(model).items()):
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def history(trainer: Any) -> list[dict[str, float]]:
    """Logged values of each step, including the steps before a resume."""
    steps = [row for row in trainer.state.log_history if "train_runtime" not in row]
    return [{name: value for name, value in row.items() if isinstance(value, int | float)} for row in steps]


def verify_frozen(start: StartingAdapter, end: Path) -> dict[str, Any]:
    """Read both adapter files back, count the active elements that moved, and assert that no other did."""
    assert start.folder is not None and start.active is not None
    initial, trained = adapter.read(start.folder), adapter.read(end)
    drift, moved = 0.0, 0
    for name, old in initial.items():
        mask = adapter.full_mask(name, start.active[name], old)  # True where an element trains
        new = trained[name]
        # Bits are compared, because NaN is unequal to itself, and -0 is equal to 0.
        changed, frozen = new.view(torch.int32) != old.view(torch.int32), ~mask
        number = int(changed[frozen].sum())
        assert not number, f"{name}: {number} frozen elements changed"
        drift = max(drift, float((new - old)[frozen].abs().max()) if bool(frozen.any()) else 0.0)
        moved += int(changed[mask].sum())
    total = sum(mask.numel() for mask in start.active.values())
    number = sum(int(mask.sum()) for mask in start.active.values())
    return {
        "elements": total,
        "active": number,
        "active_share": number / total,
        "moved": moved,
        "frozen_drift": drift,
    }


def _count_moved(initial: dict[str, Tensor], end: Path) -> dict[str, Any]:
    """The same counts for a baseline, of which everything trains."""
    trained = adapter.read(end, baselines.STATE)
    number = sum(old.numel() for old in initial.values())
    moved = sum(int((trained[name] != old).sum()) for name, old in initial.items())
    return {"elements": number, "active": number, "active_share": 1.0, "moved": moved}


def accumulation_steps(samples: int, micro_batch: int, processes: int | None = None) -> int:
    """Forward passes per process and optimizer step; ConfigError unless the samples divide evenly.

    processes: their number, by default that of this run.
    """
    processes = processes or distributed.world_size()
    if samples % (micro_batch * processes):
        raise ConfigError(
            f"{processes} processes with micro batches of {micro_batch} "
            f"cannot share {samples} samples a step evenly",
            "lower per_device_train_batch_size or the number of processes",
        )
    return samples // (micro_batch * processes)


def steps_of(batches: int, section: TrainSection, passes: int = 1) -> int:
    """Optimizer steps for `epochs` over so many batches, each used `passes` times; at most `max_steps`."""
    steps = math.ceil(as_decimal_fraction(section.num_train_epochs) * batches * passes)
    return min(steps, section.max_steps or steps)
