"""The first argument of every stage function: its inputs, and where its output goes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.engines import EngineCache
from stages.progress import Progress
from stages.store.artifacts import Artifact
from stages.store.checkpoints import Checkpoints


@dataclass(frozen=True)
class StageContext:
    """One step to be done. A stage function is called as `run(context, **sections)`."""

    variant: str
    out: Path
    """The empty folder that the stage writes into."""
    inputs: Mapping[str, Artifact]
    """Input artifacts by step, such as `eval:sft@demo`, and by stage: the last one if there are several."""
    outside: Mapping[str, Any]
    """Digests of the data and models outside of the run, by the names in `Planned.reads`."""
    journals: Path
    """The folder of all runs, which holds the journals of votes and answers."""
    checkpoints: Checkpoints
    dtype: str
    """The dtype in which this machine loads the model; empty if the stage loads none."""
    force: bool
    """True if existing results are to be computed again (--force)."""
    engines: EngineCache
    progress: Progress

    @property
    def labels(self) -> Path:
        return self.inputs["classify"].path / "labels.jsonl"

    @property
    def adapter(self) -> Path | None:
        """The adapter folder of the last of its inputs that has one: what it starts from, or grades."""
        folders = (artifact.adapter for artifact in self.inputs.values() if artifact.has_adapter)
        return next(reversed(list(folders)), None)

    @property
    def partition(self) -> Artifact | None:
        """The artifact with the masks; a baseline has none."""
        return self.inputs.get("partition")
