"""What `sweep` says before and after, its view meanwhile, and what it refuses at once."""

import re
from types import SimpleNamespace

import pytest
import typer
from conftest import ROOT

from lorapar_cli import sweep
from stages.errors import ConfigError
from stages.sweep.steps import Outcome

TABLE = """
title: Two masks
base: base.yaml
rows: {one: {partition.theta: 0.9}, two: {partition.theta: 0.5}}
seeds: [1, 2]
columns: {SFT: sft@demo}
"""


def test_a_wrong_table_and_a_missing_file_stop_all(tiny, demo_data, tmp_path, lorapar):
    base = tmp_path / "base.yaml"
    base.write_text(
        f"extends: {ROOT / 'configs/smoke.yaml'}\nruns_dir: {tmp_path / 'runs'}\nmodel: {{name: {tiny}}}\n"
        f"data: {{path: {demo_data / 'train.jsonl'}}}\n"
        f"eval: {{benchmarks: {{demo: {{path: {demo_data / 'test.jsonl'}}}}}}}\n"
    )
    good, wrong, out = tmp_path / "good.yaml", tmp_path / "wrong.yaml", tmp_path / "out"
    good.write_text(TABLE)
    wrong.write_text(TABLE.replace("sft@demo", "dpo@demo"))
    for command in (("sweep", good, wrong, "--dry-run"), ("report", good, wrong, "--out", out)):
        done = lorapar(*command)
        assert done.code == 78 and "no row has dpo@demo" in done.err
    done = lorapar("sweep", good, tmp_path / "none.yaml", "--dry-run")
    assert done.code == 66 and "none.yaml\n  hint: an example: lorapar init --example tables/" in done.err
    done = lorapar("report", tmp_path / "none.yaml", "--out", out)
    assert done.code == 66 and "no file" in done.err and not out.exists()


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
