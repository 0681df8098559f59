"""Answers of evaluation targets: whose they are, the journal that keeps them, and one server for several.

`eval` takes each target's answers from here and grades them.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.config import (
    KEPT,
    REGIONS,
    ROUTED,
    UNTRAINED_TARGETS,
    BenchmarkSection,
    Config,
    EvalSection,
    ModelSection,
    PromptSection,
)
from stages.engines import EngineSpec
from stages.evaluation.answer_cache import AnswerCache
from stages.evaluation.benchmarks import benchmarks
from stages.models.tokenizer import load_tokenizer
from stages.prompts.renderer import RenderedPrompt, Renderer
from stages.records import Labelled, read_labels
from stages.store.digests import key_of, sha256_file

if TYPE_CHECKING:
    from stages.engines.openai.client import Client
    from stages.pipeline.context import StageContext


def answer_ahead(jobs: list[tuple[StageContext, dict[str, Any]]]) -> None:
    """Have one vLLM server answer for several targets, each adapter as a module of it, into the journal.

    jobs: what `run` gets later, which then finds every answer. Else each target would have a server of its
    own, and on a GPU each benchmark, too, because the check of the first answers needs the server's memory.
    Targets are asked one after the other. The server is started only if the journal lacks an answer.
    """
    from stages.engines import vllm

    def module_name(job: StageContext) -> str:
        # Should another process's server answer on the same port, it has no model of this name.
        return f"{job.variant.partition('@')[0]}-{os.getpid()}"

    adapters = {module_name(job): adapter for job, _ in jobs if (adapter := stored_adapter(job)) is not None}
    (first, given), *_ = jobs
    model, server, say = given["model"], given["server"], first.progress.say
    with ExitStack() as stack:

        @cache
        def clients() -> dict[str, Client]:
            return stack.enter_context(vllm.open_modules(model, adapters, server, say))

        for job, sections in jobs:
            name, benchmark = module_name(job), sections["benchmark"]
            answers, *_ = cache_of(
                job, adapters.get(name), model, sections["prompt"], sections["eval"], benchmark
            )
            served = name if name in adapters else model.name
            answers.complete(lambda served=served: clients()[served], title(job, benchmark), job.progress)


def may_share_server(config: Config, variant: str) -> bool:
    """Whether a target's adapter can be one module of several of a vLLM server, and its answers a request."""
    from stages.engines import vllm

    target, _, name = variant.partition("@")
    asks = not hasattr(benchmarks.pick(config.eval.benchmarks[name].kind), "run")
    has_adapter_file = target not in (*REGIONS, ROUTED)
    return asks and has_adapter_file and config.served_by_vllm and vllm.serves_modules(config.server)


def title(job: StageContext, benchmark: BenchmarkSection) -> str:
    return f"eval {job.variant.partition('@')[0]} {benchmark.kind}"


def stored_adapter(job: StageContext) -> Path | None:
    """The folder of the target's adapter in an artifact; None for the base."""
    target = job.variant.partition("@")[0]
    if target.startswith(KEPT):
        return job.inputs["rl"].kept_adapter(target.removeprefix(KEPT))
    return job.adapter("score", "sft", "rl")


def cache_of(
    job: StageContext,
    adapter: Path | None,
    model: ModelSection,
    prompt: PromptSection,
    eval: EvalSection,
    benchmark: BenchmarkSection,
) -> tuple[AnswerCache, list[Labelled], Renderer, list[RenderedPrompt]]:
    """The cache of the answers of one target to one benchmark, and the items as they are asked."""
    is_untrained = job.variant.partition("@")[0] in UNTRAINED_TARGETS
    rows = _rows(job, benchmark)[: eval.untrained_items if is_untrained else None]
    renderer = Renderer(load_tokenizer(model), benchmark.prompt or prompt, rows)
    prompts = benchmarks.pick(benchmark.kind).ask([row.example for row in rows], benchmark, renderer)
    identity = _identity(job, EngineSpec(eval.engine, model, adapter))
    cache = AnswerCache(prompts, benchmark, renderer, identity, job.journals / "answers", job.force)
    return cache, rows, renderer, prompts


def _rows(job: StageContext, benchmark: BenchmarkSection) -> list[Labelled]:
    """The benchmark's items with their labels; all undecided if this benchmark is not labelled."""
    if "classify" in job.inputs:
        return read_labels(job.labels)
    return [Labelled(example, None, {}) for example in benchmarks.pick(benchmark.kind).load(benchmark)]


def _identity(job: StageContext, spec: EngineSpec) -> dict[str, Any]:
    """Everything that determines the answers, apart from the prompts and the sampling."""
    return {
        "model": job.outside["model"],
        "dtype": f"nf4 {job.dtype}" if spec.model.load_in_4bit else job.dtype,
        "adapter": _adapter_digest(spec.adapter),
        "engine": spec.engine,
        "server": job.outside.get("server"),
    }


def _adapter_digest(adapter: Path | None) -> str | None:
    if adapter is None:
        return None
    files = ("adapter_model.safetensors", "adapter_config.json")
    return key_of({name: sha256_file(adapter / name) for name in files})
