"""Engines of evaluation side by side: answers per second of transformers and of vLLM on the same prompts.

    python benchmarks/eval.py MODEL QUESTIONS.jsonl [--limit 64] [--max-new-tokens 128] [--rounds 2]

QUESTIONS has `question` or `prompt` in each row. Greedy, rendered as eval renders them. Rounds alternate
between the engines, in one run; the start of a server is timed apart. How many answers agree in all tokens is
printed too.
"""

import statistics
import time
from pathlib import Path

from measure import options

from stages.config import ModelSection, PromptSection, ServerSection
from stages.engines import EngineCache, EngineSpec, GenerateRequest, Sampling
from stages.models.tokenizer import load_tokenizer
from stages.prompts.renderer import Renderer
from stages.records import read_jsonl


def main() -> None:
    defaults = {"limit": 64, "max_new_tokens": 128, "batch_size": 64, "attention": "eager", "rounds": 2}
    given = options(__doc__, "model", "questions", **defaults).parse_args()
    model = ModelSection(name=given.model, attention=given.attention)
    renderer = Renderer(load_tokenizer(model), PromptSection())
    rows = read_jsonl(Path(given.questions))[: given.limit]
    texts = [row.get("question") or row["prompt"] for _, row in rows]
    questions = [GenerateRequest(renderer.ids(renderer.prompt(text))) for text in texts]
    sampling = Sampling(given.max_new_tokens, tuple(renderer.stop_ids))
    server = ServerSection(batch_size=given.batch_size)

    rates: dict[str, list[float]] = {"transformers": [], "vllm": []}
    answers = {}
    for _ in range(given.rounds):
        for name, found in rates.items():
            with EngineCache() as pool:
                begun = time.monotonic()
                engine = pool.get(EngineSpec(name, model), server, lambda text: None)
                ready = time.monotonic()
                answers[name] = dict(engine.generate(questions, sampling))
                took = time.monotonic() - ready
            tokens = sum(len(answer.ids) for answer in answers[name].values())
            found.append(tokens / took)
            print(
                f"{name:<13} start {ready - begun:5.1f} s, {len(questions)} answers, "
                f"{tokens} tokens in {took:5.1f} s, "
                f"{len(questions) / took:5.2f} answers/s, {tokens / took:6.1f} tokens/s"
            )
    ratio = statistics.median(rates["vllm"]) / statistics.median(rates["transformers"])
    same = sum(answers["vllm"][i].ids == answers["transformers"][i].ids for i in range(len(questions)))
    print(
        f"vllm / transformers: {ratio:.2f} in tokens per second; "
        f"{same} of {len(questions)} answers are equal in all tokens"
    )


if __name__ == "__main__":
    main()
