"""eval: one target (base, init, sft or rl) answers the test rows greedily; every answer is graded."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.benchmarks import benchmarks
from stages.benchmarks.statistics import wilson
from stages.config import EvalSection, ModelSection, PromptSection
from stages.errors import DataError
from stages.language.prompts import Renderer, load_tokenizer
from stages.lora import adapter
from stages.records import Journal, Labelled, Sample, read_labels, write_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.pipeline import Progress


def run(
    model: ModelSection,
    prompt: PromptSection,
    eval: EvalSection,
    target: str,
    journal: Path,
    classify_dir: Path,
    out: Path,
    progress: Progress,
    score_dir: Path | None = None,
    sft_dir: Path | None = None,
    rl_dir: Path | None = None,
) -> dict[str, Any]:
    """Write `samples.jsonl` and `metrics.json`; returns the accuracies.

    Answers are journalled as they come: a killed run asks for none of them again. A LoRA target is loaded as a user would
    load it, with plain PEFT on the plain base model, and merged for speed.
    """
    folder = {"base": None, "init": score_dir and score_dir / "init", "sft": sft_dir and sft_dir / "adapter"}
    folder["rl"] = rl_dir and rl_dir / "adapter"
    labels = read_labels(classify_dir / "labels.jsonl")
    without = [row.example.id for row in labels if row.example.gold is None]
    if without:
        raise DataError(f"{len(without)} of {len(labels)} test rows have no gold answer (first: {without[0]})")
    renderer = Renderer(load_tokenizer(model), eval.prompt or prompt)
    with Journal(journal) as answers:
        known = {row["id"]: row["ids"] for row in answers.rows}
        missing = [row for row in labels if row.example.id not in known]
        if missing:
            loaded = _load(model, folder[target])
            _generate(loaded, missing, renderer, eval, answers, progress, target)
        known = {row["id"]: row["ids"] for row in answers.rows}
    samples = [_grade(row, known[row.example.id], renderer, eval) for row in labels]
    write_jsonl(out / "samples.jsonl", (asdict(sample) for sample in samples))
    groups = {"all": samples} | {f"system{k}": [s for s in samples if s.system == k] for k in (1, 2)}
    metrics = {name: _metrics(group) for name, group in groups.items() if group}
    record = {
        "target": target,
        "benchmark": eval.benchmark,
        **metrics,
        "first_prompt": samples[0].prompt,
        "stop": [renderer.tokenizer.decode([stop]) for stop in renderer.stop_ids],
        "max_new_tokens": eval.max_new_tokens,
        "decoding": "greedy",
        "prompt": renderer.digest(),
    }
    (out / "metrics.json").write_text(json.dumps(record, indent=1, ensure_ascii=False))
    return {"benchmark": eval.benchmark, **metrics}


def _load(model: ModelSection, folder: Path | None) -> PreTrainedModel:
    base = adapter.load_base(model)
    if folder is None:
        return base
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(folder)).merge_and_unload()  # type: ignore[no-any-return, operator]


def _generate(
    model: PreTrainedModel,
    rows: list[Labelled],
    renderer: Renderer,
    section: EvalSection,
    answers: Journal,
    progress: Progress,
    target: str,
) -> None:
    """Greedy answers in batches of similar prompt length, journalled batch by batch."""
    from stages.engines.transformers import continuations

    progress.start(f"eval {target}", len(rows))
    prompts = sorted(((row.example.id, renderer.prompt_ids(row.example.prompt)) for row in rows), key=lambda p: len(p[1]))
    for i in range(0, len(prompts), section.batch_size):
        part = prompts[i : i + section.batch_size]
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        made = continuations(model, [ids for _, ids in part], renderer, section.max_new_tokens, greedy)
        for (id, _), ids in zip(part, made, strict=True):
            answers.append({"id": id, "ids": ids})
        progress.advance(len(part))


def _grade(row: Labelled, ids: list[int], renderer: Renderer, section: EvalSection) -> Sample:
    example = row.example
    assert example.gold is not None
    text = renderer.tokenizer.decode(ids, skip_special_tokens=True)
    grade = benchmarks.pick(section.benchmark).grade(example.gold, text, renderer.section.answer_format)
    return Sample(
        id=example.id,
        system=row.system,
        prompt=renderer.prompt(example.prompt),
        output=text,
        gold=example.gold,
        **asdict(grade),
        truncated=not ids or ids[-1] not in renderer.stop_ids,
        extra=example.extra,
    )


def _metrics(samples: list[Sample]) -> dict[str, Any]:
    """Accuracy by strict and by flexible extraction with 95 % Wilson intervals, and what went wrong apart."""
    n, correct = len(samples), sum(s.correct for s in samples)
    flexible = sum(s.correct_flexible for s in samples)
    return {
        "n": n,
        "correct": correct,
        "accuracy": correct / n,
        "interval": wilson(correct, n),
        "correct_flexible": flexible,
        "accuracy_flexible": flexible / n,
        "interval_flexible": wilson(flexible, n),
        "unparsed": sum(s.strict is None for s in samples),
        "truncated": sum(s.truncated for s in samples),
    }
