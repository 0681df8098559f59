"""A pipeline that is killed, or refused, at its writes ends in the same artifacts when it is run again."""

import errno
import json
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import forked
import pytest
from conftest import ROOT, paths
from tally import FULL, Tally

from stages.pipeline.resolve import load, resolved
from stages.pipeline.state import state
from stages.pipeline.steps import plan_steps
from stages.store.artifacts import Artifact, Store

pytestmark = pytest.mark.slow
HISTORY = "history.json"
STAGES = ["classify", "score", "partition", "sft", "rl", "eval"]
SETTINGS = [
    "classify.voters=[{persona: steps, engine: transformers}]", "classify.system2_share=0.5",
    "classify.known=intended", "score.examples=2", "data.limit=16",
    "sft.max_steps=2", "sft.save_steps=1", "rl.max_steps=2", "rl.save_steps=1", "rl.max_completion_length=4",
    "eval.targets=[sft]", "eval.benchmarks.demo.limit=4", "eval.benchmarks.demo.max_new_tokens=4",
]  # fmt: skip


class Pipeline:
    """A config in a folder of its own, with the stages before one made once and for all."""

    def __init__(self, folder: Path, tiny: Path, data: Path) -> None:
        self.folder = folder
        self.runs = folder / "runs"
        settings = [*paths(tiny, data, folder), *SETTINGS]
        self.config = resolved(load(ROOT / "configs/smoke.yaml", settings))
        self.file = folder / "config.json"
        self.file.write_text(json.dumps(self.config.model_dump(mode="json")), encoding="utf-8")
        self.files: dict[str, dict] = {}
        self.counts: dict[str, int] = {}
        for stage in STAGES:
            self.runs.mkdir(exist_ok=True)
            shutil.copytree(self.runs, folder / f"before-{stage}", symlinks=True)
            counted = folder / f"count-{stage}"
            count = partial(forked.writes, self.runs, forked.counting(counted))
            ended = self.make(stage, count)
            assert ended.code == 0, ended.said
            self.counts[stage] = int(counted.read_text(encoding="utf-8"))
            self.files[stage] = self.made(stage)

    def back_to(self, stage: str) -> None:
        """As before the stage."""
        shutil.rmtree(self.runs, ignore_errors=True)
        shutil.copytree(self.folder / f"before-{stage}", self.runs, symlinks=True)

    def make(self, stage: str, before: Callable[[], None] = lambda: None) -> forked.Ended:
        return forked.command([stage, str(self.file)], before)

    def made(self, stage: str) -> dict[str, dict]:
        """The files of the stage's artifacts, by step."""
        store = Store(self.config.root)
        states = {n: state(store, s) for n, s in plan_steps(self.config).items() if s.stage.name == stage}
        return {n: content(s.artifact) for n, s in states.items() if s.state == "current" and s.artifact}


def content(artifact: Artifact) -> dict[str, object]:
    """Its files, by name: their digests, and the history without the time that each step took."""
    files: dict[str, object] = dict(artifact.manifest["files"])
    if HISTORY in files:
        rows = json.loads((artifact.path / HISTORY).read_text(encoding="utf-8"))
        files[HISTORY] = [{name: v for name, v in row.items() if name != "step_time"} for row in rows]
    return files


@pytest.fixture(scope="module")
def pipeline(tiny, demo_data, tmp_path_factory) -> Pipeline:
    return Pipeline(tmp_path_factory.mktemp("torture"), tiny, demo_data)


def again(pipeline: Pipeline, tally: Tally, stage: str, title: str) -> None:
    """The same command, without the fault: the same artifacts, byte by byte."""
    ended = pipeline.make(stage)
    if ended.code is None:
        tally.hangs.append(title)
    elif ended.code or pipeline.made(stage) != pipeline.files[stage]:
        made = pipeline.made(stage)
        other = [
            f"{step}/{name}"
            for step, files in pipeline.files[stage].items()
            for name in files
            if made.get(step, {}).get(name) != files[name]
        ]
        tally.lost.append(f"{title}: then code {ended.code}, unlike: {other}: {ended.said[-200:]}")


def points(pipeline: Pipeline, tally: Tally, number: int | None = None) -> list[tuple[str, int]]:
    """Writes of all stages: each one, so many of them at random, or a sample."""
    every = [(stage, n) for stage in STAGES for n in range(1, pipeline.counts[stage] + 1)]
    if FULL and number is None:
        return every
    return sorted(tally.random.sample(every, number if FULL and number else 4))


def test_kills_before_each_write(pipeline, tally):
    for stage, at in points(pipeline, tally):
        pipeline.back_to(stage)
        tally.tried += 1
        ended = pipeline.make(stage, partial(forked.writes, pipeline.runs, forked.killed_at(at)))
        if ended.code != forked.KILLED:
            tally.lost.append(f"{stage} {at}: not reached, code {ended.code}: {ended.said[-300:]}")
        again(pipeline, tally, stage, f"{stage}, killed at write {at}")


def _judge(ended: forked.Ended, tally: Tally, title: str) -> None:
    """A disk that refuses is code 73, or nothing that counts: links and caches may be missing."""
    if ended.traceback:
        tally.tracebacks.append(f"{title}: {ended.said[-400:]}")
    elif ended.code is None:
        tally.hangs.append(title)
    elif ended.code not in (0, 73):
        tally.lost.append(f"{title}: exit code {ended.code}: {ended.said[-300:]}")


AT_MOST = {"ENOSPC": None, "EACCES": None, "EIO": 40, "EMFILE": 40}


@pytest.mark.parametrize("error", AT_MOST)
def test_errors_from_each_write_on(pipeline, tally, error):
    number = getattr(errno, error)
    for stage, at in points(pipeline, tally, AT_MOST[error]):
        pipeline.back_to(stage)
        tally.tried += 1
        title = f"{stage}, {error} from write {at} on"
        ended = pipeline.make(stage, partial(forked.writes, pipeline.runs, forked.failing_from(at, number)))
        _judge(ended, tally, title)
        again(pipeline, tally, stage, title)


@pytest.mark.parametrize("end", ["full disk", "kill"])
def test_in_the_middle_of_a_file(pipeline, tally, end):
    kills = end == "kill"
    for _ in range(60 if FULL else 4):
        stage, largest = tally.random.choice(STAGES), int(2 ** tally.random.uniform(0, 16))
        pipeline.back_to(stage)
        tally.tried += 1
        title = f"{stage}, {end} after {largest} bytes of a file"
        ended = pipeline.make(stage, partial(forked.small_files, largest, kills))
        if not (kills and ended.code == -signal.SIGXFSZ):
            _judge(ended, tally, title)
        again(pipeline, tally, stage, title)
