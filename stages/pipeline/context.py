"""What every stage function gets beside its config sections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stages.engines import EngineCache
    from stages.progress import Progress
    from stages.store.artifacts import Artifact
    from stages.store.checkpoints import Checkpoints


@dataclass(frozen=True)
class StageContext:
    """One step to be done: a stage function is called as `run(job, **sections)`, by its table row."""

    variant: str
    out: Path
    """The empty folder it writes into."""
    inputs: Mapping[str, Artifact]
    """The artifacts that its row needs, by stage."""
    outside: Mapping[str, Any]
    """What its row says of data and models outside of the run."""
    journals: Path
    """The folder of all runs, below which votes and answers are kept."""
    checkpoints: Checkpoints
    dtype: str
    """The type in which the model of the config is loaded here; empty where the stage loads none."""
    again: bool
    """Whether what is there already is to be made anew."""
    engines: EngineCache
    progress: Progress

    @property
    def labels(self) -> Path:
        """The labels of the rows that it reads."""
        return self.inputs["classify"].path / "labels.jsonl"

    def adapter(self, *stages: str) -> Path | None:
        """The adapter folder of the first of these stages that is among its inputs."""
        return next((self.inputs[stage].adapter for stage in stages if stage in self.inputs), None)

    @property
    def masks(self) -> Path | None:
        """The artifact with the masks; a baseline has none."""
        return self.inputs["partition"].path if "partition" in self.inputs else None
