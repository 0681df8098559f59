"""Labelling side by side, in one run: a plain loop that generates and parses, and the engines of classify.

    python benchmarks/classify.py MODEL QUESTIONS.jsonl [--rows 256] [--persona steps] [--rounds 2]

QUESTIONS has `question` in each row. The plain loop gives each prompt to `transformers.generate` and reads a
word from what comes, in batches of 1, 4, 16 and 64 (fewer rows for the small ones); the engines get the same
prompts. The start of a server is timed apart. How many votes are equal (side of the two words) is printed
too.
"""

import importlib.util
import time
from pathlib import Path
from typing import Any

import torch
from measure import options

from stages.config import ModelSection, ServerSection
from stages.engines import ChoiceRequest, ChoiceResult, EngineCache, EngineSpec
from stages.engines.openai.choices import parse_word
from stages.labelling.personas import SHOTS, PersonaContext, personas, shots
from stages.models.base import load_base
from stages.models.tokenizer import load_tokenizer
from stages.records import Example, read_jsonl

BATCHES = {1: 32, 4: 64, 16: 128, 64: 256}
"""Rows that each batch size is timed on, at most."""


@torch.no_grad()
def plain(model: Any, tokenizer: Any, ballots: list[ChoiceRequest], batch: int) -> list[int | None]:
    """Generate four tokens for each prompt, padded on the left, and read one of the words from them."""
    found: list[int | None] = []
    for at in range(0, len(ballots), batch):
        part = ballots[at : at + batch]
        texts = [b.text if isinstance(b.text, str) else chat(tokenizer, b.text) for b in part]
        given = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        made = model.generate(**given, max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        replies = tokenizer.batch_decode(made[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [parse_word(reply, b.words) for reply, b in zip(replies, part, strict=True)]
    return found


def chat(tokenizer: Any, messages: Any) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def main() -> None:
    parser = options(__doc__, "model", "questions", rows=256, persona="steps", rounds=2, attention="eager")
    parser.add_argument("--engines", nargs="+", default=["transformers", "vllm"])
    given = parser.parse_args()

    if "vllm" in given.engines and importlib.util.find_spec("vllm") is None:
        print("vLLM skipped: no vllm")
        given.engines.remove("vllm")
    model = ModelSection(name=given.model, attention=given.attention)
    brief = PersonaContext(Path(given.model).name, False, shots=shots(SHOTS, 16))
    rows = read_jsonl(Path(given.questions))[: given.rows]
    examples = [Example(str(n), row["question"], str(row.get("answer", "")), None) for n, row in rows]
    ballots = [personas.pick(given.persona)(example, brief) for example in examples]

    best: dict[str, float] = {}
    votes: dict[str, dict[int, int | None]] = {}
    starts = {}
    for _ in range(given.rounds):
        network, tokenizer = load_base(model), load_tokenizer(model)
        for batch, limit in BATCHES.items():
            part = ballots[:limit]
            begun = time.monotonic()
            votes["plain"] = dict(enumerate(plain(network, tokenizer, part, batch)))
            report(best, f"plain loop, batch {batch}", len(part), time.monotonic() - begun)
        del network
        for name in given.engines:
            with EngineCache() as pool:
                begun = time.monotonic()
                engine = pool.get(EngineSpec(name, model), ServerSection(), lambda text: None)
                starts[name] = time.monotonic() - begun
                begun = time.monotonic()
                choices = dict(engine.choose_words(ballots))
                report(best, f"engine {name}", len(ballots), time.monotonic() - begun)
                shares = {
                    i: choice.probabilities
                    for i, choice in choices.items()
                    if isinstance(choice, ChoiceResult)
                }
                votes[name] = {i: int(two > one) for i, (one, two) in shares.items()}
    naive = max(rate for name, rate in best.items() if name.startswith("plain"))
    for name in given.engines:
        equal = sum(votes[name].get(i) == vote for i, vote in votes["plain"].items())
        print(
            f"engine {name}: {best[f'engine {name}'] / naive:.1f} × the best plain loop, "
            f"{best[f'engine {name}'] / best['plain loop, batch 1']:.1f} × batch 1; "
            f"start {starts[name]:.0f} s; {equal} of {len(votes['plain'])} votes equal"
        )


def report(best: dict[str, float], name: str, rows: int, seconds: float) -> None:
    best[name] = max(best.get(name, 0.0), rows / seconds)
    print(f"{name:<24} {rows:4d} rows in {seconds:6.1f} s  {rows / seconds:7.2f} rows/s", flush=True)


if __name__ == "__main__":
    main()
