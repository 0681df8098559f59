"""Exact resume: the whole state of a trainer, restored to the last bit.

Nothing is unpickled: weights and optimizer state are safetensors, the rest is JSON. The library's own resume
reads pickles, skips the `default` adapter if there is a second one, and lets GRPO's sampler start again with
the first epoch.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import TrainerCallback

from stages.errors import ArtifactError
from stages.lora.adapter import adapter, baselines
from stages.lora.adapter.sparse_linear import SparseLinear
from stages.store.checkpoints import Checkpoints


class UseConfiguredSaveSteps(TrainerCallback):
    """Checkpoints as often as is asked for now: the library goes on as the run before did."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.save_steps = args.save_steps


class ExactResume:
    """Mixin, to stand before a Trainer among the base classes; set `checkpoints` before `train`.

    For plain optimizers, on one process, or on several that each hold the whole state.
    """

    checkpoints: Checkpoints
    accelerator: Any
    args: Any
    lr_scheduler: Any
    model: Any
    optimizer: Any
    state: Any

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        self.accelerator.wait_for_everyone()  # each process writes its own random state
        if self.args.should_save:
            self.checkpoints.seal(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save only the trained adapter: no reference adapter, no tokenizer, no pickled arguments."""
        if self._packed():
            adapter.write(self.model, Path(output_dir or self.args.output_dir))
        else:
            baselines.save(self.model, Path(output_dir or self.args.output_dir))

    def _packed(self) -> dict[str, SparseLinear]:
        """The layers of a partition, of which some elements train. A baseline trains all of its weights."""
        layers = adapter.lora_layers(self.model)  # DoRA has such layers, too, beside its magnitudes
        return {name: layer for name, layer in layers.items() if isinstance(layer, SparseLinear)}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._packed():
            baselines.load(self.model, Path(resume_from_checkpoint))
            return
        stored = adapter.read(Path(resume_from_checkpoint))
        layers = self._packed()
        if stored.keys() != layers.keys():
            raise ArtifactError(f"{resume_from_checkpoint} does not fit the adapter")
        for name, layer in layers.items():
            layer.load_state_dict({"weight": stored[name]})
            if not torch.equal(layer.weight.detach().cpu(), stored[name]):
                raise ArtifactError(f"{resume_from_checkpoint}: {name} was not restored to its saved values")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        from safetensors.torch import save_file

        if not self.args.should_save:
            return
        whole = self.optimizer.state_dict()
        tensors: dict[str, Tensor] = {}
        other: dict[str, dict[str, Any]] = {}
        for index, values in whole["state"].items():
            for name, value in _unwrapped(values).items():
                if isinstance(value, Tensor):
                    tensors[f"{index}.{name}"] = value.detach().cpu().contiguous()
                else:
                    other.setdefault(str(index), {})[name] = value
        save_file(tensors, Path(output_dir) / "optimizer.safetensors")
        rest = {"groups": whole["param_groups"], "state": other, "scheduler": self.lr_scheduler.state_dict()}
        (Path(output_dir) / "optimizer.json").write_text(json.dumps(rest), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        from safetensors.torch import load_file

        if checkpoint is None:
            return
        rest = json.loads((Path(checkpoint) / "optimizer.json").read_text(encoding="utf-8"))
        state: dict[int, dict[str, Any]] = {int(index): values for index, values in rest["state"].items()}
        for name, value in load_file(Path(checkpoint) / "optimizer.safetensors").items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": rest["groups"]})
        self.lr_scheduler.load_state_dict(rest["scheduler"])

    def _save_rng_state(self, output_dir: str) -> None:
        import numpy as np

        kind, words, *rest = np.random.get_state(legacy=True)
        state = {
            "torch": torch.random.get_rng_state().tolist(),
            "cuda": torch.cuda.random.get_rng_state().tolist() if torch.cuda.is_available() else None,
            "python": random.getstate(),
            "numpy": [kind, np.asarray(words).tolist(), *rest],
        }
        path = Path(output_dir) / f"random-{self.args.process_index}.json"
        path.parent.mkdir(parents=True, exist_ok=True)  # the first process to come here makes it
        path.write_text(json.dumps(state), encoding="utf-8")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        import numpy as np

        if checkpoint is None:
            return
        path = Path(checkpoint) / f"random-{self.args.process_index}.json"
        state = json.loads(path.read_text(encoding="utf-8"))
        torch.random.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.random.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, words, *rest = state["numpy"]
        np.random.set_state((kind, np.array(words, dtype=np.uint32), *rest))


def _unwrapped(state: dict[str, Any]) -> dict[str, Any]:
    """The state of one parameter: bitsandbytes puts its own part into a dict, with tables that all parameters
    share, which safetensors refuses. It takes back what is unwrapped, too."""
    found: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, dict):
            found |= {key: part.clone() if isinstance(part, Tensor) else part for key, part in value.items()}
        else:
            found[name] = value
    return found


class ExactRollouts(ExactResume):
    """The same for GRPO. Its checkpoints must fall between two generations, when no completion is in use."""

    _step: int
    _buffered_inputs: Any

    def _get_train_sampler(self, dataset: Any = None) -> Sampler[int]:
        """The trainer's sampler, but with an order that follows from the seed and the epoch alone.

        Checkpoints do not hold the state of the sampler's generator.
        """
        return _OfEpoch(super()._get_train_sampler(dataset), self)  # type: ignore[misc]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            self._step = self.state.global_step * self.args.gradient_accumulation_steps
            self._buffered_inputs = None


class _OfEpoch(Sampler[int]):
    def __init__(self, usual: Any, trainer: ExactRollouts) -> None:
        """usual: a sampler that draws from its `generator`."""
        self.usual, self.trainer = usual, trainer

    def __len__(self) -> int:
        return len(self.usual)

    def __iter__(self) -> Iterator[int]:
        epoch = int(round(self.trainer.state.epoch or 0, 6))
        self.usual.generator.manual_seed(self.trainer.args.seed * 1_000_003 + epoch)
        return iter(self.usual)
