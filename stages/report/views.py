"""The modes of a trained model: which adapter answers at once, and which works an answer out."""

from __future__ import annotations

from dataclasses import dataclass

from stages.config import SYSTEMS, TRAINED, Config, PromptSection
from stages.errors import ArtifactError
from stages.store.artifacts import Artifact


@dataclass(frozen=True)
class View:
    """A mode of a model, which has a trained adapter."""

    target: str
    """Target of the evaluation that has this adapter."""
    description: str
    method: str
    """Training method, as the card names it."""

    @property
    def system(self) -> int:
        """System whose rows the adapter learned from."""
        return SYSTEMS[self.target]

    @property
    def step(self) -> str:
        """Step that trained the adapter."""
        return TRAINED[self.target]

    @property
    def stage(self) -> str:
        return self.step.partition(":")[0]


VIEWS = (
    View("sft", "answers at once", "SFT"),
    View("sft2", "works it out", "SFT"),
    View("rl", "works it out", "GRPO"),
)


def views_of(config: Config) -> dict[str, View]:
    """Return the two modes that are exported or served together, by their names."""
    by_target = {view.target: view for view in VIEWS}
    return {mode: by_target[target] for mode, target in config.eval.modes.items()}


def prompt_of(config: Config, view: View) -> PromptSection:
    """Return the prompt settings that a mode was trained with."""
    section: PromptSection = getattr(config, view.stage).prompt or config.prompt
    return section


def view_of(artifact: Artifact) -> View:
    """Return the mode that the artifact's step trains.

    Raises ArtifactError if the manifest names a step that trains no mode, as one that was edited may.
    """
    stage, variant = artifact.manifest["stage"], artifact.manifest["identity"]["variant"]
    step = f"{stage}:{variant}" if variant else stage
    for view in VIEWS:
        if view.step == step:
            return view
    raise ArtifactError(f"{artifact.path} says it is of {step}, which trains no adapter")
