"""What one machine with a GPU has to show, in one command and one table.

    python benchmarks/gpu.py [--small] [--only PART …] [--out gpu.json]

Run it from the project's folder; where lorapar is not installed, with PYTHONPATH=. before it. Needs no hub:
its model has the shape of half a billion parameters and random weights. `--small` is every part in miniature,
for a machine without a GPU. Each part is a command with a limit in time, after which all that it started is
killed. A part that lacks a package or a second GPU is skipped and says so; one that fails stops no other.

- doctor: versions, driver, device, number types, sandbox.
- frozen: tests of frozen elements, equality with TRL, 4 bits and padding, on the device.
- resume: tests that kill a training and compare what goes on to the bit.
- colocated: how far log-probabilities of vLLM in the trainer's process are from the trainer's.
- sft, rl: time of a step and the peak of memory, against TRL on plain LoRA (`sft.py`, `rl.py`).
- pipeline: all six stages of the smoke config with vLLM for votes, rollouts and answers.
- processes: SFT and RL of the smoke config on two devices; without GPUs, too, but not on one GPU.
"""

import argparse
import functools
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import lorapar

from stages.data.demo import write
from stages.models.bundled import fetch

HERE = Path(__file__).parent
ROWS = "data/demo/train.jsonl"
PASSED = r"^.*\d+ passed.*"
TESTING = ("pytest", "hypothesis", "psutil")
"""Packages without which no test runs."""
SHAPE = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936,
    "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""Qwen2.5-0.5B's, with the special tokens of the tokenizer of `lorapar fetch tiny-random`."""


@dataclass(frozen=True)
class Part:
    """One line of the table."""

    name: str
    command: Callable[[Callable[[], str], str], list[str]]
    """Arguments after `python`, by a function that returns the model's folder, and by a scratch folder."""
    findings: str
    """A regular expression for what of its output goes into the table."""
    minutes: float
    needs: Sequence[str] = ()
    """Packages without which it is skipped."""
    gpus: int = 0
    """GPUs without which it is skipped; with several it sees all."""

    def lacks(self) -> str:
        """What is missing for it, or nothing."""
        missing = [f"no {name}" for name in self.needs if importlib.util.find_spec(name) is None]
        if self.gpus > torch.cuda.device_count():
            missing.append(f"{torch.cuda.device_count()} GPUs of {self.gpus}")
        return ", ".join(missing)


def parts(small: bool) -> list[Part]:
    def tests(*files: str, options: Sequence[str] = ()) -> Callable[..., list[str]]:
        return lambda *_: ["-m", "pytest", "-rs", *(f"tests/{file}.py" for file in files), *options]

    def against_trl(name: str, *options: str) -> Callable[..., list[str]]:
        return lambda model, _: [f"{HERE}/{name}.py", model(), *options]

    def smoke(*more: str) -> Callable[..., list[str]]:
        sets = ["data.limit=48", "eval.benchmarks.demo.limit=8", *more]
        return lambda model, scratch: lorapar(
            "run", "configs/smoke.yaml", settings=[f"model.name={model()}", f"runs_dir={scratch}", *sets]
        )[1:]

    facts = r"^[+ -] (?:device|driver|torch|transformers|peft|trl|vllm|model.dtype|sandbox).*"
    alike = ("packing/test_trainer_inputs", "lora/test_same_as_trl")
    pairs = ["--pairs", "2" if small else "5", "--dtype", "float32" if small else "bfloat16"]
    group = ["--prompts", "2", "--group", "4", "--micro-batch", "4", "--completion", "4-8"] if small else []
    served = ["classify.voters=[{engine: vllm}]", "eval.engine=vllm", "rl.rollouts.engine=vllm_colocate"]
    quick, real, drift = ["-m", "not slow and not vllm"], ["-k", "real_engine"], r"frozen_drift: [\d.]+"
    return [
        Part("doctor", lambda *_: ["-m", "lorapar_cli", "doctor"], facts, 1),
        Part(
            "frozen",
            tests("lora/test_four_bit", *alike, options=quick),
            PASSED,
            2,
            TESTING,
        ),
        Part("resume", tests("lora/test_resume", options=["-k", "mid_epoch"]), PASSED, 5, TESTING),
        Part("colocated", tests("lora/test_rollouts", options=real), PASSED, 5, [*TESTING, "vllm"]),
        Part("sft", against_trl("sft", ROWS, *pairs), r"^.*(?:ratio|peak).*", 2),
        Part("rl", against_trl("rl", *pairs, *group), r"^.*(?:ratio|peak).*", 2),
        Part("pipeline", smoke(*served), drift, 8, ["vllm"]),
        Part("processes", smoke("launch.processes=2"), drift, 8, gpus=2 if torch.cuda.is_available() else 0),
    ]


def write_model(small: bool, scratch: Path) -> str:
    """Write a model with random weights, and return its folder."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tiny = str(fetch("tiny-random", Path("models"))[0])
    if small:
        return tiny
    folder = scratch / "0.5b"
    AutoTokenizer.from_pretrained(tiny).save_pretrained(str(folder))
    (folder / "config.json").write_text(json.dumps(SHAPE), encoding="utf-8")
    # On the CPU: this process must not hold the GPU's memory.
    config = AutoConfig.from_pretrained(str(folder))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(str(folder))
    return str(folder)


def run(command: list[str], environment: dict[str, str], seconds: float) -> tuple[int | str, str]:
    """Run a command in a group of processes that all end with it; its exit code, and what it has written."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, **pipes, env=environment, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # what it started would go on to hold the GPU
        return "none", f"{process.communicate()[0]}\nkilled after {seconds:.0f} s"


def line(part: Part, model: Callable[[], str], scratch: Path) -> dict[str, Any]:
    """Run a part; its row of the table."""
    begun = time.monotonic()
    row: dict[str, Any] = {"part": part.name, "limit_s": round(60 * part.minutes), "code": 0, "seconds": 0}
    if lacking := part.lacks():
        return row | {"findings": [f"skipped: {lacking}"]}
    # A training in one process refuses to see several devices: it gets the first that is visible.
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    visible = {} if part.gpus else {"CUDA_VISIBLE_DEVICES": first}
    command = [sys.executable, *part.command(model, str(scratch / part.name))]
    row["code"], output = run(command, os.environ | visible, 60 * part.minutes)
    findings = re.findall(part.findings, output, re.MULTILINE)
    if row["code"] != 0:
        findings += output.strip().splitlines()[-3:]
    return row | {"seconds": round(time.monotonic() - begun), "findings": [text.strip() for text in findings]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", action="append", metavar="PART")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    given = parser.parse_args()
    if not given.small and not torch.cuda.is_available():
        parser.error("there is no GPU here; every part in miniature: --small")
    if not Path("data/demo").exists():
        write(Path("data/demo"), 0)
    rows = []
    print("part", "exit", "seconds", "limit", sep="\t")
    with tempfile.TemporaryDirectory() as scratch:
        model = functools.cache(lambda: write_model(given.small, Path(scratch)))
        for part in parts(given.small):
            if given.only and part.name not in given.only:
                continue
            rows.append(row := line(part, model, Path(scratch)))
            print(*(row[name] for name in ("part", "code", "seconds", "limit_s")), sep="\t")
            print(*(f"\t{text}" for text in row["findings"]), sep="\n", flush=True)
    given.out.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    sys.exit(any(row["code"] for row in rows))


if __name__ == "__main__":
    main()
