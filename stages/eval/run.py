"""One target, such as base, sft or rl, answers one benchmark; every answer is graded."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages import sandbox as sandboxes
from stages.config import (
    UNTRAINED_TARGETS,
    BenchmarkSection,
    EvalSection,
    ModelSection,
    ModesSection,
    PromptSection,
    SandboxSection,
    ServerSection,
    prompt_under,
    split_target,
)
from stages.engines import EngineSpec
from stages.eval.answer_cache import AnswerCache
from stages.evaluation.benchmarks import benchmarks
from stages.evaluation.grading import Context
from stages.evaluation.metrics import compute_metrics, headline
from stages.models.dtype import answer_dtype
from stages.models.tokenizer import load_tokenizer
from stages.prompts.renderer import Renderer
from stages.records import Labelled, read_labels, write_jsonl
from stages.store.digests import key_of, sha256_file

if TYPE_CHECKING:
    from stages.engines.openai import Client
    from stages.pipeline.context import StageContext


@dataclass(frozen=True)
class Evaluation:
    """One target on one benchmark, with the sections that its stage reads."""

    context: StageContext
    model: ModelSection
    prompt: PromptSection
    modes: ModesSection | None
    eval: EvalSection
    benchmark: BenchmarkSection
    server: ServerSection
    sandbox: SandboxSection | None = None

    @property
    def target(self) -> str:
        return self.context.variant.partition("@")[0]

    @property
    def kind(self) -> Any:
        """The module of the benchmark's kind."""
        return benchmarks.pick(self.benchmark.kind)

    @property
    def asked(self) -> BenchmarkSection:
        """The benchmark with the worked examples that this target gets."""
        return self.eval.as_asked(self.benchmark, self.target)

    @property
    def title(self) -> str:
        return f"eval {self.target} {self.benchmark.kind}"

    def cache(self, adapter: Path | None) -> AnswerCache:
        """The cache of the target's answers; without labels of the benchmark all items are undecided."""
        context = self.context
        weights, mode = split_target(self.target)
        limit = self.eval.untrained_items if weights in UNTRAINED_TARGETS else None
        if "classify" in context.inputs:
            rows = read_labels(context.labels)[:limit]
        else:
            rows = [Labelled(example, None, {}) for example in self.kind.load(self.benchmark)[:limit]]
        dtype = answer_dtype(self.model, self.eval.engine)
        files = ("adapter_model.safetensors", "adapter_config.json")
        identity = {
            "model": context.outside["model"],
            "dtype": f"nf4 {dtype}" if self.model.load_in_4bit else dtype,
            "adapter": adapter and key_of({name: sha256_file(adapter / name) for name in files}),
            "engine": self.eval.engine,
            "server": context.outside.get("server"),
        }
        prompt = prompt_under(self.benchmark.prompt or self.prompt, self.modes, mode)
        renderer = Renderer(load_tokenizer(self.model), prompt)
        return AnswerCache(rows, self.asked, renderer, identity, context.journals / "answers", context.force)


def run(context: StageContext, **sections: Any) -> dict[str, Any]:
    """Write `samples.jsonl` and `metrics.json`; returns the accuracies.

    Each answer is journalled as it arrives, under its model, adapter, engine, prompt and sampling. So neither
    a resumed run nor one with other labels, another limit or another grader generates it again. Only
    `context.force` replaces earlier answers.
    """
    evaluation, progress = Evaluation(context, **sections), context.progress
    settings = evaluation.sandbox
    sandbox = sandboxes.from_settings(settings, progress.say) if settings else None
    cache = evaluation.cache(context.adapter)
    spec = EngineSpec(evaluation.eval.engine, evaluation.model, context.adapter)
    engine = partial(context.engines.get, spec, evaluation.server, progress.say)
    cache.complete(engine, evaluation.title, progress)
    parity = _check_parity(evaluation, context.adapter, cache)
    renderer, first = cache.renderer, cache.prompts[0]
    prompt, tokenizer = renderer.section, renderer.tokenizer
    samples = cache.graded(Context(prompt.answer_format, prompt.template == "chat", sandbox), progress)
    write_jsonl(context.out / "samples.jsonl", (asdict(sample) for sample in samples))
    metrics = compute_metrics(samples, evaluation.kind.GROUPS)
    record = {
        "target": evaluation.target,
        "benchmark": evaluation.asked.model_dump(mode="json"),
        "engine": evaluation.eval.engine,
        **metrics,
        "parity": parity,
        "sandbox": sandbox and sandbox.name,
        "first_prompt": first.text,
        "bos_tokens_in_it": first.ids.count(tokenizer.bos_token_id),
        "stop": [*(tokenizer.decode([stop]) for stop in renderer.stop_ids), *first.stop],
        "prompt": renderer.digest(),
    }
    text = json.dumps(record, indent=1, ensure_ascii=False)
    (context.out / "metrics.json").write_text(text, encoding="utf-8")
    sandbox_name = {"sandbox": sandbox.name} if sandbox else {}
    return {"kind": evaluation.benchmark.kind, **sandbox_name, **headline(metrics)}


def answer_together(calls: list[tuple[StageContext, dict[str, Any]]]) -> None:
    """Let one vLLM server, with each adapter as a LoRA module, answer for several targets, into the journal.

    calls: what `run` gets later, which then finds every answer. Else each target would have a server of its
    own, and on a GPU each benchmark, too, because the check of the first answers needs the server's memory.
    Targets are asked one after the other. The server is started only if the journal lacks an answer.
    """
    from stages.engines import vllm

    if not vllm.serves_modules():
        return
    evaluations = [Evaluation(context, **sections) for context, sections in calls]
    # Should another process's server answer on the same port, it has no model of such a name. The modes of an
    # adapter are one module.
    names = {each.target: f"{split_target(each.target)[0]}-{os.getpid()}" for each in evaluations}
    adapters = {names[e.target]: adapter for e in evaluations if (adapter := e.context.adapter) is not None}
    first = evaluations[0]
    with ExitStack() as stack:

        @cache
        def clients() -> dict[str, Client]:
            say = first.context.progress.say
            return stack.enter_context(vllm.open_modules(first.model, adapters, first.server, say))

        for evaluation in evaluations:
            name = names[evaluation.target]
            answers = evaluation.cache(adapters.get(name))
            served = name if name in adapters else first.model.name
            progress = evaluation.context.progress
            answers.complete(lambda served=served: clients()[served], evaluation.title, progress)


def _check_parity(evaluation: Evaluation, adapter: Path | None, cache: AnswerCache) -> dict[str, Any] | None:
    """Check vLLM's first answers with the unmerged adapter in plain PEFT; None if they were sampled."""
    if evaluation.benchmark.temperature or evaluation.eval.engine != "vllm":
        return None
    import torch

    from stages.eval import parity

    if torch.cuda.is_available():
        evaluation.context.engines.close()  # a running server holds most of the device's memory
    answers = [
        (prompt, cache.answers[i, 0], cache.closing_span(i))
        for i, prompt in enumerate(cache.prompts[: parity.ITEMS])
    ]
    hint = "another engine: --set eval.engine=transformers"
    return parity.check(answers, evaluation.model, adapter, cache.renderer.tokenizer, hint)
