"""eval: one target, such as base, sft or rl, answers one benchmark; every answer is graded."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages import sandbox as sandboxes
from stages.config import (
    KEPT,
    REGIONS,
    ROUTED,
    UNTRAINED_TARGETS,
    BenchmarkSection,
    ClassifySection,
    Config,
    EvalSection,
    ModelSection,
    PromptSection,
    SandboxSection,
    ServerSection,
)
from stages.engines import EngineSpec
from stages.evaluation import routing
from stages.evaluation.answer_cache import AnswerCache, CachedAnswer
from stages.evaluation.benchmarks import benchmarks
from stages.evaluation.grading import Context
from stages.evaluation.metrics import compute_metrics, headline
from stages.evaluation.samples import grade_all
from stages.labelling.router import Router
from stages.models.dtype import answer_dtype
from stages.models.tokenizer import load_tokenizer
from stages.prompts.renderer import RenderedPrompt, Renderer
from stages.records import Labelled, read_labels, read_samples, write_jsonl
from stages.store.digests import key_of, sha256_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.engines.openai.client import Client
    from stages.pipeline.context import StageContext


def run(
    job: StageContext,
    model: ModelSection,
    prompt: PromptSection,
    eval: EvalSection,
    benchmark: BenchmarkSection,
    server: ServerSection,
    sandbox: SandboxSection | None = None,
    classify: ClassifySection | None = None,
) -> dict[str, Any]:
    """Write `samples.jsonl` and `metrics.json`; returns the accuracies.

    Each answer is journalled as it arrives, under its model, adapter, engine, prompt and sampling. So neither
    a resumed run nor one with other labels, another limit or another grader generates it again. Only
    `job.force` replaces earlier answers.
    """
    if classify is not None:
        return _route(job, model, classify, eval, benchmark, server)
    with _adapter(job) as adapter:
        return _evaluate(job, adapter, model, prompt, eval, benchmark, server, sandbox)


def _route(
    job: StageContext,
    model: ModelSection,
    classify: ClassifySection,
    eval: EvalSection,
    benchmark: BenchmarkSection,
    server: ServerSection,
) -> dict[str, Any]:
    """Write target auto's answers, each taken from the mode chosen by the vote, and compare the routings."""
    name, module = job.variant.partition("@")[2], benchmarks.pick(benchmark.kind)
    samples = {
        mode: read_samples(job.inputs[f"eval:{target}@{name}"].path / "samples.jsonl")
        for mode, target in eval.modes.items()
    }
    labels = read_labels(job.inputs["classify:train"].path / "labels.jsonl")
    identity = f"{job.outside['model']} {_dtype(model, eval.engine)} {job.outside.get('server')}"
    router = Router(classify, model, eval.engine, identity, labels, job.journals)
    examples = module.load(benchmark)
    router.set_questions(examples)
    spec = EngineSpec(eval.engine, model)
    router.collect(lambda: job.engines.get(spec, server, job.progress.say), job.progress, f"votes on {name}")
    router.log.check(classify.max_failed, classify.max_invalid)
    router.calibrate()
    modes = {example.id: router.mode(router.log.vote(example)) for example in examples}
    routed = routing.select_answers(samples, modes)
    write_jsonl(job.out / "samples.jsonl", (asdict(sample) for sample in routed))
    metrics = compute_metrics(routed, module.GROUPS)
    record = {
        "target": ROUTED,
        "benchmark": benchmark.model_dump(mode="json"),
        "engine": eval.engine,
        **metrics,
        "router": router.record(),
        "routing": routing.compare({**samples, ROUTED: routed}),
    }
    (job.out / "metrics.json").write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    return {"kind": benchmark.kind, **headline(metrics)}


@contextmanager
def _adapter(job: StageContext) -> Iterator[Path | None]:
    """Yield the folder of the target's adapter, if it has one; a region's folder is temporary."""
    target = job.variant.partition("@")[0]
    if target not in REGIONS:
        yield _stored_adapter(job)
        return
    from stages.lora.importance import ablation
    from stages.lora.importance.masks import Masks

    masks = Masks.load(job.inputs["partition"].path / "masks.safetensors", "rl")
    with tempfile.TemporaryDirectory(prefix=f"lorapar-{target}-") as folder:
        ablation.write(target, job.inputs["rl"].adapter, job.inputs["score"].adapter, masks, Path(folder))
        yield Path(folder)
        job.engines.close()  # the adapter that it serves is about to be deleted


def answer_ahead(jobs: list[tuple[StageContext, dict[str, Any]]]) -> None:
    """Let one vLLM server, with each adapter as a LoRA module, answer for several targets, into the journal.

    jobs: what `run` gets later, which then finds every answer. Else each target would have a server of its
    own, and on a GPU each benchmark, too, because the check of the first answers needs the server's memory.
    Targets are asked one after the other. The server is started only if the journal lacks an answer.
    """
    from stages.engines import vllm

    def module_name(job: StageContext) -> str:
        # Should another process's server answer on the same port, it has no model of this name.
        return f"{job.variant.partition('@')[0]}-{os.getpid()}"

    adapters = {module_name(job): adapter for job, _ in jobs if (adapter := _stored_adapter(job)) is not None}
    (first, given), *_ = jobs
    model, server, say = given["model"], given["server"], first.progress.say
    with ExitStack() as stack:

        @cache
        def clients() -> dict[str, Client]:
            return stack.enter_context(vllm.open_modules(model, adapters, server, say))

        for job, sections in jobs:
            name, benchmark = module_name(job), sections["benchmark"]
            answers, *_ = _cache_of(
                job, adapters.get(name), model, sections["prompt"], sections["eval"], benchmark
            )
            served = name if name in adapters else model.name
            answers.complete(lambda served=served: clients()[served], _title(job, benchmark), job.progress)


