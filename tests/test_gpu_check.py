"""`make gpu-check` without a GPU: what its parts see, lack and say, and what its benchmarks hold."""

import importlib
import re
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import ROOT

from stages.config import LoraSection, ModelSection
from stages.lora.adapter import adapter
from stages.models.base import load_base


@pytest.fixture
def script(monkeypatch):
    """Imports a script of `benchmarks/`."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def test_a_row_says_what_it_lacks_what_it_found_and_how_it_failed(script, tmp_path):
    gpu = script("gpu")

    def row(code, minutes=1, **more):
        part = gpu.Part("part", lambda model, _: ["-c", code, model()], r"^.*tokens/s", minutes, **more)
        one = gpu.line(part, lambda: "a/model", tmp_path, time.monotonic() + 60)
        return one["code"], one["findings"]

    assert row("import sys; print(sys.argv[1]); print('7 tokens/s, or so')") == (0, ["7 tokens/s"])
    assert row("print('7 tokens/s'); raise SystemExit('broken')") == (
        1,
        ["7 tokens/s", "7 tokens/s", "broken"],
    )
    assert row("raise SystemExit('broken')", needs=["json", "no_such"]) == (0, ["skipped: no no_such"])
    assert row("raise SystemExit('broken')", gpus=99)[1] == [
        f"skipped: {torch.cuda.device_count()} GPUs of 99"
    ]


def test_a_part_that_takes_too_long_is_killed_with_all_it_started(script, tmp_path):
    gpu = script("gpu")
    code = "import subprocess, sys; print('7 tokens/s', flush=True); subprocess.run(['sleep', '987654'])"
    part = gpu.Part("part", lambda *_: ["-c", code], r"^.*tokens/s", 0.02)
    row = gpu.line(part, str, tmp_path, time.monotonic() + 60)
    assert (
        row["code"] == "none" and row["findings"][0] == "7 tokens/s" and "killed after 1 s" in row["findings"]
    )
    assert not [p.pid for p in psutil.process_iter(["cmdline"]) if "987654" in (p.info["cmdline"] or [])]


@pytest.mark.slow
def test_every_stage_at_the_papers_shapes(script):
    """In miniature: each has a line with its time, its memory beside plan's, and no drift."""
    script_file = ROOT / "benchmarks/shapes.py"
    done = subprocess.run([sys.executable, script_file, "tiny"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = {line.partition(":")[0]: line for line in done.stdout.splitlines()}
    assert {"score", "sft", "rl", "tiny"} <= lines.keys() and script("shapes").FITS in lines["tiny"]
    for stage in ("sft", "rl"):
        planned, drift = re.search(r"([\d,]+) planned; frozen_drift (\S+)", lines[stage]).groups()
        assert int(planned.replace(",", "")) > 100 and float(drift) == 0


def test_both_sides_of_a_benchmark_stand_on_one_base(script, tiny):
    """And neither sees the other's adapter."""
    base = load_base(ModelSection(name=str(tiny)))
    ids = torch.arange(5, 15, device=base.device)[None]
    with torch.no_grad():
        wanted = base(ids).logits
        sides = [script("measure").twin(base) for _ in range(2)]
        model = adapter.initial(sides[0], LoraSection(std=1.0), 0)
        assert not torch.equal(model(ids).logits, wanted)
        assert torch.equal(sides[1](ids).logits, wanted)
    weights = [{weight.data_ptr() for weight in side.parameters()} for side in (base, sides[1])]
    assert weights[0] == weights[1] <= {weight.data_ptr() for weight in model.parameters()}
