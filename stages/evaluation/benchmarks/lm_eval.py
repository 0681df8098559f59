"""Any tasks of lm-evaluation-harness, through its Python API, as a second opinion; needs the extra `lm-eval`.

`tasks` names them; `path` may be a folder with your own task files, which may read local data. The harness
renders the prompts and grades the answers. The results are written like those of every other benchmark.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.config import BenchmarkSection, ModelSection, ServerSection
from stages.errors import ConfigError, MissingInputError, first_line, is_out_of_memory
from stages.records import Sample, write_jsonl

if TYPE_CHECKING:
    from stages.progress import Progress

log = logging.getLogger(__name__)

DEFAULTS: dict[str, Any] = {"label": False}
METRICS = ("exact_match", "acc", "pass@1", "pass_at_1")
"""Metrics that usually say right or wrong for one item; in some tasks they are shares.

Of each task the first of these is used that is 0 or 1 for all its items.
"""


def check_installed() -> None:
    """Raise MissingInputError unless the harness is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingInputError("lm-evaluation-harness is not installed", "pip install 'lorapar[lm-eval]'")


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
    check_installed()
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from stages.models.base import load_merged
    from stages.models.tokenizer import load_tokenizer

    # The harness warns about every default that a task file leaves out.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = _task_manager(section)
    progress.start(f"eval {target}: {', '.join(section.tasks)}")
    served = HFLM(
        pretrained=load_merged(model, adapter),
        tokenizer=load_tokenizer(model),
        batch_size=server.batch_size,
        backend="causal",
    )
    with _user_errors(section.tasks):
        results = lm_eval.simple_evaluate(
            model=served,
            tasks=list(section.tasks),
            task_manager=tasks,
            num_fewshot=section.shots or None,
            limit=section.limit,
            apply_chat_template=section.prompt is not None and section.prompt.template == "chat",
            system_instruction=section.prompt.system if section.prompt else None,
            log_samples=True,
            bootstrap_iters=0,
            confirm_run_unsafe_code=False,
        )
    return _write(results, f"lm-eval {lm_eval.__version__}", section, target, out)


@contextmanager
def _user_errors(tasks: list[str]) -> Iterator[None]:
    """Turn an error of the harness, or of a task's own code, into a ConfigError that names the tasks.

    Errors of memory and of files pass unchanged.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise ConfigError(
            f"the harness cannot run {', '.join(tasks)}: {type(error).__name__}: {first_line(error)}",
            "check its task file and its data; only kind humaneval runs code that a model wrote",
        ) from error


def _task_manager(section: BenchmarkSection) -> Any:
    """The harness' tasks and those below `section.path`.

    Raises ConfigError if one of `section.tasks` is not among them.
    """
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=section.path)
    available = set(tasks.all_tasks)
    if unknown := [name for name in section.tasks if name not in available]:
        raise ConfigError(
            f"the harness has no task {', '.join(unknown)}",
            "`lm-eval ls tasks` lists them; path names a folder with tasks of your own",
        )
    return tasks


def _write(
    results: dict[str, Any], harness: str, section: BenchmarkSection, target: str, out: Path
) -> dict[str, Any]:
    """Write the results of `simple_evaluate` into the files of an evaluation; returns the accuracies."""
    from stages.evaluation.metrics import compute_metrics, headline

    by_task = {name: _samples(name, rows) for name, rows in results["samples"].items()}
    samples = [sample for of_task in by_task.values() for sample in of_task]
    ungraded = [name for name, of_task in by_task.items() if not of_task] if samples else []
    if ungraded:
        log.warning("%s: no answer is right or wrong, so the accuracy is without them", ", ".join(ungraded))
    write_jsonl(out / "samples.jsonl", (asdict(sample) for sample in samples))
    harness_results = {
        "results": results["results"],
        "versions": results.get("versions"),
        "n-shot": results.get("n-shot"),
    }
    (out / "harness.json").write_text(json.dumps(harness_results, indent=1, default=str), encoding="utf-8")
    metrics = compute_metrics(samples, ("task",)) if samples else {}
    record = {
        "target": target,
        "benchmark": section.model_dump(mode="json"),
        "harness": harness,
        **metrics,
        "first_prompt": samples[0].prompt if samples else None,
        "own": results["results"],
    }
    (out / "metrics.json").write_text(json.dumps(record, indent=1, default=str), encoding="utf-8")
    left_out = {"ungraded_tasks": ungraded} if ungraded else {}
    return {
        "kind": section.kind,
        "tasks": section.tasks,
        **left_out,
        **(headline(metrics) if metrics else {}),
    }


def _samples(task: str, rows: list[dict[str, Any]]) -> list[Sample]:
    """Graded answers as Samples; the task's first filter is the strict reading, its last the flexible one."""
    by_item: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        by_item.setdefault(row["doc_id"], []).append(row)
    metric = next((name for name in METRICS if all(row.get(name) in (0, 1) for row in rows)), None)
    if metric is None:
        return []
    samples = []
    for item, readings in by_item.items():
        verdicts = [bool(reading[metric]) for reading in readings]
        first = readings[0]
        # A list or a dict of requests, each a sequence or a dict whose first entry is the prompt.
        arguments = first["arguments"]
        arguments = arguments if isinstance(arguments, list | tuple) else list(arguments.values())
        prompt = arguments[0]["arg_0"] if isinstance(arguments[0], dict) else arguments[0][0]
        answers = [str(reading["filtered_resps"]) for reading in readings]
        samples.append(
            Sample(
                id=f"{task}/{item}",
                sample=0,
                system=None,
                prompt=str(prompt),
                output=str(first["resps"]),
                gold=str(first["target"]),
                strict=answers[0],
                flexible=answers[-1],
                correct=verdicts[0],
                correct_flexible=verdicts[-1],
                outcome="correct" if verdicts[0] else "wrong",
                extra={"task": task, "metric": metric},
            )
        )
    return samples
