"""How fast completions are sampled in the trainer's process: by lorapar, TRL, transformers and vLLM.

    python benchmarks/rollouts.py MODEL [--prompts 8] [--group 8] [--tokens 128] [--rounds 5]
        [--dtype bfloat16]

Each round samples by each, in an order drawn at random, from the same prompts and with renewed weights: ours
as `lorapar rl` does, on a CPU from a merged copy; TRL's by `generate` of the model with its adapter, all rows
at once; transformers' by its continuous batching, from a merged copy, too. Tokens per second, and the median
of the paired ratios. Without vLLM its column is left out, and this says so.
"""

import argparse
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import torch
from measure import in_turns, now, options
from transformers import AutoTokenizer, GenerationConfig

from stages.config import LoraSection, ModelSection
from stages.config.rl import RolloutsSection
from stages.engines import Sampling
from stages.engines.continuous_batching import generate
from stages.lora.adapter import adapter, merge
from stages.lora.grpo import vllm_rollouts
from stages.models.base import load_base

Sampler = Callable[[list[list[int]]], int]
"""Samples a completion of each prompt (token ids); returns the tokens of all."""


def by_vllm(model: Any, tokenizer: Any, given: argparse.Namespace) -> Sampler:
    from accelerate import Accelerator
    from trl.generation.vllm_generation import VLLMGeneration

    begun = now()
    engine = VLLMGeneration(
        model,
        Accelerator(),
        tokenizer,
        max_model_length=256 + given.tokens,
        max_num_seqs=given.prompts * given.group,
        max_completion_length=given.tokens,
        gpu_memory_utilization=0.3,
    )
    engine._iter_named_params = lambda: merge.merged_parameters(model)
    print(f"vLLM ready after {now() - begun:.0f} s")

    def sample(prompts: list[list[int]]) -> int:
        engine.sync_weights()
        return sum(len(ids) for ids in engine.generate(prompts, None, given.group)[1])

    return sample


def by_ours(copy: merge.MergedCopy | None, model: Any, tokenizer: Any, tokens: int) -> Sampler:
    sampling = Sampling(tokens, (tokenizer.eos_token_id,), 1.0, 1.0)

    def sample(prompts: list[list[int]]) -> int:
        if copy:
            copy.refresh(model)
        source = copy.model if copy else model
        answers = generate(source, tokenizer, prompts, sampling, (), list(range(len(prompts))))
        return sum(len(answer.ids) for _, answer in answers)

    return sample


def by_trl(model: Any, tokenizer: Any, tokens: int) -> Sampler:
    @torch.no_grad()
    def sample(prompts: list[list[int]]) -> int:
        rows = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(
            model.device
        )
        sampled = model.generate(**rows, max_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0)
        written = sampled[:, rows["input_ids"].shape[1] :]
        ends = (written == tokenizer.eos_token_id).int()
        return int((ends.cumsum(1) - ends == 0).sum())  # up to the first stop token, and with it

    return sample


def by_transformers(copy: merge.MergedCopy | None, model: Any, tokenizer: Any, tokens: int) -> Sampler:
    options = GenerationConfig(
        max_new_tokens=tokens, do_sample=True, top_k=0, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip

    def sample(prompts: list[list[int]]) -> int:
        source = copy.refresh(model) if copy else model
        answers = source.generate_batch(inputs=prompts, generation_config=options, progress_bar=False)
        return sum(len(answer.generated_tokens) for answer in answers.values())

    return sample


def main() -> None:
    given = options(__doc__, "model", prompts=8, group=8, tokens=128, rounds=5, dtype="bfloat16").parse_args()
    has_vllm = importlib.util.find_spec("vllm") is not None
    if has_vllm:
        vllm_rollouts.prepare(RolloutsSection(engine="vllm_colocate"), given.model)
    section = ModelSection(name=given.model, dtype=given.dtype)
    base = load_base(section)
    copy, copied = (vllm_rollouts.copy_of(base, RolloutsSection(), section, None) for _ in range(2))
    model = adapter.initial(base, LoraSection(), seed=0)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    samplers = {
        "lorapar": by_ours(copy, model, tokenizer, given.tokens),
        "TRL": by_trl(model, tokenizer, given.tokens),
        "transformers": by_transformers(copied, model, tokenizer, given.tokens),
    }
    if has_vllm:
        samplers["vLLM"] = by_vllm(model, tokenizer, given)
    else:
        print("vLLM skipped: no vllm")

    def rate(name: str, number: int) -> float:
        texts = [
            f"Tom has {number + i} apples and buys {3 * i + 2} more. How many has he now?\n"
            for i in range(given.prompts)
        ]
        prompts = [ids for ids in tokenizer(texts)["input_ids"] for _ in range(given.group)]
        begun = now()
        return samplers[name](prompts) / (now() - begun)

    rates = in_turns(list(samplers), given.rounds, rate)
    for name, values in rates.items():
        print(f"{name}: {statistics.median(values):.0f} tokens/s, {min(values):.0f} to {max(values):.0f}")
        if name != "lorapar":
            ratios = [theirs / ours for theirs, ours in zip(values, rates["lorapar"], strict=True)]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} rounds"
            print(f"{name} / lorapar: {statistics.median(ratios):.2f}, {spread}")


if __name__ == "__main__":
    main()
