"""Any task of lm-evaluation-harness (`tasks`), through its Python API, as a second opinion; extra lm-eval.

`path` is a folder with task files of your own, which may read local data. The harness renders its own prompts and grades its
own answers; what comes back is filed like every other evaluation.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.config import BenchmarkSection, ModelSection, ServerSection
from stages.errors import ConfigError, MissingInputError
from stages.records import Sample, write_jsonl

if TYPE_CHECKING:
    from stages.progress import Progress

DEFAULTS: dict[str, Any] = {"label": False}
METRICS = ("exact_match", "acc", "pass@1", "pass_at_1")
"""Metrics that say right or wrong for one item; the first that a task has is taken."""


def run(
    model: ModelSection,
    adapter: Path | None,
    section: BenchmarkSection,
    server: ServerSection,
    target: str,
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Write `samples.jsonl`, `metrics.json` and the harness' own `harness.json`; returns the accuracies."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise MissingInputError(
            "lm-evaluation-harness is not installed", "pip install 'lorapar[lm-eval]'"
        ) from None
    from stages.benchmarks.metrics import brief, measured
    from stages.models.base import load_merged
    from stages.models.tokenizer import load_tokenizer

    logging.getLogger("lm_eval").setLevel(
        logging.ERROR
    )  # it warns of every default that a task file leaves out
    if not section.tasks:
        raise ConfigError(
            "kind lm_eval needs tasks", "--tasks gsm8k, or tasks: [gsm8k] in the benchmark's entry"
        )
    tasks = TaskManager(include_path=section.path)
    known = set(tasks.all_tasks)
    if unknown := [name for name in section.tasks if name not in known]:
        raise ConfigError(
            f"the harness has no task {', '.join(unknown)}", "its own list: lm-eval ls tasks; your own: path"
        )
    progress.start(f"eval {target}: {', '.join(section.tasks)}")
    served = HFLM(
        pretrained=load_merged(model, adapter),
        tokenizer=load_tokenizer(model),
        batch_size=server.batch_size,
        backend="causal",
    )
    found = lm_eval.simple_evaluate(
        model=served,
        tasks=list(section.tasks),
        task_manager=tasks,
        num_fewshot=section.shots or None,
        limit=section.limit,
        apply_chat_template=section.prompt is not None and section.prompt.template == "chat",
        log_samples=True,
        bootstrap_iters=0,
        confirm_run_unsafe_code=False,
    )
    samples = [s for name, rows in found["samples"].items() for s in _samples(name, rows)]
    write_jsonl(out / "samples.jsonl", (asdict(sample) for sample in samples))
    own = {"results": found["results"], "versions": found.get("versions"), "n-shot": found.get("n-shot")}
    (out / "harness.json").write_text(json.dumps(own, indent=1, default=str), encoding="utf-8")
    metrics = measured(samples, ("task",)) if samples else {}
    record = {
        "target": target,
        "benchmark": section.model_dump(mode="json"),
        "harness": f"lm-eval {lm_eval.__version__}",
        **metrics,
        "first_prompt": samples[0].prompt if samples else None,
        "own": own["results"],
    }
    (out / "metrics.json").write_text(json.dumps(record, indent=1, default=str), encoding="utf-8")
    return {"kind": section.kind, "tasks": section.tasks, **(brief(metrics) if metrics else {})}


def _samples(task: str, rows: list[dict[str, Any]]) -> list[Sample]:
    """The harness' graded answers as ours; of several filters the first is the strict reading, the second the flexible one."""
    by_item: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        by_item.setdefault(row["doc_id"], []).append(row)
    samples = []
    for item, readings in by_item.items():
        metric = next((name for name in METRICS if name in readings[0]), None)
        if metric is None:
            continue
        verdicts = [bool(reading[metric]) for reading in readings]
        first = readings[0]
        arguments = first["arguments"]
        arguments = arguments if isinstance(arguments, list | tuple) else list(arguments.values())
        prompt = arguments[0]["arg_0"] if isinstance(arguments[0], dict) else arguments[0][0]
        read = [str(reading["filtered_resps"]) for reading in readings]
        samples.append(
            Sample(
                id=f"{task}/{item}",
                sample=0,
                system=None,
                prompt=str(prompt),
                output=str(first["resps"]),
                gold=str(first["target"]),
                strict=read[0],
                flexible=read[-1],
                correct=verdicts[0],
                correct_flexible=verdicts[-1],
                outcome="correct" if verdicts[0] else "wrong",
                extra={"task": task, "metric": metric},
            )
        )
    return samples
