"""How fast completions are sampled in the trainer's process: vLLM against a merged copy.

    python benchmarks/rollouts.py MODEL [--prompts 4] [--group 8] [--tokens 64] [--rounds 5]

Each round samples by both, in turns, from the same prompts, vLLM with its weights renewed; tokens per second,
and the median of the paired ratios.
"""

import argparse
import random
import statistics
import time

from stages.config import LoraSection, ModelSection
from stages.config.rl import RolloutsSection
from stages.engines import Sampling
from stages.engines.continuous_batching import generate
from stages.lora.adapter import adapter, merge
from stages.lora.grpo import vllm_rollouts
from stages.models.base import load_base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()

    vllm_rollouts.prepare(RolloutsSection(engine="vllm_colocate"), given.model)
    from accelerate import Accelerator
    from transformers import AutoTokenizer
    from trl.generation.vllm_generation import VLLMGeneration

    base = load_base(ModelSection(name=given.model, dtype="bfloat16"))
    copy = merge.MergedCopy(base)
    model = adapter.initial(base, LoraSection(), seed=0)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    sampling = Sampling(given.tokens, (tokenizer.eos_token_id,), 1.0, 1.0)
    begun = time.perf_counter()
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
    print(f"vLLM ready after {time.perf_counter() - begun:.0f} s")

    def by_vllm(prompts: list[list[int]]) -> int:
        engine.sync_weights()
        return sum(len(ids) for ids in engine.generate(prompts, None, given.group)[1])

    def by_copy(prompts: list[list[int]]) -> int:
        copy.refresh(model)
        made = generate(copy.model, tokenizer, prompts, sampling, (), list(range(len(prompts))))
        return sum(len(answer.ids) for _, answer in made)

    rates: dict[str, list[float]] = {"vllm": [], "copy": []}
    for number in range(given.rounds + 1):
        texts = [
            f"Tom has {number + i} apples and buys {3 * i + 2} more. How many has he now?\n"
            for i in range(given.prompts)
        ]
        prompts = [ids for ids in tokenizer(texts)["input_ids"] for _ in range(given.group)]
        for name, way in random.sample([("vllm", by_vllm), ("copy", by_copy)], 2):
            begun = time.perf_counter()
            tokens = way(prompts)
            if number:  # the first round warms up
                rates[name].append(tokens / (time.perf_counter() - begun))
    ratios = [a / b for a, b in zip(rates["vllm"], rates["copy"], strict=True)]
    for name, values in rates.items():
        print(f"{name}: {statistics.median(values):.0f} tokens/s, {min(values):.0f} to {max(values):.0f}")
    spread = f"{min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} rounds"
    print(f"vllm / copy: {statistics.median(ratios):.2f}, {spread}")


if __name__ == "__main__":
    main()
