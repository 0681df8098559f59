"""Where each step stands, and why it is not current."""

from dataclasses import dataclass
from typing import Any

from stages.errors import ArtifactError, MissingInputError
from stages.pipeline.steps import Step
from stages.store.artifacts import Artifact, Store


@dataclass(frozen=True)
class State:
    """Where a step stands: `current`, `missing` (never made), `stale` or `damaged`, and why."""

    state: str
    why: str
    artifact: Artifact | None = None


def state(store: Store, step: Step) -> State:
    """Whether the artifact of a step is there, whole, and made from the inputs that are there now.

    A step is `missing` where no artifact of it was ever made; with other settings or inputs, it is `stale`.
    """
    try:
        artifact = store.load(store.folder(step.stage.name, step.key))
    except ArtifactError as error:
        return State("damaged", str(error))
    changed = None if artifact else _changed(store, step)
    if artifact is None and changed is None:
        interrupted = store.partial(step.stage.name, step.key).exists()
        return State("missing", "was interrupted" if interrupted else "not run yet")
    for name, upstream in step.inputs.items():
        above = state(store, upstream)
        if above.state != "current":
            first = above.why if above.state == "stale" else f"{name} is {above.state} ({above.why})"
            return State("stale", first, artifact)
        if (
            artifact
            and above.artifact
            and artifact.manifest["inputs"][name]["content"] != above.artifact.digest
        ):
            return State("stale", f"{name} was rebuilt", artifact)
    if artifact is None:
        return State("stale", changed or "")
    if damage := store.integrity_error(artifact):
        return State("damaged", damage, artifact)
    return State("current", f"{step.stage.name}/{step.key}", artifact)


def _changed(store: Store, step: Step) -> str | None:
    """What is not as in the last artifact of this step, which has another key; None if there is none."""
    try:
        last = store.latest(step.stage.name, step.variant)
    except ArtifactError:
        return "the last one, with other settings, is damaged"
    if last is None:
        return None
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


def current(store: Store, step: Step) -> Artifact:
    """The artifact of a step if it is current.

    Else ArtifactError or MissingInputError, with the command that helps.
    """
    now = state(store, step)
    if now.state == "current":
        assert now.artifact is not None
        return now.artifact
    if now.state == "damaged":
        raise ArtifactError(f"{step.name} is damaged: {now.why}", rebuild(store, step))
    raise MissingInputError(
        f"{step.name} is {now.state} ({now.why})",
        f"run: lorapar run CONFIG --to {step.stage.name}, with the same --set",
    )


def rebuild(store: Store, step: Step) -> str:
    """The hint for a damaged artifact: what is around it, such as journals of answers, is of use still."""
    return f"move {store.folder(step.stage.name, step.key)} away and run the same command again"
