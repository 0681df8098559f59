"""What one machine with a GPU has to show, in one command and one table.

    python benchmarks/gpu.py [--small] [--only PART …] [--out gpu.json]

Run it from the project's folder; where lorapar is not installed, with PYTHONPATH=. before it. Needs no hub:
models have random weights of real shapes, made on the device; the largest that is written has half a billion
parameters. `--small` is every part in miniature, for a machine without a GPU. Each part is a command of its
own with a limit in time, after which all that it started is killed, and none begins after `--minutes`. A part
that lacks a package or a second GPU is skipped and says so; one that fails stops no other. The first four
take nine minutes at most.

- doctor: versions, driver, device, number types, sandbox.
- frozen: tests of frozen elements, equality with TRL, 4 bits and padding, on the device.
- llama2-7b, qwen2.5-7b: score, SFT and RL at the paper's shapes: time, share of the device, memory beside
  what was planned (`shapes.py`). The last line of the table says on which card they fit.
- resume: tests that kill a training and compare what goes on to the bit.
- rollouts: tokens per second of lorapar's sampler, of TRL's, and of vLLM (`rollouts.py`).
- votes: per second, in this process and by vLLM (`classify.py`).
- colocated: how far log-probabilities of vLLM in the trainer's process are from the trainer's, by both of its
  model runners, also when it sleeps in optimizer steps.
- sft, rl: time of a step and the peak of memory, against TRL on plain LoRA (`sft.py`, `rl.py`).
- pipeline: all six stages of the smoke config with vLLM for votes, rollouts and answers.
- processes: score, SFT and RL of the smoke config on two devices, by DDP and FSDP2, and the tests of FSDP2;
  without GPUs, too, but not on one GPU.
- server: RL with completions of a vLLM server on another GPU, which gets weights by NCCL (`server.py`).
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measure import lorapar
from shapes import FITS, model_folder, random_model

from stages.data.demo import write
from stages.errors import LoraparError
from stages.models.bundled import fetch

HERE = Path(__file__).parent
WRITTEN = "0.5b"
"""Shape of the model whose weights are written, for vLLM and for both sides of a comparison."""
NAMES = (
    "doctor", "frozen", "llama2-7b", "qwen2.5-7b", "resume", "rollouts", "votes", "colocated",
    "sft", "rl", "pipeline", "processes", "server",
)  # fmt: skip
ROWS = "data/demo/train.jsonl"
PASSED = r"^.*\d+ passed.*"
TESTING = ("pytest", "hypothesis", "psutil")
"""Packages without which no test runs."""
FROZEN = r"(?:frozen_drift|base_held): [\d.]+"


Model = Callable[[], str]
"""Returns the folder of a model with weights, which it writes when first called."""


@dataclass(frozen=True)
class Part:
    """One line of the table."""

    name: str
    command: Callable[[Model, str], list[str]]
    """Arguments after `python`, by the model, and by a scratch folder."""
    findings: str
    """A regular expression for what of its output goes into the table."""
    minutes: float
    needs: Sequence[str] = ()
    """Packages without which it is skipped."""
    gpus: int = 0
    """GPUs without which it is skipped."""

    @property
    def group(self) -> str:
        return self.name.partition(",")[0]

    def lacks(self) -> str:
        """What is missing for it, or nothing."""
        missing = [f"no {name}" for name in self.needs if importlib.util.find_spec(name) is None]
        if self.gpus > torch.cuda.device_count():
            missing.append(f"{torch.cuda.device_count()} GPUs of {self.gpus}")
        return ", ".join(missing)


def tests(*files: str, options: Sequence[str] = ()) -> Callable[[Model, str], list[str]]:
    paths = [f"tests/{file}.py" for file in files]
    return lambda *_: ["-m", "pytest", "-rs", *paths, *options]


def script(name: str, *options: str) -> Callable[[Model, str], list[str]]:
    """One beside this file, which is given a model."""
    return lambda model, _: [f"{HERE}/{name}.py", model(), *options]


def smoke(model: str, scratch: str, *more: str) -> list[str]:
    sets = [
        f"model.name={model}",
        f"runs_dir={scratch}",
        "data.limit=48",
        "eval.benchmarks.demo.limit=8",
        *more,
    ]
    return lorapar("run", "configs/smoke.yaml", settings=sets)[1:]


def on(backend: str, processes: int) -> list[str]:
    launch = f"launch={{backend: {backend}, processes: {processes}}}"
    return [f"{stage}.{launch}" for stage in ("score", "sft", "rl")]


def at_shapes(small: bool) -> list[Part]:
    """The first four: what works at all, and what it takes at the paper's shapes."""
    facts = r"^[+ -] (?:device|driver|torch|transformers|peft|trl|vllm|model.dtype|sandbox).*"
    quick = ["-m", "not slow and not vllm"]
    alike = ("packing/test_trainer_inputs", "lora/test_same_as_trl")
    stages = rf"^(?:.*TFLOP/s|(?:score|sft|rl): .*|.*{FITS}.*)"
    shapes = ["tiny"] if small else ["llama2-7b", "qwen2.5-7b"]
    return [
        Part("doctor", lambda m, s: ["-m", "lorapar_cli", "doctor"], facts, 1),
        Part(
            "frozen",
            tests("lora/test_frozen", "lora/test_four_bit", *alike, options=quick),
            PASSED,
            2,
            TESTING,
        ),
        *(Part(shape, lambda m, s, shape=shape: [f"{HERE}/shapes.py", shape], stages, 3) for shape in shapes),
    ]


