"""The pipeline on pretend GPUs (`pretend_gpu/device.py`): nothing is where CUDA would refuse it.

That such mistakes are seen is shown by putting in some.
"""

import json
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import LORAPAR, ROOT, flags, paths, wait_for
from pretend_gpu.faults import FAULTS, IN_TWO_PROCESSES

pytestmark = pytest.mark.slow

SMALL = ("data.limit=48", "eval.benchmarks.demo.limit=2", "eval.targets=[rl]", "sft.max_steps=2")
TWO = ["launch.processes=2"]
CASES = {
    "one": ["eval.targets=[base, init, sft, rl]"],
    "two": TWO,
    "sampled": [
        "rl.beta=0", "rl.system1_share=0.25", "lora.init=pissa", "eval.benchmarks.demo.temperature=0.7",
    ],
    "protected": ["partition.protect={old}", "eval.targets=[sft, rl]"],
    "checkpointed": ["sft.gradient_checkpointing=true", "rl.gradient_checkpointing=true", "lora.init=olora"],
    "ia3": ["baseline.method=ia3"],
}  # fmt: skip
"""Settings of runs; all stages of each are made."""
REWARD = "def odd(completions, **_):\n    return [sum(map(ord, text)) % 97 / 97 for text in completions]\n"


@dataclass
class Pretending:
    """Commands of lorapar in processes that see pretend GPUs."""

    home: Path
    settings: list[str]

    def command(self, name: str, *more: str, gpus: int = 1, fault: str = "") -> subprocess.Popen:
        environment = {
            "PYTHONPATH": f"{ROOT / 'tests/pretend_gpu'}{os.pathsep}{ROOT}", "PRETEND_GPUS": str(gpus),
            "PRETEND_REPORT": str(self.home), "PRETEND_FAULT": fault,
        }  # fmt: skip
        return subprocess.Popen(
            [*LORAPAR, name, "configs/smoke.yaml", *flags(*self.settings, *more)], cwd=ROOT,
            env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def finish(self, run: subprocess.Popen) -> tuple[str, list[str]]:
        """What a command says, and what was refused in all its processes; at least one must have computed."""
        said = run.communicate(timeout=600)[0]
        reports = [json.loads(file.read_text(encoding="utf-8")) for file in self.home.glob("*.json")]
        assert sum(report["calls"] for report in reports) > 1000
        return said, [refusal for report in reports for refusal in report["refused"]]


@pytest.fixture
def pretending(tiny, demo_data, tmp_path):
    (tmp_path / "mine.py").write_text(REWARD, encoding="utf-8")
    rewards = [f"rl.rewards_file={tmp_path / 'mine.py'}", "rl.rewards={odd: 1}"]
    return Pretending(tmp_path, [*paths(tiny, demo_data, tmp_path), *SMALL, *rewards])


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_on_a_wrong_device(pretending, demo_data, case):
    old = pretending.home / "old.jsonl"
    rows = (demo_data / "train.jsonl").read_text(encoding="utf-8").splitlines()
    old.write_text("\n".join(rows[-12:]), encoding="utf-8")
    settings = [setting.format(old=old) if "{old}" in setting else setting for setting in CASES[case]]
    run = pretending.command("run", *settings, gpus=2 if case == "two" else 1)
    said, refused = pretending.finish(run)
    assert (run.returncode, refused) == (0, []), said


def test_a_killed_training_goes_on(pretending):
    command = ("run", "eval.targets=[sft]", "sft.save_steps=1", "sft.max_steps=40")
    run = pretending.command(*command)
    assert wait_for(lambda: list(pretending.home.rglob("checkpoint-2")), 120)
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=600)
    run = pretending.command(*command)
    said, refused = pretending.finish(run)
    assert (run.returncode, refused) == (0, []) and "resuming from checkpoint-" in said, said


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_is_seen(pretending, fault):
    two = fault in IN_TWO_PROCESSES
    run = pretending.command("run", *(TWO if two else ()), gpus=2 if two else 1, fault=fault)
    said, refused = pretending.finish(run)
    assert run.returncode and refused, said