def may_share_server(config: Config, variant: str) -> bool:
    """True if a vLLM server can hold the target's adapter beside others, and answers by requests alone."""
    from stages.engines import vllm

    target, _, name = variant.partition("@")
    asks = not hasattr(benchmarks.pick(config.eval.benchmarks[name].kind), "run")
    has_adapter_file = target not in (*REGIONS, ROUTED)
    return asks and has_adapter_file and config.served_by_vllm and vllm.serves_modules(config.server)


def _title(job: StageContext, benchmark: BenchmarkSection) -> str:
    return f"eval {job.variant.partition('@')[0]} {benchmark.kind}"


def _stored_adapter(job: StageContext) -> Path | None:
    """The folder of the target's adapter in an artifact; None for the base."""
    target = job.variant.partition("@")[0]
    if target.startswith(KEPT):
        return job.inputs["rl"].kept_adapter(target.removeprefix(KEPT))
    return job.adapter("score", "sft", "rl")


def _cache_of(
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
        "dtype": _dtype(spec.model, spec.engine),
        "adapter": _adapter_digest(spec.adapter),
        "engine": spec.engine,
        "server": job.outside.get("server"),
    }


def _dtype(model: ModelSection, engine: str) -> str:
    """The numbers that an engine computes answers and votes in."""
    dtype = answer_dtype(model, engine)
    return f"nf4 {dtype}" if model.load_in_4bit else dtype


def _adapter_digest(adapter: Path | None) -> str | None:
    if adapter is None:
        return None
    files = ("adapter_model.safetensors", "adapter_config.json")
    return key_of({name: sha256_file(adapter / name) for name in files})


def _evaluate(
    job: StageContext,
    adapter: Path | None,
    model: ModelSection,
    prompt: PromptSection,
    eval: EvalSection,
    benchmark: BenchmarkSection,
    server: ServerSection,
    sandbox: SandboxSection | None,
) -> dict[str, Any]:
    """Answer and grade the benchmark, and write the results; see `run`."""
    target, progress = job.variant.partition("@")[0], job.progress
    module = benchmarks.pick(benchmark.kind)
    if hasattr(module, "run"):
        job.engines.close()  # the harness loads the model itself
        summary: dict[str, Any] = module.run(model, adapter, benchmark, server, target, job.out, progress)
        return summary
    cache, rows, renderer, prompts = _cache_of(job, adapter, model, prompt, eval, benchmark)
    backend = sandboxes.from_settings(sandbox, progress.say) if sandbox else None
    context = Context(renderer.section.answer_format, renderer.section.template == "chat", backend)

    spec = EngineSpec(eval.engine, model, adapter)
    cache.complete(lambda: job.engines.get(spec, server, progress.say), _title(job, benchmark), progress)
    answers = cache.answers

    parity = _check_parity(job, prompts, answers, benchmark, eval, model, adapter, renderer.tokenizer)
    samples = grade_all(rows, prompts, answers, renderer, context, benchmark, progress)
    write_jsonl(job.out / "samples.jsonl", (asdict(sample) for sample in samples))
    metrics = compute_metrics(samples, module.GROUPS)
    record = {
        "target": target,
        "benchmark": benchmark.model_dump(mode="json"),
        "engine": eval.engine,
        **metrics,
        "parity": parity,
        "sandbox": context.sandbox and context.sandbox.name,
        **_prompt_record(prompts[0], renderer),
    }
    (job.out / "metrics.json").write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    sandbox_name = {"sandbox": context.sandbox.name} if context.sandbox else {}
    return {"kind": benchmark.kind, **sandbox_name, **headline(metrics)}


def _prompt_record(first: RenderedPrompt, renderer: Renderer) -> dict[str, Any]:
    """The part of metrics.json that shows what the prompts look like."""
    bos = renderer.tokenizer.bos_token_id
    return {
        "first_prompt": first.text,
        "first_prompt_tokens": len(first.ids),
        "bos_tokens_in_it": first.ids.count(bos) if bos is not None else 0,
        "stop": [*(renderer.tokenizer.decode([stop]) for stop in renderer.stop_ids), *first.stop],
        "prompt": renderer.digest(),
    }


def _check_parity(
    job: StageContext,
    prompts: list[RenderedPrompt],
    answers: dict[tuple[int, int], CachedAnswer],
    benchmark: BenchmarkSection,
    eval: EvalSection,
    model: ModelSection,
    adapter: Path | None,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any] | None:
    """Check the first answers with the unmerged adapter in plain PEFT.

    None if `eval.parity_items` is 0, answers were sampled, or engine transformers served the base model.
    """
    if not eval.parity_items or benchmark.temperature or (adapter is None and eval.engine == "transformers"):
        return None
    import torch

    from stages.evaluation import parity

    if torch.cuda.is_available():
        job.engines.close()  # a running server holds most of the device's memory
    pairs = [(prompts[i], answers[i, 0]) for i in range(min(eval.parity_items, len(prompts)))]
    hint = "another engine: --set eval.engine=transformers; no check: --set eval.parity_items=0"
    return parity.check(pairs, model, adapter, tokenizer, hint, job.progress.say)
