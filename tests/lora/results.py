"""What tests read of the artifacts of a run."""

import json
from pathlib import Path

import torch
from conftest import make_steps
from torch import Tensor

from stages.config import Config
from stages.lora.adapter import adapter
from stages.lora.importance.masks import Masks
from stages.pipeline.resolve import resolved
from stages.pipeline.steps import plan_steps
from stages.store.artifacts import Artifact, Store


def artifacts(config: Config, *names: str) -> dict[str, Artifact]:
    """Those of the named steps or stages, made where they are not yet; see `make_steps`."""
    return {name: artifact for name, (artifact, _) in make_steps(config, *names).items()}


def history(artifact: Artifact) -> list[dict]:
    return json.loads((artifact.path / "history.json").read_text())


def untimed(folder: Path) -> list[dict]:
    """The history of a run without what only a clock knows."""
    return [
        {k: v for k, v in row.items() if "time" not in k and "per_second" not in k}
        for row in json.loads((folder / "history.json").read_text())
    ]


def stored(config: Config, step: str) -> Artifact:
    """The artifact of a step that was made."""
    store, planned = Store(config.root), plan_steps(resolved(config))[step]
    return store.load(store.folder(planned.stage.name, planned.key))


def trained_weights(
    config: Config, stage: str
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The weights before and after the stage, and the masks of those that train."""
    inputs = {name: stored(config, name) for name in plan_steps(resolved(config))[stage].inputs}
    start = adapter.read(next(inputs[name].adapter for name in inputs if name in ("score", "sft", "rl")))
    active = Masks.load(inputs[f"partition:{stage}"].path / "masks.safetensors", stage).active
    masks = {name: adapter.full_mask(name, mask, start[name]) for name, mask in active.items()}
    return start, adapter.read(stored(config, stage).adapter), masks


def moved_share(config: Config, stage: str) -> float:
    """The share of the active elements that moved; asserts that frozen ones kept their bits in the files."""
    before, after, masks = trained_weights(config, stage)
    for name, old in before.items():
        assert torch.equal(after[name][~masks[name]], old[~masks[name]]), name
    moved = sum(int((after[name] != old)[masks[name]].sum()) for name, old in before.items())
    return moved / sum(int(mask.sum()) for mask in masks.values())
