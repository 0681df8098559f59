"""Signals to every stage, alone or in a run: nothing stays behind, and the same command goes on."""

import json
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, paths, processes
from tally import FULL

from stages.pipeline.plan import plan
from stages.pipeline.resolve import load, resolved
from stages.pipeline.state import state
from stages.store.artifacts import Store

pytestmark = pytest.mark.slow
STAGES = ["classify", "score", "partition", "sft", "rl", "eval"]
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGKILL]


def test_signals_at_random_moments(tiny, demo_data, tmp_path, tally):
    settings = [
        *paths(tiny, demo_data, tmp_path), "classify.strategy=known", "classify.known=intended",
        "score.examples=4", "data.limit=24", "sft.max_steps=4", "eval.benchmarks.demo.limit=4",
    ]  # fmt: skip
    config = resolved(load(ROOT / "configs/smoke.yaml", settings))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    command = [sys.executable, "-m", "lorapar_cli"]
    every = [(stage, number, whole) for stage in STAGES for number in SIGNALS for whole in (False, True)]
    for stage, number, whole in every if FULL else sorted(tally.random.sample(every, 3)):
        tally.tried += 1
        title = f"{stage}, {number.name}{' to the run' if whole else ''}"
        arguments = (
            ["run", str(file), "--from", stage, "--to", stage] if whole else [stage, str(file), "--force"]
        )
        for before in STAGES[: STAGES.index(stage)]:
            subprocess.run([*command, before, str(file)], cwd=ROOT, capture_output=True, check=True)
        child = subprocess.Popen(
            [*command, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        time.sleep(tally.random.uniform(0.1, 9))
        child.send_signal(number)
        try:
            _, said = child.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            tally.hangs.append(title)
            child.kill()
            said = ""
        if "defect of lorapar" in said or ("Traceback" in said and number != signal.SIGINT):
            tally.tracebacks.append(f"{title}: {said[-300:]}")
        deadline = time.monotonic() + 15
        while processes(str(file)) and time.monotonic() < deadline:
            time.sleep(0.1)
        tally.left += [f"{title}: process {left}" for left in processes(str(file))]
        ended = subprocess.run([*command, stage, str(file)], cwd=ROOT, capture_output=True, text=True)
        steps = [step for step in plan(config).values() if step.stage.name == stage]
        if ended.returncode or any(state(Store(config.root), s).state != "current" for s in steps):
            tally.lost.append(f"{title}: then code {ended.returncode}: {ended.stderr[-300:]}")
