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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from stages.errors import ArtifactError
from stages.lora.adapter import adapter, baselines
from stages.lora.adapter.elements import SparseLinear

if TYPE_CHECKING:
    from peft import PeftModel


def sparse_layers(model: PeftModel) -> dict[str, SparseLinear]:
    """The layers of a partition, of which some elements train; none for a baseline, which trains whole."""
    layers = adapter.lora_layers(model)  # DoRA has such layers, too, beside its magnitudes
    return {name: layer for name, layer in layers.items() if isinstance(layer, SparseLinear)}


def save_weights(model: PeftModel, folder: Path) -> None:
    """Save the trained adapter alone: no reference adapter, no tokenizer, no pickled arguments."""
    if sparse_layers(model):
        adapter.write(model, folder)
    else:
        baselines.save(model, folder)


def load_weights(model: PeftModel, folder: Path) -> None:
    """Restore what `save_weights` saved. ArtifactError unless every weight then has its saved value."""
    layers = sparse_layers(model)
    if not layers:
        baselines.load(model, folder)
        return
    stored = adapter.read(folder)
    if stored.keys() != layers.keys():
        raise ArtifactError(f"{folder} does not fit the adapter")
    for name, layer in layers.items():
        layer.load_state_dict({"weight": stored[name]})
        if not torch.equal(layer.weight.detach().cpu(), stored[name]):
            raise ArtifactError(f"{folder}: {name} was not restored to its saved values")


def save_optimizer(optimizer: Any, scheduler: Any, folder: Path) -> None:
    """Write the tensors of an optimizer's state as safetensors, and its numbers and the schedule as JSON.

    For plain optimizers, on one process, or on several that each hold the whole state.
    """
    from safetensors.torch import save_file

    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for name, value in _unwrapped(values).items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous()
            else:
                numbers.setdefault(str(index), {})[name] = value
    save_file(tensors, folder / "optimizer.safetensors")
    content = {"groups": state["param_groups"], "state": numbers, "scheduler": scheduler.state_dict()}
    (folder / "optimizer.json").write_text(json.dumps(content), encoding="utf-8")


def load_optimizer(optimizer: Any, scheduler: Any, folder: Path) -> None:
    """Restore what `save_optimizer` wrote."""
    from safetensors.torch import load_file

    content = json.loads((folder / "optimizer.json").read_text(encoding="utf-8"))
    state: dict[int, dict[str, Any]] = {int(index): values for index, values in content["state"].items()}
    for name, value in load_file(folder / "optimizer.safetensors").items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": content["groups"]})
    scheduler.load_state_dict(content["scheduler"])


def _unwrapped(state: dict[str, Any]) -> dict[str, Any]:
    """The state of one parameter as one flat dict.

    bitsandbytes puts its part into a dict of its own, with tables that all parameters share, which
    safetensors refuses. It takes back what is unwrapped, too.
    """
    flat: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, dict):
            flat |= {key: item.clone() if isinstance(item, Tensor) else item for key, item in value.items()}
        else:
            flat[name] = value
    return flat


def save_random_state(folder: Path, process: int) -> None:
    """Write the states of the random generators of Python, NumPy and torch in this process."""
    import numpy as np

    kind, words, *counters = np.random.get_state(legacy=True)
    state = {
        "torch": torch.random.get_rng_state().tolist(),
        "cuda": torch.cuda.random.get_rng_state().tolist() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": [kind, np.asarray(words).tolist(), *counters],
    }
    folder.mkdir(parents=True, exist_ok=True)  # the first process to come here makes it
    (folder / f"random-{process}.json").write_text(json.dumps(state), encoding="utf-8")


def load_random_state(folder: Path, process: int) -> None:
    """Restore what `save_random_state` wrote."""
    import numpy as np

    state = json.loads((folder / f"random-{process}.json").read_text(encoding="utf-8"))
    torch.random.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.random.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, words, *counters = state["numpy"]
    np.random.set_state((kind, np.array(words, dtype=np.uint32), *counters))


class EpochSeededSampler(Sampler[int]):
    """A sampler whose order follows from the seed and the epoch alone.

    Checkpoints do not hold the state of a sampler's generator.
    """

    def __init__(self, inner: Any, trainer: Any) -> None:
        """inner: a sampler that draws from its `generator`."""
        self.inner, self.trainer = inner, trainer

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[int]:
        # int() alone would count 1.9999999 as epoch 1. Epochs are at most 10⁶ (`num_train_epochs`), so no two
        # pairs of seed and epoch have the same number.
        epoch = int(round(self.trainer.state.epoch or 0, 6))
        self.inner.generator.manual_seed(self.trainer.args.seed * 1_000_003 + epoch)
        return iter(self.inner)
