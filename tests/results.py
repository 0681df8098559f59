"""What tests read of the artifacts of a run."""

import json
from pathlib import Path

import torch
from conftest import make_steps

from stages.config import Config
from stages.lora.adapter import adapter
from stages.lora.importance.masks import Masks
from stages.pipeline.resolve import resolved
from stages.pipeline.steps import plan_steps
from stages.store.artifacts import Artifact


def artifacts(config: Config, *names: str) -> dict[str, Artifact]:
    """Those of the named steps or stages, made where they are not yet; see `make_steps`."""
    return {name: artifact for name, (artifact, _) in make_steps(config, *names).items()}


def history(artifact: Artifact) -> list[dict]:
    return json.loads((artifact.path / "history.json").read_text())


def untimed(folder: Path) -> list[dict]:
    """The history of a run without what only a clock knows."""
    rows = json.loads((folder / "history.json").read_text())
    return [{k: v for k, v in row.items() if "time" not in k and "per_second" not in k} for row in rows]


def trained_weights(config: Config, stage: str) -> tuple[dict, dict, dict]:
    """The weights before and after the stage, and the masks of those that train."""
    *_, masks, start = plan_steps(resolved(config))[stage].inputs
    made = artifacts(config, masks, start, stage)
    before, after = adapter.read(made[start].adapter), adapter.read(made[stage].adapter)
    active = Masks.load(made[masks].path, masks.partition(":")[2]).active
    return before, after, {name: adapter.full_mask(name, mask, before[name]) for name, mask in active.items()}


def moved_share(config: Config, stage: str) -> float:
    """The share of the active elements that moved; asserts that frozen ones kept their bits in the files."""
    before, after, masks = trained_weights(config, stage)
    for name, old in before.items():
        assert torch.equal(after[name][~masks[name]], old[~masks[name]]), name
    moved = sum(int((after[name] != old)[masks[name]].sum()) for name, old in before.items())
    return moved / sum(int(mask.sum()) for mask in masks.values())
