"""A GPU that torch cannot use ends a run before its first vote, unless the CPU is asked for."""

import os
import re

import pytest
import torch
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


def test_the_reason_is_torch_s_own(old_driver, monkeypatch, tiny):
    with pytest.raises(ConfigError, match=f"{re.escape(TOO_OLD)}$"):
        base.load_base(ModelSection(name=str(tiny)))
    assert doctor._device()[2] is False
    monkeypatch.setattr(torch.version, "cuda", None)
    assert gpu.unusable_reason() == f"torch {torch.__version__} is built without CUDA"
    monkeypatch.setenv(gpu.VISIBLE, "")
    assert gpu.unusable_reason() is None and not gpu.is_visible()


def test_a_run_s_check_stops_unless_the_cpu_is_asked_for(old_driver, lorapar, own):
    check = ["plan", ROOT / "configs/smoke.yaml", "--check", *flags(*own.home)]
    stopped = lorapar(*check)
    assert stopped.code == 65 and TOO_OLD in stopped.err and "--set model.device=cpu" in stopped.err
    assert lorapar(*check, "--set", "model.device=cpu").code == 0
    assert os.environ[gpu.VISIBLE] == ""  # also for what is started from here
