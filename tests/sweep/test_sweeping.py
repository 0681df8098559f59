"""What `sweep` says at its end, and how it reads the devices and the parameters of jobs."""

import re
from types import SimpleNamespace

import pytest
import typer

from lorapar_cli import sweep
from stages.errors import ConfigError
from stages.sweep.steps import Outcome


def test_devices_are_those_that_are_visible(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert sweep._slots(3, None) == [None] * 3 and sweep._slots(None, "0+1,2 + 3") == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert sweep._slots(None, "4, 5") == ["4", "5"]
    wrong = {"0,5": "0 is not in CUDA_VISIBLE_DEVICES=4,5"}
    wrong |= dict.fromkeys(("0,,1", "0+", "", "0,1+0"), "expected numbers, separated by commas, each once")
    for devices, said in wrong.items():
        with pytest.raises(ConfigError, match=re.escape(f"--devices {devices}: {said}")):
            sweep._slots(None, devices)


def test_the_end_says_what_failed_and_why(tmp_path, capfd):
    def node(stage: str, *cells: tuple[str, int]) -> SimpleNamespace:
        step = SimpleNamespace(name=stage, key="0a1b")
        return SimpleNamespace(step=step, cells=[("t", row, seed) for row, seed in cells])

    log = tmp_path / "rl.log"
    ended = [
        Outcome(node("sft", ("one", 1)), "done", 0, log),
        Outcome(node("rl", ("one", 1), ("two", 2)), "failed", 65, log),
        Outcome(node("eval:rl@demo", ("two", 2)), "left out"),
    ]
    with pytest.raises(typer.Exit) as caught:
        sweep._report_failures(ended, 4)
    said = capfd.readouterr()
    assert caught.value.exit_code == 65 and "2 of 4 cells are not complete" in said.err
    rl, after = said.out.splitlines()[1:]
    assert re.match(r"rl 0a1b +failed +65 +see .*rl.log \(one, seed 1; two, seed 2\)", rl)
    assert re.match(r"eval:rl@demo 0a1b +left out +a step that it needs failed \(two, seed 2\)", after)


def test_parameters_of_jobs_are_read_as_settings_are():
    read = sweep._parameters(["timeout_min=5", "slurm_setup=[module load cuda]", "rl.mem_gb=8"])
    assert read == {"timeout_min": 5, "slurm_setup": ["module load cuda"], "rl.mem_gb": 8}
    with pytest.raises(ConfigError, match="--slurm timeout_min: expected KEY=VALUE"):
        sweep._parameters(["timeout_min"])
