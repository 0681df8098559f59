"""Target auto: the answer to each item is that of the mode which the router chooses for it."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from stages.config import CHOICE, MODES, ROUTED, ClassifySection
from stages.engines import Engine
from stages.evaluation.routing import answers_of_modes, compare, read_tuning, select_answers
from stages.labelling.router import Router, choice_journal, vote_journal
from stages.models.tokenizer import load_tokenizer
from stages.prompts.renderer import Renderer
from stages.records import Example, Sample, read_labels
from stages.store.digests import key_of

if TYPE_CHECKING:
    from stages.eval.run import Evaluation


def route(evaluation: Evaluation, classify: ClassifySection) -> tuple[list[Sample], dict[str, Any]]:
    """Return auto's answers, each taken from the mode chosen for its item, and a comparison of routings."""
    context, settings = evaluation.context, evaluation.eval.router
    name = context.variant.partition("@")[2]
    names = dict.fromkeys((name, *([settings.tune] if settings.tune else [])))
    kinds = {name: evaluation.of_mode(MODES[0], name) for name in names}
    items = {name: fast.kind.load(fast.benchmark) for name, fast in kinds.items()}
    router = _router(evaluation, classify)
    _ask(router, evaluation, classify, [item for of_one in items.values() for item in of_one])
    cascade = "cascade" in settings.by
    if cascade:
        for fast in kinds.values():
            router.unsure |= _unsure(fast, evaluation)
    router.find_threshold(read_tuning(evaluation.eval, context.inputs))
    context.progress.say(router.summary())
    modes = {item.id: router.mode(router.system2(item)) for item in items[name]}
    answers = answers_of_modes(evaluation.eval, name, context.inputs)
    routed = select_answers(answers, modes, asked=len(router.journals), cascade=cascade)
    return routed, {"router": router.record(), "routing": compare({**answers, ROUTED: routed})}


def _router(evaluation: Evaluation, classify: ClassifySection) -> Router:
    context, model, settings = evaluation.context, evaluation.model, evaluation.eval.router
    key, engine, journals = context.external_key, evaluation.eval.engine, {}
    identity = f"{key['model']} {evaluation.dtype} {key.get('server')}"
    if "vote" in settings.by:
        journals["vote"] = vote_journal(classify, model, engine, identity, context.journals)
    if "choice" in settings.by:
        fast = evaluation.of_mode(MODES[0])
        renderer = Renderer(load_tokenizer(model), fast.prompt, system=CHOICE)
        identity = key_of(fast.identity(fast.stored_adapter()))
        journals["choice"] = choice_journal(renderer, model, engine, identity, context.journals)
    labels = read_labels(context.inputs["classify:train"].path / "labels.jsonl")
    return Router(settings, journals, labels, classify.seed)


def _ask(router: Router, evaluation: Evaluation, classify: ClassifySection, items: list[Example]) -> None:
    fast = evaluation.of_mode(MODES[0]) if "choice" in router.journals else None

    def engine(signal: str) -> Engine:
        return fast.engine(fast.stored_adapter()) if signal == "choice" and fast else evaluation.engine()

    router.set_questions(items)
    router.collect(engine, evaluation.context.progress, f"choosing for {ROUTED}", classify)


def _unsure(fast: Evaluation, evaluation: Evaluation) -> dict[str, float]:
    """By item id: 1 minus the least probability of a token in the fast answer, or the mean of answers."""
    adapter: Path | None = fast.stored_adapter()
    answers, progress = fast.cache(adapter), evaluation.context.progress
    answers.complete(lambda: fast.engine(adapter), fast.title, progress)  # they are in the journal
    slots = list(answers.answers)
    rows = [(answers.prompts[i].ids, answers.answers[i, n].ids) for i, n in slots]
    progress.start("probabilities of the fast answers", len(rows))
    unsure: dict[str, list[float]] = {}
    for at, least in fast.engine(adapter).least_probabilities(rows):
        unsure.setdefault(answers.rows[slots[at][0]].example.id, []).append(1 - least)
        progress.advance(1)
    return {id: fmean(values) for id, values in unsure.items()}
