"""Signals to every stage, alone or in a run: nothing stays behind, and the same command goes on."""

import os
import shutil
import signal
import subprocess
import time

import pytest
from conftest import LORAPAR, ROOT, config_file, descendants, needs_vllm, paths, processes, servers, wait_for
from tally import FULL

from stages.pipeline.resolve import load, resolved
from stages.pipeline.state import state
from stages.pipeline.steps import plan_steps
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
    file = config_file(config, tmp_path)
    every = [(stage, number, whole) for stage in STAGES for number in SIGNALS for whole in (False, True)]
    for stage, number, whole in every if FULL else tally.random.sample(every, 3):
        tally.tried += 1
        title = f"{stage}, {number.name}{' to the run' if whole else ''}"
        arguments = ["run", str(file), "--to", stage] if whole else [stage, str(file), "--force"]
        for before in STAGES[: STAGES.index(stage)]:
            subprocess.run([*LORAPAR, before, str(file)], cwd=ROOT, capture_output=True, check=True)
        longest, child = 9.0, None
        while child is None or child.poll() is not None:  # it was over before the signal
            if child is not None:
                child.communicate()
            if whole:
                shutil.rmtree(config.root / stage, ignore_errors=True)
            child = subprocess.Popen(
                [*LORAPAR, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
            )
            time.sleep(tally.random.uniform(0.3, longest))
            longest = max(1.0, longest / 2)
        child.send_signal(number)
        try:
            _, said = child.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            tally.hangs.append(title)
            child.kill()
            said = ""
        ours = number != signal.SIGINT or "lorapar_cli/app" in said or "stages/" in said
        if "defect of lorapar" in said or ("Traceback" in said and ours):  # Python's own beginning is not
            tally.tracebacks.append(f"{title}: {said[-300:]}")
        if child.returncode not in (0, 128 + number, -number):
            tally.lost.append(f"{title}: exit code {child.returncode}: {said[-300:]}")
        wait_for(lambda: not processes(str(file)), 15)
        tally.left += [f"{title}: process {left}" for left in processes(str(file))]
        ended = subprocess.run([*LORAPAR, stage, str(file)], cwd=ROOT, capture_output=True, text=True)
        steps = [step for step in plan_steps(config).values() if step.stage.name == stage]
        if ended.returncode or any(state(Store(config.root), s).state != "current" for s in steps):
            tally.lost.append(f"{title}: then code {ended.returncode}: {ended.stderr[-300:]}")


WAYS = [(who, number) for who in ("run", "group") for number in SIGNALS] + [("guard", signal.SIGKILL)]


@pytest.mark.vllm
@needs_vllm
def test_a_real_server_ends_in_every_way(tiny, demo_data, tmp_path, tally):
    """A vLLM server, starting or answering, ends with the run, and without its guard."""
    with descendants() as living:

        def ours():
            """Other tests on this machine may have servers, too."""
            return [line for line in servers() if int(line.split()[1]) in living()]

        for at, (who, number) in enumerate(WAYS if FULL else tally.random.sample(WAYS, 1)):
            tally.tried += 1
            folder = tmp_path / str(at)  # else its votes would be there, and no server needed
            folder.mkdir()
            voters = "classify.voters=[{engine: vllm, persona: judge}]"
            settings = [*paths(tiny, demo_data, folder), "data.limit=360", voters]
            file = config_file(load(ROOT / "configs/smoke.yaml", settings), folder)
            command = [*LORAPAR, "run", str(file), "--to", "classify"]
            child = subprocess.Popen(
                command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
            )
            answering = tally.random.random() < 0.5
            for line in child.stderr:
                if ("server ready" if answering else "starting a vLLM server") in line:
                    break
            time.sleep(tally.random.uniform(0.3, 1) if answering else tally.random.uniform(2, 15))
            assert ours(), f"{who}, {number.name}: no server to be ended"
            if who == "group":
                os.killpg(child.pid, number)
            else:
                guards = [pid for pid in processes("process_guard.py") if pid in living()]
                os.kill(child.pid if who == "run" else guards[0], number)
            try:
                child.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                tally.hangs.append(f"{who}, {number.name}")
                child.kill()
            wait_for(lambda file=file: not (ours() or processes(str(file))), 20)
            tally.left += [f"{who}, {number.name}: {line}" for line in (*ours(), *processes(str(file)))]
