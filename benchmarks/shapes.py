"""What score, SFT and RL take at the paper's shapes: time, share of the device, memory beside `plan`'s.

    python benchmarks/shapes.py llama2-7b|qwen2.5-7b|0.5b|tiny [--steps 3] [--layers N]

Every stage is the command itself (`lorapar score`, `sft`, `rl`), by the paper's settings: prompts of 128
tokens, answers of 256, 8 completions to a prompt. The model has that architecture and random weights, which
each command makes on the device: a config and a tokenizer of bytes are all that is written. A reward draws
lots, so that no group is skipped. Attention may use torch's flash and memory-efficient kernels only: on a
GPU its math kernel, which keeps every score, is an error here.

A time is the mean of all steps but the first, which warms up; of score it is that of all batches. "Of a
product's speed": the arithmetic of a step in that time, as a share of what this device does in one large
matrix product in the model's type. A weight and token are 4 FLOP where both passes go through a frozen
weight, 2 where a token is only read or written. Memory is the device's, as torch allocated and reserved it.

Without a GPU, `PYTHONPATH=tests/pretend_gpu:. PRETEND_GPUS=1 PRETEND_METER=1` before the command counts the
memory of a pretend one; of a large model take a few `--layers`. Times then mean nothing.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from measure import now, timed

from stages.config.loading import read_with_extends
from stages.models import base
from stages.models.bundled import fetch
from stages.pipeline.resolve import load, resolved
from stages.runtime import resources
from stages.store import estimates

ROOT = Path(__file__).parent.parent
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
SHAPES: dict[str, dict[str, Any]] = {
    "llama2-7b": LLAMA | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32000},
    "qwen2.5-7b": QWEN | {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064},
    "0.5b": QWEN | {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936,
        "tie_word_embeddings": True},
    "tiny": LLAMA | {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 256, "vocab_size": 512},
}  # fmt: skip
TOKENS = {"max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
"""Those of the tokenizer of `lorapar fetch tiny-random`."""
PROMPT, ANSWER = 128, 256
PROMPTS, GROUP = 8, 8
"""Prompts of a step of RL, and completions of each."""
CARDS = (24, 48, 80)
LARGE_CARD = 40 * 1024
"""MiB; with less, the stages run as `configs/gpu/24gb.yaml` has them, in 4 bits."""
REWARD = """import random
def lots(completions, **_): return [random.random() for _ in completions]
"""
FITS = "at the paper's shapes it trains on"
RESULT = "measured: "
"""Begins the line in which a command tells what it took."""


def model_folder(shape: str, scratch: Path, layers: int | None = None) -> Path:
    """Write the model's config and a tokenizer of bytes into a folder, and no weights.

    layers: how many it has, if not all.
    """
    from transformers import AutoTokenizer

    folder = scratch / shape
    tokenizer = AutoTokenizer.from_pretrained(str(fetch("tiny-random", scratch)[0]))
    tokenizer.save_pretrained(str(folder))
    depth = {"num_hidden_layers": layers} if layers else {}
    (folder / "config.json").write_text(json.dumps(SHAPES[shape] | TOKENS | depth), encoding="utf-8")
    return folder


def random_model(folder: str, dtype: Any, on: torch.device, attention: str | None) -> Any:
    """Make the model of a folder on the device `on`, with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(folder)
    options = {"attn_implementation": attention} if attention else {}
    with torch.device(on):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    model.name_or_path = folder
    model.generation_config = GenerationConfig.from_model_config(config)
    return model.eval()


