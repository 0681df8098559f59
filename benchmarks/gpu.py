"""What one machine with a GPU has to show, in one command and one table.

    python benchmarks/gpu.py [--small] [--only PART …] [--out gpu.json]

Needs no hub: models have random weights of real shapes (0.5 and 7 billion parameters), beside the small real
one. `--small` is every part in miniature, for a machine without a GPU. Each part is a command of its own
with a limit in time, and none begins or goes on after `--minutes`. The table says what it found, and how
long it took; a part that fails stops no other.

- doctor: versions, device, number types, sandbox.
- pipeline: all six stages of the smoke config with vLLM for votes, rollouts and answers, and that no frozen
  element moved.
- tests: on the device, those of frozen elements, exact resume, 4 bits, padding and equality with TRL.
- sft, rl: time of a step and the peak of memory, against TRL on plain LoRA (`sft.py`, `rl.py`).
- attention: of completions with one prompt, against FlexAttention and a prompt for each (`attention.py`).
- plan: what is planned against what is taken (`plan.py`).
- processes: score, SFT and RL of the smoke config on two devices, by DDP and FSDP2, and the tests of FSDP2;
  without GPUs, too, but not on one GPU.
- server: RL with completions of a vLLM server on another GPU, which gets weights by NCCL (`server.py`).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from stages.data.demo import write
from stages.errors import LoraparError
from stages.models.bundled import fetch

HERE = Path(__file__).parent
SHAPES = {  # of Qwen2.5-0.5B and LLaMA-2-7B
    "0.5b": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
             "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True},
    "7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
           "intermediate_size": 11008, "vocab_size": 32000, "tie_word_embeddings": False},
}  # fmt: skip
TOKENS = {"max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
"""The tokenizer is that of `lorapar fetch tiny-random`."""
NAMES = ("doctor", "pipeline", "tests", "sft", "rl", "attention", "plan", "processes", "server")
ROWS = "data/demo/train.jsonl"
TESTS = (
    "lora/test_frozen", "lora/test_resume", "lora/test_four_bit", "packing/test_trl", "lora/test_same_as_trl",
    "lora/test_rollouts",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One line of the table, or one for each of its models."""

    name: str
    command: Callable[[str, str], list[str]]
    """Arguments after `python`, by the folder of a model and a scratch folder."""
    found: str
    """A regular expression for what of its output goes into the table."""
    minutes: float
    model: str = "tiny-random"


def smoke(model: str, scratch: str, *more: str) -> list[str]:
    sets = [
        f"model.name={model}",
        f"runs_dir={scratch}",
        "data.limit=48",
        "eval.benchmarks.demo.limit=8",
        *more,
    ]
    return ["-m", "lorapar_cli", "run", "configs/smoke.yaml", *(p for s in sets for p in ("--set", s))]


def on(backend: str, processes: int) -> list[str]:
    launch = f"launch={{backend: {backend}, processes: {processes}}}"
    return [f"{stage}.{launch}" for stage in ("score", "sft", "rl")]


def several(number: int) -> list[Part]:
    """Of several processes, each on a device of its own if there are any."""
    frozen = r"(?:frozen_drift|base_held): [\d.]+"
    return [
        Part("processes, ddp", lambda m, s: smoke(m, s, *on("ddp", number)), frozen, 8),
        Part("processes, fsdp2", lambda m, s: smoke(m, s, *on("fsdp2", number)), frozen, 8),
        Part(
            "processes, tests",
            lambda m, s: ["-m", "pytest", "tests/lora/test_fsdp.py"],
            r"^.*\d+ passed.*",
            8,
        ),
    ]


