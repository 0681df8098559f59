"""`make gpu-check` without a GPU: what its parts see, lack and say, and what its benchmarks hold."""

import importlib
import time

import psutil
import pytest
import torch
from conftest import ROOT

from stages.config import ModelSection
from stages.models.base import load_base


@pytest.fixture
def script(monkeypatch):
    """Imports a script of `benchmarks/`."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@pytest.mark.parametrize(
    ("given", "seen"), [(None, "0"), ("2", "2"), ("3,1", "3"), ("GPU-5a,GPU-7b", "GPU-5a")]
)
def test_a_part_of_one_device_gets_the_first_that_was_given(script, monkeypatch, given, seen):
    gpu = script("gpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    parts = {part.group: gpu.seen_by(part) for part in gpu.parts(small=False)}
    alone = {"CUDA_VISIBLE_DEVICES": seen}
    assert parts == dict.fromkeys(gpu.NAMES, alone) | {"server": {}, "processes": {}}


def test_a_row_says_what_it_lacks_what_it_found_and_how_it_failed(script, tmp_path):
    gpu = script("gpu")

    def row(code, minutes=1, **more):
        part = gpu.Part("part", lambda model, _: ["-c", code, model()], r"^.*tokens/s", minutes, **more)
        one = gpu.line(part, lambda: "a/model", tmp_path, time.monotonic() + 60)
        return one["code"], one["findings"]

    assert row("import sys; print(sys.argv[1]); print('7 tokens/s, or so')") == (0, ["7 tokens/s"])
    failed = row("print('7 tokens/s'); raise SystemExit('broken')")
    assert failed == (1, ["7 tokens/s", "7 tokens/s", "broken"])
    assert row("raise SystemExit('broken')", needs=["json", "no_such"]) == (0, ["skipped: no no_such"])
    skipped = row("raise SystemExit('broken')", gpus=99)[1]
    assert skipped == [f"skipped: {torch.cuda.device_count()} GPUs of 99"]


def test_a_part_that_takes_too_long_is_killed_with_all_it_started(script, tmp_path):
    gpu = script("gpu")
    code = "import subprocess, sys; print('7 tokens/s', flush=True); subprocess.run(['sleep', '987654'])"
    part = gpu.Part("part", lambda *_: ["-c", code], r"^.*tokens/s", 0.02)
    row = gpu.line(part, str, tmp_path, time.monotonic() + 60)
    assert row["code"] == "none" and {"7 tokens/s", "killed after 1 s"} <= set(row["findings"])
    assert not [p.pid for p in psutil.process_iter(["cmdline"]) if "987654" in (p.info["cmdline"] or [])]


def test_a_small_card_is_given_the_model_that_a_checkpoint_in_4_bits_gives(script, tiny):
    """The weights are quantized layer by layer, as no checkpoint of them is written."""
    pytest.importorskip("bitsandbytes")
    section = ModelSection(name=str(tiny), dtype="float32")
    loaded = load_base(section.model_copy(update={"load_in_4bit": True}))
    ours = script("shapes").in_four_bits(load_base(section), loaded.hf_quantizer.quantization_config)
    ids = torch.arange(5, 25)[None]
    assert torch.equal(ours(ids).logits, loaded(ids).logits)
    assert ours.hf_quantizer.is_trainable and not torch.equal(
        ours(ids).logits, load_base(section)(ids).logits
    )
