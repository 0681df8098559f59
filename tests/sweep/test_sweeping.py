"""What `sweep` says before and after, its view meanwhile, and what it refuses at once."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from conftest import ROOT

from lorapar_cli import sweep
from stages.errors import ConfigError
from stages.sweep.local import Outcome

TABLE = """
title: Two masks
base: base.yaml
rows: {one: {partition.theta: 0.9}, two: {partition.theta: 0.5}}
seeds: [1, 2]
columns: {SFT: sft@demo}
"""


@pytest.fixture
def two(tiny, demo_data, tmp_path) -> list[Path]:
    """Two table files on the smoke config."""
    base = tmp_path / "base.yaml"
    base.write_text(
        f"extends: {ROOT / 'configs/smoke.yaml'}\nruns_dir: {tmp_path / 'runs'}\nmodel: {{name: {tiny}}}\n"
        f"data: {{path: {demo_data / 'train.jsonl'}}}\n"
        f"eval: {{benchmarks: {{demo: {{path: {demo_data / 'test.jsonl'}}}}}}}\n"
    )
    found = []
    for path in (tmp_path / "a.yaml", tmp_path / "b.yaml"):
        path.write_text(TABLE)
        found.append(path)
    return found


def test_mistakes_of_all_tables_are_said_at_once(two, lorapar):
    for path, column in zip(two, ("dpo@demo", "ppo@demo"), strict=True):
        path.write_text(TABLE.replace("sft@demo", column))
    for command in (("sweep", *two, "--dry-run"), ("report", *two, "--out", two[0].with_name("out"))):
        done = lorapar(*command)
        assert done.code == 78 and "no row has dpo@demo" in done.err and "no row has ppo@demo" in done.err
    assert not two[0].with_name("out").exists()


def test_two_missing_files_are_missing_files(tmp_path, lorapar):
    done = lorapar("sweep", tmp_path / "a.yaml", tmp_path / "b.yaml", "--dry-run")
    assert done.code == 66 and "a.yaml" in done.err and "b.yaml" in done.err
    assert "hint: an example: lorapar init --example tables/" in done.err
    done = lorapar("report", tmp_path / "none.yaml", "--out", tmp_path / "out")
    assert done.code == 66 and "no file" in done.err and not (tmp_path / "out").exists()


def test_devices_are_those_that_are_visible(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert sweep._slots(3, None) == [None] * 3 and sweep._slots(None, "0+1,2 + 3") == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert sweep._slots(None, "4, 5") == ["4", "5"]
    with pytest.raises(ConfigError, match="--devices 0,5: 0 is not in CUDA_VISIBLE_DEVICES=4,5"):
        sweep._slots(None, "0,5")


@pytest.mark.parametrize("devices", ["0,,1", "0+", "", "0,1+0"])
def test_devices_that_are_none(devices):
    with pytest.raises(ConfigError, match=re.escape(f"--devices {devices}: ")):
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
