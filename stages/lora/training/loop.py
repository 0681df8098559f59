"""The training loop of SFT and RL: trainer arguments, and the run from the newest checkpoint on.

One is saved every `save_steps` (25 by default), and after SAVE_S. A run that was killed at step 37 goes on
from 25, as `ResumableTrainer` does it; `Checkpoints.newest` passes over damaged ones.
"""

import hashlib
import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from stages.config import TrainSection
from stages.config.fields import as_decimal_fraction
from stages.errors import ConfigError, UnusableResult
from stages.lora.adapter import adapter, baselines
from stages.lora.training import curves
from stages.lora.training.start import Training
from stages.models.load_errors import check_training
from stages.runtime import ranks
from stages.store.checkpoints import Checkpoints

log = logging.getLogger(__name__)

SAVE_S = 300.0
"""Seconds after which one process saves a checkpoint, whatever `save_steps` says."""
LOGGING_DIR = "TENSORBOARD_LOGGING_DIR"
"""Environment variable from which transformers takes TensorBoard's folder."""
PINNED: dict[str, Any] = {
    "lr_scheduler_kwargs": None,
    # It updates elements independently, which is necessary because the active elements of a weight are packed
    # into a one-dimensional parameter.
    "optim": "adamw_torch_fused",
    "optim_args": None,
    "optim_target_modules": None,
    "adam_beta1": 0.9,
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
SAME_NAME = ("learning_rate", "weight_decay", "max_grad_norm", "gradient_checkpointing", "save_steps")
"""Settings that the library has under the same name."""


def arguments(section: TrainSection, steps: int, seed: int, checkpoints: Checkpoints) -> dict[str, Any]:
    """The arguments that the TRL configs of both trainers take."""
    cpu = not torch.cuda.is_available()
    check_training(section)
    ranks.check_gpus()
    # The library's `constant` ignores the warm-up without a warning.
    scheduler = section.lr_scheduler_type.replace("constant", "constant_with_warmup")
    return PINNED | {
        "output_dir": str(checkpoints.folder),
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
        "dataloader_pin_memory": not cpu,
        "ddp_find_unused_parameters": False,  # every LoRA layer is in every forward pass
    }


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


class TimedSaving(TrainerCallback):
    """Saves a checkpoint after SAVE_S without one: a few steps of RL may take an hour."""

    def __init__(self) -> None:
        self.saved_at = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The clocks of several processes differ, and all of them save together.
        if ranks.world_size() == 1 and time.monotonic() - self.saved_at > SAVE_S:
            control.should_save = True

    def on_save(self, *_: Any, **__: Any) -> None:
        self.saved_at = time.monotonic()


def train(trainer: Any, run: Training) -> dict[str, Any]:
    """Train the active elements from the newest checkpoint, or else from `run.start`.

    Writes `adapter/`, `history.json` and `curves.png` below the context's `out`. Of several processes only
    the first writes, and the others return an empty dict; an assertion checks that all hold the same adapter.
    Returns the steps, and the counts of `StartingAdapter.verify`.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or trainer.accelerator.mixed_precision != "no":
        raise ConfigError(
            "accelerate's FSDP, DeepSpeed and mixed precision would change results, and no key names them",
            "turn them off in accelerate's config: distributed_type MULTI_GPU, mixed_precision no",
        )
    model, checkpoints, out = trainer.model, run.context.checkpoints, run.context.out
    run.start.begin(model)
    trainer.remove_callback(PrinterCallback)  # it prints each step as a dict; ProgressCallback reports it
    trainer.checkpoints = checkpoints
    resumed = checkpoints.newest()
    if resumed:
        log.info("resuming from %s, of %d steps", resumed.name, trainer.args.max_steps)
    trainer.add_callback(TimedSaving())
    trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    if trainer.state.global_step == 0:
        raise UnusableResult("training did no step", "there are fewer rows than one step takes")
    assert ranks.all_equal(_digest(model)), "the processes ended with different adapters"
    if not ranks.is_main():
        return {}
    folder = out / "adapter"
    adapter.save(model, folder, run.model)
    if run.baseline is not None:
        baselines.save(model, folder)
    logged = history(trainer)
    (out / "history.json").write_text(json.dumps(logged, indent=1), encoding="utf-8")
    curves.draw(logged, out / "curves.png")
    counts = run.start.verify(folder)
    if counts["moved"] == 0:
        log.warning("training moved no element: every gradient was zero")
    return {"steps": trainer.state.global_step, **counts}


def _digest(model: Any) -> str:
    digest = hashlib.sha256()
    for _, weight in sorted(adapter.trained_parameters(model).items()):
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def accumulation_steps(samples: int, micro_batch: int, processes: int | None = None) -> int:
    """Forward passes per process and optimizer step; ConfigError unless the samples divide evenly.

    processes: that will train; by default those that do.
    """
    processes = processes or ranks.world_size()
    if samples % (micro_batch * processes):
        raise ConfigError(
            f"{processes} processes with micro batches of {micro_batch} "
            f"cannot share {samples} samples a step evenly",
            "lower per_device_train_batch_size or the number of processes",
        )
    return samples // (micro_batch * processes)


def history(trainer: Any) -> list[dict[str, float]]:
    """Logged values of each step, including the steps before a resume."""
    steps = [row for row in trainer.state.log_history if "train_runtime" not in row]
    return [{name: value for name, value in row.items() if isinstance(value, int | float)} for row in steps]


def steps_of(batches: int, section: TrainSection, stage: str = "") -> int:
    """Optimizer steps for `epochs` over so many batches; at most `max_steps`.

    stage: whose training begins now; where it ends before `max_steps`, a warning says why.
    """
    steps = math.ceil(as_decimal_fraction(section.num_train_epochs) * batches)
    if stage and steps < (section.max_steps or 0):
        log.warning(
            "%s ends after %d steps (num_train_epochs %g): max_steps %d is a limit, and no length as in TRL",
            stage,
            steps,
            section.num_train_epochs,
            section.max_steps,
        )
    return min(steps, section.max_steps or steps)
