"""Grade base, init, sft, sft2, rl, or a region of rl on the benchmarks.

A variant is TARGET@BENCHMARK.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from stages.config import REGIONS, TRAINED, UNTRAINED_TARGETS, Config, system_asked
from stages.evaluation.benchmarks import benchmarks
from stages.pipeline import external_key
from stages.pipeline.stage import BENCHMARKS, Check, Stage

if TYPE_CHECKING:
    from stages.pipeline.steps import Step
    from stages.plan.prompt_lengths import Texts
    from stages.plan.work import Work
    from stages.store.digests import DigestCache


def _inputs(config: Config, variant: str) -> tuple[str, ...]:
    target, _, name = variant.partition("@")
    labels = (f"classify:{name}",) if config.eval.benchmarks[name].label else ()
    if target in REGIONS:
        return (*labels, "score", "partition:rl", "rl")
    if target in TRAINED:
        return (*labels, TRAINED[target])
    return (*labels, "score") if target == "init" else labels


def _variants(config: Config) -> tuple[str, ...]:
    return tuple(f"{target}@{name}" for target in config.eval.targets for name in config.eval.benchmarks)


def _sections(config: Config, variant: str) -> tuple[str, ...]:
    name = variant.partition("@")[2]
    runs_code = getattr(benchmarks.pick(config.eval.benchmarks[name].kind), "SANDBOX", False)
    code = ("eval.sandbox",) if runs_code else ()
    return ("model", "prompt", "eval", f"{BENCHMARKS}{name}", "server", *code)


def _external_key(config: Config, variant: str, cache: DigestCache) -> dict[str, Any]:
    target, _, name = variant.partition("@")
    benchmark = config.eval.as_asked(config.eval.benchmarks[name], target)
    items = config.eval.untrained_items if target in UNTRAINED_TARGETS else None
    prompt = benchmark.prompt or config.prompt
    return {
        **({"items": items} if items else {}),
        **({"asked": "by mode"} if system_asked(target, prompt) else {}),
        **external_key.model_part(config, cache),
        "rows": external_key.of_source(benchmark, cache),
        **external_key.of_shots(benchmark, cache),
        **external_key.of_server(config),
    }


def _answers_together(config: Config, variant: str) -> bool:
    """True if a vLLM server can hold the target's adapter beside others, and answers by requests alone."""
    from stages.engines import vllm

    has_adapter_file = variant.partition("@")[0] not in REGIONS
    served = config.eval.engine == "vllm" and config.served_by_vllm and vllm.serves_modules()
    return has_adapter_file and served


def _checks(texts: Texts, step: Step) -> Iterator[Check]:
    from stages.plan import preflight

    yield partial(preflight.check_prompts, texts, step)


def _work(texts: Texts, variant: str) -> Work | None:
    """An answer to each item; the check of the first ones loads the model once more."""
    from stages.plan.prompt_lengths import PROMPT_SAMPLE, generation_limit
    from stages.plan.work import Work, per_text

    target, _, name = variant.partition("@")
    evaluation, rows = texts.config.eval, texts.rows[name]
    section = evaluation.benchmarks[name]
    if target in UNTRAINED_TARGETS:
        rows = rows[: evaluation.untrained_items]
    if not rows:
        return None
    limit, slots = generation_limit(section), min(texts.config.server.batch_size, len(rows))
    prompts = texts.prompts(name, target)
    trained = target not in UNTRAINED_TARGETS and texts.rows["train"]
    response = texts.response_tokens(limit) if trained else float(limit)
    answers, served = len(rows) * section.samples, evaluation.engine == "vllm"
    checked = served and not section.temperature
    return Work(
        read=answers * per_text(prompts[:PROMPT_SAMPLE], slots), written=answers * response, slots=slots,
        length=max(map(len, prompts)) + limit, copies=1 + bool(checked),
        servers=served and name == next(iter(evaluation.benchmarks)),
    )  # fmt: skip


STAGE = Stage(
    name="eval",
    inputs=_inputs,
    sections=_sections,
    external_key=_external_key,
    variants=_variants,
    files={
        "metrics.json": "For all items, each system and each group of the benchmark: counts, accuracy in "
        "both readings, intervals, tokens; also the first prompt and the stop texts.",
        "samples.jsonl": "One object per answer: `id`, `sample`, `system`, `prompt`, `output`, `gold`, "
        "`strict` and `flexible` (the answer in each reading), `correct`, `correct_flexible`, `outcome`.",
    },
    checks=_checks,
    work=_work,
    holds_base=lambda config: config.eval.engine == "transformers",
    memory_hint=lambda config, variant: "server.batch_size",
    answers_together=_answers_together,
    version=10,
)
