"""What one machine with a GPU has to show, in one command and one table.

    python benchmarks/gpu.py [--small] [--only PART …] [--out gpu.json]

Needs no hub: models have random weights of real shapes (0.5 and 7 billion parameters), beside the small real
one. `--small` is every part in miniature, for a machine without a GPU. Each part is a command of its own
with a limit in time. The table says what it found, and how long it took; a part that fails stops no other.

- doctor: versions, device, number types.
- pipeline: all six stages of the smoke config with vLLM for votes, rollouts and answers, and that no frozen
  element moved.
- tests: on the device, those of frozen elements, exact resume, 4 bits, padding and equality with TRL.
- sft, rl: time of a step and peak of memory against TRL on plain LoRA (`sft.py`, `rl.py` beside this).
- plan: what is planned against what is taken (`plan.py`).
- processes: SFT and RL of the smoke config on all devices (DDP); two processes on a CPU.
"""

import argparse
import json
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
from stages.models.fetch import fetch

HERE = Path(__file__).parent
SHAPES = {  # of Qwen2.5-0.5B and LLaMA-2-7B
    "0.5b": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
             "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True},
    "7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
           "intermediate_size": 11008, "vocab_size": 32000, "tie_word_embeddings": False},
}  # fmt: skip
TOKENS = {"max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
"""The tokenizer is that of `lorapar fetch tiny-random`."""
TESTS = ("frozen", "resume", "four_bit", "unpadded", "same_as_trl", "rollouts")


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


def parts(small: bool) -> list[Part]:
    cuda = torch.cuda.is_available()
    rollouts = ["rl.rollouts.engine=vllm_colocate"] if cuda else []
    served = ["classify.voters=[{persona: steps, engine: vllm}]", "eval.engine=vllm", *rollouts]
    devices = f"launch={{backend: ddp, processes: {torch.cuda.device_count() if cuda else 2}}}"
    which = [f"tests/lora/test_{name}.py" for name in (TESTS[3:5] if small else TESTS)]
    few = ["--pairs", "2"] if small else ["--pairs", "5"]
    kind = ["--dtype", "float32" if small else "bfloat16"]
    shapes = ["--prompts", "2", "--group", "4", "--micro-batch", "4", "--completion", "4-8"] if small else []
    rows = "data/demo/train.jsonl"
    models = ["tiny-random"] if small else ["models/smollm2-135m-q4", *SHAPES]
    plan = ["configs/smoke.yaml"] if small else ["configs/demo.yaml"]
    return [
        Part(
            "doctor",
            lambda m, s: ["-m", "lorapar_cli", "doctor"],
            r"^[+ -] (?:device|torch|float|bfloat).*",
            1,
        ),
        Part("pipeline", lambda m, s: smoke(m, s, *served), r"frozen_drift: \S+", 8),
        Part("tests", lambda m, s: ["-m", "pytest", *which], r"^\d+ passed.*|^\d+ failed.*", 10),
        *(
            Part(
                f"sft, {m}",
                lambda m, s: [f"{HERE}/sft.py", m, rows, *few, *kind],
                r".*ratio.*|.*peak.*",
                5,
                m,
            )
            for m in models
        ),
        *(
            Part(
                f"rl, {m}",
                lambda m, s: [f"{HERE}/rl.py", m, *few, *kind, *shapes],
                r".*ratio.*|.*peak.*",
                5,
                m,
            )
            for m in models
        ),
        Part("plan", lambda m, s: [f"{HERE}/plan.py", *plan, "--set", f"model.name={m}"], r"^together.*", 8)
        if small
        else Part("plan", lambda m, s: [f"{HERE}/plan.py", *plan], r"^(?:sft|rl|together).*", 8),
        Part(
            "processes", lambda m, s: smoke(m, s, f"sft.{devices}", f"rl.{devices}"), r"frozen_drift: \S+", 8
        ),
    ]


def model(name: str, scratch: Path) -> Path:
    """The folder of a model: fetched, given, or made with random weights and a tokenizer of bytes."""
    if name not in SHAPES:
        return Path(name) if "/" in name else fetch(name, Path("models"))[0]
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = scratch / name
    if not folder.exists():
        with torch.device("cuda"):
            made = LlamaForCausalLM(LlamaConfig(**SHAPES[name], **TOKENS)).bfloat16()
        made.save_pretrained(str(folder))
        AutoTokenizer.from_pretrained(str(fetch("tiny-random", Path("models"))[0])).save_pretrained(
            str(folder)
        )
    return folder


def line(part: Part, scratch: Path) -> dict[str, object]:
    begun = time.monotonic()
    command = [sys.executable, *part.command(str(model(part.model, scratch)), str(scratch / part.name))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 * part.minutes)
        output, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired:
        output, code = "", "took too long"  # type: ignore[assignment]
    found = re.findall(part.found, output, re.MULTILINE)
    told = [text.strip() for text in found] if code == 0 else output.strip().splitlines()[-3:]
    return {"part": part.name, "code": code, "seconds": round(time.monotonic() - begun), "found": told}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", action="append", metavar="PART")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    given = parser.parse_args()
    if not given.small and not torch.cuda.is_available():
        parser.error("there is no GPU here; every part in miniature: --small")
    demo = Path("data/demo")
    if not demo.exists():
        write(demo, 0)
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        for part in parts(given.small):
            if not given.only or part.name in given.only:
                lines.append(line(part, Path(scratch)))
                print(*(lines[-1][name] for name in ("part", "code", "seconds")), sep="\t")
                print(*(f"\t{text}" for text in lines[-1]["found"]), sep="\n", flush=True)  # type: ignore[attr-defined]
    given.out.write_text(json.dumps(lines, indent=1, ensure_ascii=False), encoding="utf-8")
    sys.exit(any(one["code"] for one in lines))


if __name__ == "__main__":
    main()
