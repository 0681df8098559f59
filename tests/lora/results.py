"""What tests read of the artifacts of a run."""

import json
from pathlib import Path

from conftest import make_steps

from stages.config import Config
from stages.store.artifacts import Artifact


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