def in_four_bits(model: Any, how: Any) -> Any:
    """The model with its linear layers quantized one by one, all but the head, as a checkpoint is loaded."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit
    from transformers.quantizers import AutoHfQuantizer

    kind = {"quant_type": how.bnb_4bit_quant_type, "compress_statistics": how.bnb_4bit_use_double_quant}
    head = model.get_output_embeddings()
    for path, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and layer is not head:
            new = Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, how.bnb_4bit_compute_dtype,
                device="meta", **kind,
            )  # fmt: skip
            weight = Params4bit(layer.weight.data.cpu(), requires_grad=False, **kind)
            new.weight, new.bias = weight.to(layer.weight.device), layer.bias
            model.set_submodule(path, new)
    model.is_loaded_in_4bit = model.is_quantized = True  # as PEFT and the trainers ask
    model.hf_quantizer = AutoHfQuantizer.from_config(how)
    return model


def config_file(shape: str, steps: int, model: Path, scratch: Path) -> Path:
    """Write the paper's settings for this shape, with rows and a reward that need no download."""
    draw = random.Random(0)
    rows, rows_of_a_step = scratch / "rows.jsonl", 32
    with rows.open("w", encoding="utf-8") as file:
        for number in range(rows_of_a_step * steps):
            texts = ["".join(draw.choices("abcdefgh ", k=n)) for n in (PROMPT, ANSWER)]
            for system in (1, 2):
                question, answer = (f"{number} {system} {text}" for text in texts)
                row = {"question": question, "answer": f"{answer}\n#### {number}", "system": system}
                file.write(json.dumps(row) + "\n")
    (scratch / "reward.py").write_text(REWARD, encoding="utf-8")
    preset = ROOT / f"configs/paper/gsm8k-{shape if shape == 'qwen2.5-7b' else 'llama2-7b'}.yaml"
    settings = read_with_extends(preset)
    settings |= {"run": shape, "runs_dir": str(scratch / "runs")}
    settings["model"] |= {"name": str(model), "revision": "main"}
    settings["model"] |= {"dtype": "float32"} if shape == "tiny" else {}
    settings["data"] |= {"path": str(rows), "subset": None, "revision": "main"}
    settings["classify"] = {"strategy": "known", "known": "system"}
    settings["sft"] |= {"max_steps": steps}
    settings["rl"] |= {"max_steps": steps, "prompts_per_step": PROMPTS}
    settings["rl"] |= {"rewards": {"lots": 1.0}, "rewards_file": str(scratch / "reward.py")}
    if 0 < card_memory() < LARGE_CARD:
        small = read_with_extends(ROOT / "configs/gpu/24gb.yaml")
        settings["model"] |= {"load_in_4bit": small["model"]["load_in_4bit"]}
        settings["score"] |= {"batch_size": small["score"]["batch_size"]}
        size = "per_device_train_batch_size"
        settings["rl"] |= {size: small["rl"][size]}
    benchmark = {"kind": "gsm8k", "path": str(rows), "label": False}
    settings["eval"] = {"targets": ["base"], "benchmarks": {"rows": benchmark}}
    config = scratch / f"{shape}.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return config


def card_memory() -> int:
    """MiB of the first GPU, 0 without one. Another process asks: this one must hold no memory there."""
    code = "import torch; print(torch.cuda.mem_get_info()[1] >> 20 if torch.cuda.is_available() else 0)"
    return int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout)


def command(arguments: list[str]) -> None:
    """Run a command of lorapar in this process on random weights, and print what it took."""
    import transformers
    from transformers import AutoModelForCausalLM, TrainerCallback

    from lorapar_cli.app import main
    from stages.lora.importance.scorers import moments
    from stages.score import run as score

    def load_random(
        name: str, *, dtype: Any = "float32", attn_implementation: str | None = None, **options: Any
    ) -> Any:
        target = options.get("device_map", {}).get("", torch.device("cpu"))
        model = random_model(name, getattr(torch, dtype), target, attn_implementation)
        if how := options.get("quantization_config"):
            model = in_four_bits(model, how)
            resources.reset_peak()  # a checkpoint is never on the card in 16 bits
        return model, {"missing_keys": set()}

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(now() - self.begun)

    tokens = 0

    def timed_moments(*given: Any) -> Any:
        nonlocal tokens
        tokens += sum(len(row.input_ids) for row in given[2])
        begun = now()
        sums = moments(*given)
        seconds.append(now() - begun)
        return sums

    AutoModelForCausalLM.from_pretrained = load_random
    transformers.trainer.DEFAULT_CALLBACKS.append(Clock)  # type: ignore[attr-defined]
    score.moments = timed_moments  # type: ignore[assignment, attr-defined]
    if torch.cuda.is_available():
        torch.backends.cuda.enable_math_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    sys.argv = ["lorapar", *arguments]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
    memory = [resources.peak_device_memory()] * 2
    if torch.cuda.is_available():
        memory = [torch.cuda.max_memory_allocated() >> 20, torch.cuda.max_memory_reserved() >> 20]
    result: dict[str, Any] = {"seconds": seconds, "tokens": tokens, "memory": memory}
    if arguments[0] == "plan":  # in a process that ends before the stages, as it holds memory of the card
        result["product"] = product_flops(getattr(torch, resolved(load(Path(arguments[1]), [])).model.dtype))
    print(RESULT + json.dumps(result), flush=True)


