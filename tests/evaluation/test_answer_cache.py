"""From what an engine gave to the text that is graded, and to the verdict."""

from functools import partial

import pytest
import torch
from conftest import Silent
from pydantic import ValidationError

from stages.config import BenchmarkSection, ModelSection, PromptSection
from stages.engines import Completion
from stages.errors import AnswerError, ArtifactError
from stages.eval import parity
from stages.eval.answer_cache import AnswerCache, CachedAnswer, _outcome
from stages.evaluation.grading import Context, Grade
from stages.models.base import load_base
from stages.prompts.renderer import RenderedPrompt, Renderer
from stages.records import Example, Labelled

DEMO = BenchmarkSection(kind="demo", path="x.jsonl")


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def cache(tokenizer, folder, golds: list[str], **settings) -> AnswerCache:
    """The answers to Q0, Q1, …"""
    extra = {"tokens": 99, "part": "a"}
    rows = [Labelled(Example(gold, f"Q{i}", "", gold, extra), 1, {}) for i, gold in enumerate(golds)]
    section, renderer = DEMO.model_copy(update=settings), Renderer(tokenizer, PromptSection())
    return AnswerCache(rows, section, renderer, {}, folder, regenerate=False)


def test_a_choice_is_the_likeliest_word_and_a_line_of_a_journal_must_fit_its_question(tokenizer):
    for odd in ({"ids": [-1]}, {"shares": [1.5]}):
        with pytest.raises(ValidationError):
            CachedAnswer(**odd)
    renderer = Renderer(tokenizer, PromptSection())
    prompt = RenderedPrompt("", [], (), (" A", " B", " C", " D"))
    with pytest.raises(ArtifactError, match="has 3 shares for 4 words"):
        CachedAnswer(shares=[0.1, 0.2, 0.7]).text(renderer, prompt)
    assert CachedAnswer(shares=[0.1, 0.2, 0.6, 0.1]).text(renderer, prompt)[0] == "C"


def test_a_text_ends_at_the_first_stop_text(tokenizer):
    written = ids(tokenizer, "#### 5\nX\nQ #### 7")
    prompt, renderer = RenderedPrompt("", [], ("\nQ", "\nX")), Renderer(tokenizer, PromptSection())
    given = CachedAnswer(ids=written, complete=False).text(renderer, prompt)
    assert given == ("#### 5", True, {"tokens": len(written)})


def test_the_tokens_of_a_thought_are_counted_apart(tokenizer):
    thought, answer = ids(tokenizer, "2 and 2.\n</think>"), ids(tokenizer, "#### 4")
    asked, renderer = RenderedPrompt("Q<think>\n", []), Renderer(tokenizer, PromptSection())
    text, _, extra = CachedAnswer(ids=thought + answer).text(renderer, asked)
    assert text == "<think>\n2 and 2.\n</think>#### 4"
    assert extra == {"tokens": len(thought + answer), "thought_tokens": len(thought)}
    extra = CachedAnswer(ids=answer, complete=False).text(renderer, asked)[2]
    assert extra == {"tokens": len(answer), "thought_tokens": len(answer)}


def test_each_answer_is_graded_against_its_own_item(tokenizer, tmp_path):
    replies, texts = cache(tokenizer, tmp_path, ["4", "5", "6"]), ["#### 4", "it is 5", "#### 7"]
    recorded = {(i, 0): CachedAnswer(ids=ids(tokenizer, t), complete=i < 2) for i, t in enumerate(texts)}
    replies.answers = recorded
    graded = replies.graded(Context("hash", True), Silent())
    assert [(sample.correct, sample.correct_flexible, sample.outcome) for sample in graded] == [
        (True, True, "correct"), (False, True, "unparsed"), (False, False, "truncated"),
    ]  # fmt: skip
    # `tokens` is the length of the answer, whatever the row has by that name.
    lengths = [len(answer.ids) for answer in recorded.values()]
    assert [s.extra for s in graded] == [{"part": "a", "tokens": length} for length in lengths]
    assert _outcome(Grade(None, None, False, False, refused=True), True) == "refused"
    assert _outcome(Grade("7", "7", False, False), True) == "wrong"


def test_each_sample_of_an_item_has_a_seed_of_its_own(tokenizer, tmp_path):
    seeds = []

    class Engine:
        def generate(self, questions, sampling):
            for i, question in enumerate(questions):
                seeds.append(question.seed)
                yield i, Completion([65 + i], True)

    replies = cache(tokenizer, tmp_path, ["4"], samples=3, temperature=0.8)
    replies.complete(Engine, "t", Silent())
    assert len(set(seeds)) == 3
    assert [replies.answers[0, n].ids for n in range(3)] == [[65], [66], [67]]


def test_a_thought_at_its_limit_is_closed_and_the_answer_follows(tokenizer, tmp_path):
    """An answer that has ended stays, and one without a thought goes on as it began."""
    first = {"Q0": ("<think>\n2 and 2", False), "Q1": ("#### 5", True), "Q2": ("It is 6. ##", False)}
    then = {"Q0": "#### 4", "Q2": "## 6"}
    limits = []

    class Thinker:
        def generate(self, requests, sampling):
            limits.append(sampling.max_new_tokens)
            for k, request in enumerate(requests):
                text = tokenizer.decode(request.ids)
                name = text[text.rindex("Q") :][:2]
                said, complete = first[name] if len(limits) == 1 else (then[name], True)
                yield k, Completion(ids(tokenizer, said), complete)

    limit = len(ids(tokenizer, first["Q0"][0]))
    replies = cache(tokenizer, tmp_path, ["4", "5", "6"], max_thinking_tokens=limit, max_new_tokens=5)
    replies.complete(Thinker, "", Silent())
    graded = replies.graded(Context("hash", True), Silent())
    assert limits == [limit, 5] and [sample.correct for sample in graded] == [True] * 3
    outputs = [sample.output for sample in graded[::2]]
    assert outputs == ["<think>\n2 and 2\n</think>\n\n#### 4", "It is 6. #### 6"]
    assert graded[0].extra["thought_tokens"] > 0
    spans = [replies.closing_span(i) for i in range(3)]
    assert spans == [range(limit, limit + len(ids(tokenizer, "\n</think>\n\n"))), range(0), range(0)]


def test_what_closes_a_thought_is_not_compared_with_the_adapter(tiny, tokenizer, monkeypatch):
    monkeypatch.setattr(parity, "TOLERANCE", 1e-4)  # a random model is sure of nothing
    section = ModelSection(name=str(tiny), dtype="float32")
    model, prompt = load_base(section), RenderedPrompt("", [5, 6, 7])
    answer: list[int] = []
    for place in range(6):
        row = torch.tensor([prompt.ids + answer])
        likeliest = int(model(input_ids=row).logits[0, -1].argmax())
        answer.append(likeliest if place not in (2, 3) else 9)
    given = CachedAnswer(ids=answer, complete=False)
    compare = partial(parity.check, model=section, adapter=None, tokenizer=tokenizer, hint="")
    assert compare([(prompt, given, range(2, 4))])["tokens"] == 4
    with pytest.raises(AnswerError, match="what was served is not this adapter"):
        compare([(prompt, given, range(0))])
