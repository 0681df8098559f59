"""Target auto: the answer to each item is that of the mode which the router chooses for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.config import MODES, ROUTED, ClassifySection
from stages.evaluation.routing import answers_of_modes, compare, read_tuning, select_answers
from stages.labelling.router import Router, build_router
from stages.records import Sample, read_labels
from stages.store.digests import key_of

if TYPE_CHECKING:
    from stages.eval.run import Evaluation


def route(evaluation: Evaluation, classify: ClassifySection) -> tuple[list[Sample], dict[str, Any]]:
    """Return auto's answers, each taken from the mode chosen for its item, and a comparison of routings."""
    context, settings = evaluation.context, evaluation.eval.router
    name = context.variant.partition("@")[2]
    benchmarks = dict.fromkeys((name, settings.tune or name))
    fast_modes = [evaluation.of_mode(MODES[0], benchmark) for benchmark in benchmarks]
    items = [item for fast in fast_modes for item in fast.kind.load(fast.benchmark)]
    router = _router(evaluation, fast_modes[0], classify)
    router.set_questions(items)
    router.collect(
        lambda signal: fast_modes[0].engine(_adapter_for(signal, fast_modes[0])),
        context.progress, f"choosing for {ROUTED}", classify,
    )  # fmt: skip
    router.find_threshold(read_tuning(evaluation.eval, context.inputs))
    context.progress.say(router.summary())
    modes = {item.id: router.mode(router.system2(item)) for item in items}
    answers = answers_of_modes(evaluation.eval, name, context.inputs)
    routed = select_answers(answers, modes, choice_tokens=len(router.journals))
    return routed, {"router": router.record(), "routing": compare({**answers, ROUTED: routed})}


def _adapter_for(signal: str, fast: Evaluation) -> Path | None:
    """The adapter that is asked for a signal: that of the fast mode, or none, for the base."""
    return fast.stored_adapter() if signal == "choice" else None


def _router(evaluation: Evaluation, fast: Evaluation, classify: ClassifySection) -> Router:
    context, model = evaluation.context, evaluation.model
    of_base = f"{context.external_key['model']} {evaluation.dtype} {context.external_key.get('server')}"
    identities = {"vote": of_base, "choice": key_of(fast.identity(fast.stored_adapter()))}
    labels = read_labels(context.inputs["classify:train"].path / "labels.jsonl")
    return build_router(
        evaluation.eval.router, classify, model, evaluation.prompt, evaluation.eval.engine, identities,
        labels, context.journals,
    )  # fmt: skip