def parts(small: bool) -> list[Part]:
    cuda = torch.cuda.is_available()
    served = [
        "classify.voters=[{persona: steps, engine: vllm}]", "eval.engine=vllm",
        "rl.rollouts.engine=vllm_colocate",
    ]  # fmt: skip
    number = min(2, torch.cuda.device_count()) if cuda else 2  # more cannot share smoke's eight rows evenly
    which = [f"tests/{name}.py" for name in TESTS]
    which += ["-k", "not kill_at_every_step"]  # in mid epoch is enough here: each starts processes
    which += ["-m", "not slow and not vllm"] if small else []
    few = ["--pairs", "2" if small else "5", "--dtype", "float32" if small else "bfloat16"]
    shapes = ["--prompts", "2", "--group", "4", "--micro-batch", "4", "--completion", "4-8"] if small else []
    models = ["tiny-random"] if small else ["smollm2-135m-q4", *SHAPES]
    rows = ["--prompts", "2", "--group", "4", "--prompt", "32", "--completion", "8-32"] if small else []
    config = f"configs/{'smoke' if small else 'demo'}.yaml"
    facts = r"^[+ -] (?:device|torch|transformers|peft|trl|vllm|model.dtype|sandbox).*"
    frozen, speed = r"frozen_drift: \S+", r".*(?:ratio|peak|TRL).*"
    return [
        Part("doctor", lambda m, s: ["-m", "lorapar_cli", "doctor"], facts, 1),
        Part("pipeline", lambda m, s: smoke(m, s, *served), frozen, 8),
        Part("tests", lambda m, s: ["-m", "pytest", *which], r"^.*\d+ passed.*", 10),
        *(Part(f"sft, {m}", lambda m, s: [f"{HERE}/sft.py", m, ROWS, *few], speed, 5, m) for m in models),
        *(Part(f"rl, {m}", lambda m, s: [f"{HERE}/rl.py", m, *few, *shapes], speed, 5, m) for m in models),
        Part("attention", lambda m, s: [f"{HERE}/attention.py", *rows], r"^.*(?:difference|ratio|peak).*", 3),
        Part(
            "plan",
            lambda m, s: [f"{HERE}/plan.py", config, "--set", f"model.name={m}"],
            r"^(?:sft|rl|together).*",
            8,
            models[0],
        ),
        *(several(number) if number > 1 else []),
        Part("server", lambda m, s: [f"{HERE}/server.py", m, s], r"^the server takes.*|" + frozen, 5),
    ]


def model(name: str, scratch: Path) -> Path:
    """The folder of a model: fetched, or made with random weights and a tokenizer of bytes."""
    if name not in SHAPES:
        return fetch(name, Path("models"))[0]
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = scratch / name
    if not folder.exists():
        torch.set_default_dtype(torch.bfloat16)  # on the CPU: this process must not hold the GPU's memory
        LlamaForCausalLM(LlamaConfig(**SHAPES[name], **TOKENS)).save_pretrained(str(folder))
        torch.set_default_dtype(torch.float32)
        AutoTokenizer.from_pretrained(str(fetch("tiny-random", Path("models"))[0])).save_pretrained(
            str(folder)
        )
    return folder


def seen_by(part: Part) -> dict[str, str]:
    """A training in one process takes one device, and refuses to see several: the first that is visible."""
    if part.name.partition(",")[0] in ("server", "processes"):
        return {}
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}


def line(part: Part, scratch: Path, end: float) -> dict[str, object]:
    """end: of all parts, by the monotonic clock."""
    begun = time.monotonic()
    code: int | str
    try:
        if end <= begun:
            raise RuntimeError("no time is left for it")
        command = [sys.executable, *part.command(str(model(part.model, scratch)), str(scratch / part.name))]
        left = max(1.0, end - time.monotonic())
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=min(60 * part.minutes, left),
            env=os.environ | seen_by(part),
        )  # fmt: skip
        output, code = done.stdout + done.stderr, done.returncode
    except (OSError, RuntimeError, subprocess.TimeoutExpired, LoraparError) as error:
        output, code = f"{type(error).__name__}: {error}", "none"
    found = re.findall(part.found, output, re.MULTILINE)
    told = [text.strip() for text in found] if code == 0 else output.strip().splitlines()[-3:]
    return {"part": part.name, "code": code, "seconds": round(time.monotonic() - begun), "found": told}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", action="append", choices=NAMES, metavar="PART", help=", ".join(NAMES))
    parser.add_argument(
        "--minutes", type=float, help="for all parts; 25, and with --small as long as it takes"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    given = parser.parse_args()
    if not given.small and not torch.cuda.is_available():
        parser.error("there is no GPU here; every part in miniature: --small")
    demo = Path("data/demo")
    if not demo.exists():
        write(demo, 0)
    lines = []
    end = time.monotonic() + 60 * (given.minutes or (10**6 if given.small else 25))
    with tempfile.TemporaryDirectory() as scratch:
        for part in parts(given.small):
            if not given.only or part.name.partition(",")[0] in given.only:
                lines.append(line(part, Path(scratch), end))
                print(*(lines[-1][name] for name in ("part", "code", "seconds")), sep="\t")
                print(*(f"\t{text}" for text in lines[-1]["found"]), sep="\n", flush=True)  # type: ignore[attr-defined]
    given.out.write_text(json.dumps(lines, indent=1, ensure_ascii=False), encoding="utf-8")
    sys.exit(any(one["code"] for one in lines))


if __name__ == "__main__":
    main()
