"""Start of SFT and RL, and the proof at the end that frozen elements stayed."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from stages.config import (
    AUTO,
    BaselineSection,
    LoraSection,
    ModelSection,
    ModesSection,
    PromptSection,
    RlSection,
    SftSection,
)
from stages.lora.adapter import adapter, baselines, elements
from stages.lora.importance.masks import Masks
from stages.models.tokenizer import load_tokenizer
from stages.prompts.renderer import Renderer, renderers_of
from stages.records import Labelled, read_labels


@dataclass(frozen=True)
class StartingAdapter:
    """The adapter and masks that a training stage starts from."""

    folder: Path | None
    """The other stage's adapter or the initial one; None for a new baseline, which is drawn from the seed."""
    active: dict[str, Tensor] | None
    """The elements that train, by LoRA weight; None for a baseline, of which everything trains."""
    untrained: dict[str, Tensor] = field(default_factory=dict)
    """Values of a baseline's parameters before training; a partition's are read from `folder`."""

    def begin(self, model: PeftModel) -> None:
        """Leave only the active elements as parameters; of a baseline, keep what all parameters were."""
        if self.active is None:
            parameters = adapter.trained_parameters(model).items()
            self.untrained.update({name: p.detach().cpu().clone() for name, p in parameters})
            return
        assert self.folder is not None
        stored = adapter.read(self.folder)
        for copy in ("default", "ref"):  # TRL rounds the adapters of a 4-bit base to bfloat16
            for name, layer in adapter.lora_layers(model, copy).items():
                layer.weight.data = stored[name].to(layer.weight.device)
        # Masks and adapter are of one run: halves are those of a compensated one.
        elements.sparsify(model, self.active, compensated=True)
        trainable = sum(p.numel() for p in adapter.trained_parameters(model).values())
        assert trainable == sum(int(mask.sum()) for mask in self.active.values())

    def verify(self, end: Path) -> dict[str, Any]:
        """Count the elements in the file below `end`, the active ones, and those of them that moved.

        `frozen_drift` is 0: where a bit of an inactive element differs between that file and the one in
        `folder`, which breaks a promise of the code, that is an AssertionError. A baseline has none.
        """
        if self.active is None:
            trained = adapter.read(end, baselines.STATE)
            moved = sum(int((trained[name] != old).sum()) for name, old in self.untrained.items())
            return _counts(list(trained.values()), sum(map(torch.numel, trained.values())), moved)
        assert self.folder is not None
        initial, trained = adapter.read(self.folder), adapter.read(end)
        moved = 0
        for name, old in initial.items():
            mask = adapter.full_mask(name, self.active[name], old)  # True where an element trains
            new = trained[name]
            # Bits are compared, because NaN is unequal to itself, and -0 is equal to 0.
            changed, frozen = new.view(torch.int32) != old.view(torch.int32), ~mask
            number = int(changed[frozen].sum())
            if number:  # no `assert`, which `python -O` leaves out
                raise AssertionError(f"{name}: {number} frozen elements changed")
            moved += int(changed[mask].sum())
        active = sum(int(mask.sum()) for mask in self.active.values())
        return {**_counts(list(self.active.values()), active, moved), "frozen_drift": 0.0}


def _counts(tensors: list[Tensor], active: int, moved: int) -> dict[str, Any]:
    total = sum(map(torch.numel, tensors))
    return {"elements": total, "active": active, "active_share": active / total, "moved": moved}


@dataclass(frozen=True, kw_only=True)
class Training:
    """The sections of SFT or RL, and what both make of them."""

    context: Any
    """The stage's `StageContext`."""
    section: SftSection | RlSection
    """The section of the stage itself."""
    model: ModelSection
    prompt: PromptSection
    modes: ModesSection | None
    lora: LoraSection
    baseline: BaselineSection | None
    seed: int

    @cached_property
    def labels(self) -> list[Labelled]:
        return read_labels(self.context.labels)

    @cached_property
    def renderers(self) -> dict[str, Renderer]:
        """The renderer of each mode, or one under ""."""
        return renderers_of(load_tokenizer(self.model), self.section.prompt or self.prompt, self.modes)

    @property
    def renderer(self) -> Renderer:
        """The renderer of a question in no particular mode."""
        return self.renderers[AUTO if self.modes else ""]

    @cached_property
    def start(self) -> StartingAdapter:
        """The other stage's adapter or the initial one, with the elements that train."""
        partition = self.context.partition
        active = Masks.load(partition.path, partition.manifest["variant"]).active if partition else None
        return StartingAdapter(self.context.adapter, active)

    def attach(self, base: PreTrainedModel) -> PeftModel:
        """Put the adapter on the base."""
        folder, dropout = self.start.folder, self.section.lora_dropout
        if self.baseline is not None:
            return baselines.attach(base, self.baseline, self.seed, folder)
        assert folder is not None
        return adapter.attach(base, self.lora, folder, dropout)
