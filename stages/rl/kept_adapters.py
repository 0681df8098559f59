"""Adapters that a training run keeps on its way, besides the last one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from stages.lora.adapter import adapter
from stages.runtime import distributed

if TYPE_CHECKING:
    from peft import PeftModel

    from stages.config import ModelSection


class KeptAdapters(TrainerCallback):
    """Writes the adapter after each of these steps, beside the checkpoints: a resumed run finds it there."""

    def __init__(self, model: PeftModel, base: ModelSection, folder: Path, steps: list[int]) -> None:
        self.model, self.base, self.folder, self.steps = model, base, folder, steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self.steps and distributed.is_main():
            # What a killed run left half written is written again, when the resumed one comes to the step.
            folder = self.folder / str(state.global_step)
            shutil.rmtree(folder, ignore_errors=True)
            adapter.save(self.model, folder, self.base)

    def copy(self, out: Path) -> None:
        """Copy what was kept into the artifact."""
        # Not written there at once: the folder of an artifact is emptied when a killed run begins again.
        if self.folder.exists():
            shutil.copytree(self.folder, out)
