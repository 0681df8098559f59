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
from conftest import ROOT, config_file, paths
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
        self.folder, self.runs = folder, folder / "runs"
        settings = [*paths(tiny, data, folder), *SETTINGS]
        self.config = resolved(load(ROOT / "configs/smoke.yaml", settings))
        self.file = config_file(self.config, folder)
        self.files, self.counts = dict[str, dict](), dict[str, int]()
        self.runs.mkdir()
        for stage in STAGES:
            shutil.copytree(self.runs, folder / f"before-{stage}", symlinks=True)
            counted = folder / f"count-{stage}"
            ended = self.make(stage, partial(forked.writes, self.runs, forked.counting(counted)))
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


def hurt(pipeline: Pipeline, tally: Tally, stage: str, title: str, fault: Callable, *ends: int) -> None:
    """The stage with a fault, and then without: the same artifacts, byte by byte.

    ends: exit codes that the fault may give. A disk that refuses is 73, or nothing that counts: links and
    caches may be missing.
    """
    pipeline.back_to(stage)
    tally.tried += 1
    ended = pipeline.make(stage, fault)
    if ended.traceback:
        tally.tracebacks.append(f"{title}: {ended.said[-400:]}")
    elif ended.code is None:
        tally.hangs.append(title)
    elif ended.code not in ends:
        tally.lost.append(f"{title}: exit code {ended.code}: {ended.said[-300:]}")
    ended, made = pipeline.make(stage), pipeline.made(stage)
    if ended.code is None:
        tally.hangs.append(title)
    elif ended.code or made != pipeline.files[stage]:
        other = [
            f"{step}/{name}"
            for step, files in pipeline.files[stage].items()
            for name in files
            if made.get(step, {}).get(name) != files[name]
        ]
        tally.lost.append(f"{title}: then code {ended.code}, unlike: {other}: {ended.said[-200:]}")


AT_MOST = {"kill": None, "ENOSPC": None, "EACCES": None, "EIO": 40, "EMFILE": 40}
"""What happens at a write → at how many of them it is tried, at random; None for each one."""


@pytest.mark.parametrize("what", AT_MOST)
def test_faults_at_writes(pipeline, tally, what):
    """A kill before one write, or errors from one on, as on a disk that is full or read-only."""
    every = [(stage, n) for stage in STAGES for n in range(1, pipeline.counts[stage] + 1)]
    number = (AT_MOST[what] or len(every)) if FULL else 4
    for stage, at in sorted(tally.random.sample(every, number)):
        kills = what == "kill"
        act = forked.killed_at(at) if kills else forked.failing_from(at, getattr(errno, what))
        fault = partial(forked.writes, pipeline.runs, act)
        ends = [forked.KILLED] if kills else [0, 73]
        hurt(pipeline, tally, stage, f"{stage}, {what} at write {at}", fault, *ends)


@pytest.mark.parametrize("end", ["full disk", "kill"])
def test_in_the_middle_of_a_file(pipeline, tally, end):
    for _ in range(60 if FULL else 4):
        stage, largest = tally.random.choice(STAGES), int(2 ** tally.random.uniform(0, 16))
        title = f"{stage}, {end} after {largest} bytes of a file"
        fault = partial(forked.small_files, largest, end == "kill")
        ends = (0, 73, -signal.SIGXFSZ) if end == "kill" else (0, 73)
        hurt(pipeline, tally, stage, title, fault, *ends)