def compared(small: bool) -> list[Part]:
    """What other libraries do, beside ours, and what needs them."""
    few = ["--pairs", "2" if small else "5", "--dtype", "float32" if small else "bfloat16"]
    group = ["--prompts", "2", "--group", "4", "--micro-batch", "4", "--completion", "4-8"] if small else []
    sampled = ["--prompts", "2", "--group", "2", "--tokens", "8", "--rounds", "2"] if small else []
    voted = ["--rows", "8" if small else "256", "--rounds", "1"]
    speed = r"^.*(?:ratio|peak|TRL).*"
    served = [
        "classify.voters=[{persona: steps, engine: vllm}]", "eval.engine=vllm",
        "rl.rollouts.engine=vllm_colocate",
    ]  # fmt: skip
    real, colocated = ["-k", "real_engine"], r"^.*(?:model runner|\d+ passed).*"
    return [
        Part("resume", tests("lora/test_resume", options=["-k", "mid_epoch"]), PASSED, 5, TESTING),
        Part("rollouts", script("rollouts", *sampled), r"^.*(?:tokens/s| / |skipped).*", 3),
        Part("votes", script("classify", ROWS, *voted), r"^.*(?:rows/s|equal|skipped).*", 3),
        Part("colocated", tests("lora/test_rollouts", options=real), colocated, 5, [*TESTING, "vllm"]),
        Part("sft", script("sft", ROWS, *few), speed, 2),
        Part("rl", script("rl", *few, *group), speed, 2),
        Part("pipeline", lambda m, s: smoke(m(), s, *served), FROZEN, 8, ["vllm"]),
    ]


def several(small: bool) -> list[Part]:
    """Of two processes, which share smoke's rows evenly, each on a device of its own if there are any."""
    gpus = 2 if torch.cuda.is_available() else 0
    served = r"^the server takes.*|" + FROZEN
    return [
        Part("processes, ddp", lambda m, s: smoke(m(), s, *on("ddp", 2)), FROZEN, 8, gpus=gpus),
        Part("processes, fsdp2", lambda m, s: smoke(m(), s, *on("fsdp2", 2)), FROZEN, 8, gpus=gpus),
        Part("processes, tests", tests("lora/test_fsdp"), PASSED, 8, TESTING, gpus),
        Part("server", lambda m, s: [f"{HERE}/server.py", m(), s], served, 5, ["vllm"], gpus=gpus),
    ]


def parts(small: bool) -> list[Part]:
    return [*at_shapes(small), *compared(small), *several(small)]


def write_model(small: bool, scratch: Path) -> str:
    """Write a model with random weights, and return its folder."""
    if small:
        return str(fetch("tiny-random", Path("models"))[0])
    folder = model_folder(WRITTEN, scratch)
    # On the CPU: this process must not hold the GPU's memory.
    random_model(str(folder), torch.bfloat16, torch.device("cpu"), None).save_pretrained(str(folder))
    return str(folder)


def seen_by(part: Part) -> dict[str, str]:
    """A training in one process takes one device, and refuses to see several: the first that is visible."""
    if part.group in ("server", "processes"):
        return {}
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}


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


def line(part: Part, model: Model, scratch: Path, end: float) -> dict[str, Any]:
    """Run a part. end: of all parts, by the monotonic clock."""
    begun = time.monotonic()
    row: dict[str, Any] = {"part": part.name, "limit_s": round(60 * part.minutes), "code": 0, "seconds": 0}
    if lacking := part.lacks():
        return row | {"findings": [f"skipped: {lacking}"]}
    try:
        command = [sys.executable, *part.command(model, str(scratch / part.name))]
        if (left := end - time.monotonic()) <= 0:
            raise RuntimeError("no time is left for it")
        row["code"], output = run(command, os.environ | seen_by(part), min(60 * part.minutes, left))
    except (OSError, RuntimeError, LoraparError) as error:
        output, row["code"] = f"{type(error).__name__}: {error}", "none"
    findings = re.findall(part.findings, output, re.MULTILINE)
    if row["code"] != 0:
        findings += output.strip().splitlines()[-3:]
    return row | {
        "seconds": round(time.monotonic() - begun),
        "findings": [text.strip() for text in findings],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", action="append", choices=NAMES, metavar="PART", help=", ".join(NAMES))
    parser.add_argument(
        "--minutes", type=float, help="for all parts; 30, and with --small as long as it takes"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    given = parser.parse_args()
    if not given.small and not torch.cuda.is_available():
        parser.error("there is no GPU here; every part in miniature: --small")
    chosen = [part for part in parts(given.small) if not given.only or part.group in given.only]
    if not chosen:
        parser.error("with --small the shapes of large models are not there")
    if not Path("data/demo").exists():
        write(Path("data/demo"), 0)
    rows = []
    end = time.monotonic() + 60 * (given.minutes or (10**6 if given.small else 30))
    print("part", "exit", "seconds", "limit", sep="\t")
    with tempfile.TemporaryDirectory() as scratch:
        model = functools.cache(lambda: write_model(given.small, Path(scratch)))
        for part in chosen:
            if given.small:  # nothing is measured in miniature, and the machine may be slow
                part = replace(part, minutes=10 * part.minutes)
            rows.append(row := line(part, model, Path(scratch), end))
            print(*(row[name] for name in ("part", "code", "seconds", "limit_s")), sep="\t")
            print(*(f"\t{text}" for text in row["findings"]), sep="\n", flush=True)
    given.out.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    fits = [text for row in rows for text in row["findings"] if FITS in text]
    print("here:", "; ".join(fits) or "nothing was measured at the paper's shapes")
    sys.exit(any(row["code"] for row in rows))


if __name__ == "__main__":
    main()
