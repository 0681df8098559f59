"""A GPU that torch cannot use ends a run before its first vote, unless the CPU is asked for."""

import os

import pytest
import torch
import typer
from conftest import ROOT, flags

from lorapar_cli import doctor
from stages.config import ModelSection
from stages.errors import ConfigError
from stages.models import base
from stages.runtime import gpu

TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040)"


@pytest.fixture
def old_driver(monkeypatch, tmp_path):
    """A machine whose driver is older than torch's CUDA."""

    def init():
        raise RuntimeError(f"{TOO_OLD}. Please update your GPU driver by downloading a new version.")

    monkeypatch.setattr(gpu, "DEVICE_FILE", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setenv(gpu.VISIBLE, "0")


def test_the_reason_is_torch_s_own(old_driver, monkeypatch, tmp_path):
    assert gpu.unusable_reason() == TOO_OLD
    monkeypatch.setattr(torch.version, "cuda", None)
    assert gpu.unusable_reason() == f"torch {torch.__version__} is built without CUDA"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu.unusable_reason() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.is_visible()
    gpu.hide()
    assert gpu.unusable_reason() is None and not gpu.is_visible()
    monkeypatch.delenv(gpu.VISIBLE)
    monkeypatch.setattr(gpu, "DEVICE_FILE", tmp_path / "none")
    assert gpu.unusable_reason() is None


def test_doctor_names_it_and_fails(old_driver, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: [doctor._device()])
    with pytest.raises(typer.Exit) as caught:
        doctor.command()
    assert caught.value.exit_code == 1
    said = f"- device               torch cannot use the NVIDIA GPU: {TOO_OLD}; update"
    assert said in capsys.readouterr().out


def test_no_base_is_loaded(old_driver, tiny):
    with pytest.raises(ConfigError, match=r"too old \(found version 11040\)$") as caught:
        base.load_base(ModelSection(name=str(tiny)))
    assert "go on without it: --set model.device=cpu" in caught.value.hint


def test_a_run_s_check_stops_unless_the_cpu_is_asked_for(old_driver, lorapar, own):
    check = ["plan", ROOT / "configs/smoke.yaml", "--check", *flags(*own.home)]
    stopped = lorapar(*check)
    assert stopped.code == 65 and TOO_OLD in stopped.err and "--set model.device=cpu" in stopped.err
    assert lorapar(*check, "--set", "model.device=cpu").code == 0
    assert os.environ[gpu.VISIBLE] == ""  # also for what is started from here
