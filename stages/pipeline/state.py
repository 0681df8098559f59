"""The state of each step: current, missing, stale or damaged, and why."""

from dataclasses import dataclass
from typing import Any

from stages.errors import ArtifactError, MissingInputError
from stages.pipeline.steps import Step
from stages.store.artifacts import Artifact, Store

NOT_THERE = "not there"
"""Value of a setting that an earlier lorapar did not have, or a later one has no more."""
READ = {"rows:train": "the rows of data.path"}
"""What is read from outside → what people call it, where its name does not say it."""
SHOWN = 4
"""Most changed settings that a reason names."""


@dataclass(frozen=True)
class State:
    """The state of a step: `current`, `missing` (never made), `stale` or `damaged`, and why."""

    state: str
    why: str
    artifact: Artifact | None = None


def state(store: Store, step: Step) -> State:
    """The state of a step: `current` if its artifact is undamaged and made from the current inputs.

    A step is `missing` if no artifact of it was ever made, `stale` if one was, from other settings or inputs.
    The store remembers it until an artifact is committed, or until `Store.look_again`.
    """
    if step.key not in store.states:
        store.states[step.key] = _state(store, step)
    return store.states[step.key]


def _state(store: Store, step: Step) -> State:
    try:
        artifact = store.load(store.folder(step.stage.name, step.key))
    except ArtifactError as error:
        return State("damaged", str(error))
    difference = None if artifact else _difference(store, step)
    if artifact and artifact.manifest["inputs"].keys() != step.inputs.keys():
        return State("damaged", f"{artifact.path}: its manifest names other inputs than it has", artifact)
    if artifact is None and difference is None:
        interrupted = store.partial(step.stage.name, step.key).exists()
        return State("missing", "not finished" if interrupted else "not run yet")
    for name, upstream in step.inputs.items():
        input_state = state(store, upstream)
        if input_state.state != "current":
            # A stale input is passed on with its first cause.
            why = f"{name} is {input_state.state} ({input_state.why})"
            return State("stale", input_state.why if input_state.state == "stale" else why, artifact)
        content = artifact and artifact.manifest["inputs"][name]["content"]
        if artifact and input_state.artifact and content != input_state.artifact.digest:
            return State("stale", f"{name} was rebuilt", artifact)
    if artifact is None:
        return State("stale", difference or "")
    if damage := store.integrity_error(artifact):
        return State("damaged", damage, artifact)
    return State("current", f"{step.stage.name}/{step.key}", artifact)


def _difference(store: Store, step: Step) -> str | None:
    """The difference from the last artifact of this step, which has another key; None if there is none."""
    try:
        last = store.latest(step.stage.name, step.variant)
    except ArtifactError:
        return "the last one, with other settings, is damaged"
    if last is None:
        return None
    old, new = leaves(last.manifest["identity"]), leaves(step.identity)
    # A setting of a later lorapar, even one whose value is None, differs from one that was not there.
    values = {name: (old.get(name, NOT_THERE), new.get(name, NOT_THERE)) for name in {**old, **new}}
    changed = [name for name, (before, now) in values.items() if before != now]
    if settings := [name for name in changed if name.startswith("config.")]:
        texts = ["{} was {}, now {}".format(n.removeprefix("config."), *values[n]) for n in settings]
        more = [f"and {len(texts) - SHOWN} settings more"] if len(texts) > SHOWN else []
        return ", ".join([*texts[:SHOWN], *more])
    if outside := [name.removeprefix("outside.") for name in changed if name.startswith("outside.")]:
        return f"{', '.join(READ.get(name, name) for name in outside)} changed"
    return f"{', '.join(n.removeprefix('inputs.') for n in changed)} changed"


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts, and of lists of dicts, by dotted path."""
    if isinstance(value, dict) and value:
        return {k: v for name, child in value.items() for k, v in leaves(child, f"{prefix}{name}.").items()}
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return {k: v for i, child in enumerate(value) for k, v in leaves(child, f"{prefix}{i}.").items()}
    return {prefix[:-1]: value}


def current_artifact(store: Store, step: Step) -> Artifact | None:
    now = state(store, step)
    return now.artifact if now.state == "current" else None


def require_current(store: Store, step: Step, wanted: Step | None = None) -> Artifact:
    """The artifact of a step; ArtifactError or MissingInputError, with what helps, unless it is current.

    wanted: a later step that needs it, and that the command of the hint makes, too.
    """
    refuse_damaged(store, step)
    if artifact := current_artifact(store, step):
        return artifact
    now = state(store, step)
    raise MissingInputError(
        f"{step.name} is {now.state} ({now.why})", f"lorapar run CONFIG --to {(wanted or step).stage.name}"
    )


def refuse_damaged(store: Store, step: Step) -> None:
    """Raise ArtifactError if the artifact is damaged. Journals beside it can still be used."""
    if (now := state(store, step)).state == "damaged":
        folder = store.folder(step.stage.name, step.key)
        hint = f"move {folder} away and run the same command again"
        raise ArtifactError(f"{step.name} is damaged: {now.why}", hint)
