"""`make gpu-check` without a GPU: what its parts see, lack and say."""

import importlib

import psutil
import pytest
import torch
from conftest import ROOT


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu")


@pytest.mark.parametrize(("visible", "seen"), [(None, "0"), ("3,1", "3"), ("GPU-5a,GPU-7b", "GPU-5a")])
def test_a_row_says_what_it_lacks_what_it_found_and_how_it_failed(gpu, monkeypatch, tmp_path, visible, seen):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    def row(code, **more):
        part = gpu.Part("part", lambda model, _: ["-c", code, model()], r"^.*tokens/s", 1, **more)
        line = gpu.line(part, lambda: "a/model", tmp_path)
        return line["code"], line["findings"]

    device = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], 'tokens/s, or so')"
    assert row(device) == (0, [f"{seen} tokens/s"])  # a part of one device gets the first that is visible
    failed = row("print('7 tokens/s'); raise SystemExit('broken')")
    assert failed == (1, ["7 tokens/s", "7 tokens/s", "broken"])
    assert row("raise SystemExit('broken')", needs=["json", "no_such"]) == (0, ["skipped: no no_such"])
    skipped = row("raise SystemExit('broken')", gpus=99)[1]
    assert skipped == [f"skipped: {torch.cuda.device_count()} GPUs of 99"]


def test_a_part_that_takes_too_long_is_killed_with_all_it_started(gpu, tmp_path):
    code = "import subprocess, sys; print('7 tokens/s', flush=True); subprocess.run(['sleep', '987654'])"
    part = gpu.Part("part", lambda *_: ["-c", code], r"^.*tokens/s", 0.02)
    row = gpu.line(part, str, tmp_path)
    assert row["code"] == "none" and {"7 tokens/s", "killed after 1 s"} <= set(row["findings"])
    assert not [p.pid for p in psutil.process_iter(["cmdline"]) if "987654" in (p.info["cmdline"] or [])]