def product_flops(dtype: torch.dtype) -> float:
    """FLOP per second of one large matrix product on this device, the fastest of five."""
    device = base.device()
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / min(timed(torch.matmul, left, right) for _ in range(5))


def layer_weights(shape: str) -> float:
    """Weights that a token is multiplied with: those of all layers, and the head."""
    of = SHAPES[shape]
    width, inner = of["hidden_size"], of["intermediate_size"]
    keys = width * of["num_key_value_heads"] // of["num_attention_heads"]
    layer = 2 * width * (width + keys) + 3 * width * inner
    return float(of["num_hidden_layers"] * layer + width * of["vocab_size"])


def work(
    stage: str, shape: str, result: dict[str, Any], history: list[dict[str, Any]]
) -> tuple[float, float, float]:
    """Seconds, tokens and FLOP of what was measured: all of score, or of a mean step of a training."""
    weights = layer_weights(shape)
    if stage == "score":
        return sum(result["seconds"]), result["tokens"], 4 * weights * result["tokens"]
    seconds = fmean(result["seconds"][1:] or result["seconds"])
    if stage == "sft":
        tokens = history[-1]["num_tokens"] / len(history)
        return seconds, tokens, 4 * weights * tokens
    written = fmean(row["completions/mean_length"] for row in history[1:] or history) * PROMPTS * GROUP
    # Rollouts read each prompt and write each completion. The reference reads both again, as `rl.beta` is not
    # 0. Then comes a forward and a backward pass.
    return seconds, written, (2 + 2 + 4) * weights * (PROMPTS * PROMPT + written)


def run(arguments: list[str]) -> dict[str, Any]:
    """Run a command in a process of its own and return what it took."""
    child = [sys.executable, __file__, "--command", *arguments]
    done = subprocess.run(child, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = done.stdout.splitlines()
    results = [line.removeprefix(RESULT) for line in lines if line.startswith(RESULT)]
    if done.returncode or not results:
        raise RuntimeError("\n".join([f"lorapar {arguments[0]} ended with {done.returncode}", *lines[-15:]]))
    return json.loads(results[-1])  # type: ignore[no-any-return]


def card(mib: float) -> str:
    """The smallest usual card that has this memory, with half a GiB of torch's and CUDA's own beside it."""
    fitting = [gb for gb in CARDS if mib + 512 <= gb * 1000]
    return f"a card of {fitting[0]} GB" if fitting else "no card of 80 GB"


def report(shape: str, steps: int, scratch: Path, layers: int | None) -> None:
    """Run the stages and print a line for each."""
    file = str(config_file(shape, steps, model_folder(shape, scratch, layers), scratch))
    config = resolved(load(Path(file), []))
    speed = run(["plan", file, "--to", "rl"])["product"]
    print(f"{shape}, {config.model.dtype}, one product: {speed / 1e12:.3g} TFLOP/s", flush=True)
    peaks = []
    for stage in ("classify", "score", "partition", "sft", "rl"):
        result = run([stage, file])
        if stage not in ("score", "sft", "rl"):
            continue
        folder = Path(config.runs_dir) / config.run / stage / "latest"
        manifest = json.loads((folder / "manifest.json").read_bytes())
        history = [] if stage == "score" else json.loads((folder / "history.json").read_bytes())
        seconds, tokens, flop = work(stage, shape, result, history)
        _, planned = estimates.actual_and_planned(manifest["provenance"])
        allocated, reserved = result["memory"]
        peaks.append(reserved)
        span = "in all" if stage == "score" else "a step"
        drift = manifest["summary"].get("frozen_drift")
        print(
            f"{stage}: {seconds:.3g} s {span}, {tokens / seconds:,.0f} tokens/s, "
            f"{flop / seconds / speed:.0%} of a product's speed; {allocated:,} MiB allocated, "
            f"{reserved:,} reserved, {planned.mib or 0:,.0f} planned"
            + ("" if drift is None else f"; frozen_drift {drift}"),
            flush=True,
        )
    print(f"{shape}: {FITS} {card(max(peaks))} ({max(peaks) / 1024:.1f} GiB at the peak)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--layers", type=int, help="of the model, if not all")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        report(given.shape, given.steps, Path(scratch), given.layers)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--command"]:
        command(sys.argv[2:])
    else:
        main()
