"""On the real data sets, where a copy is at hand.

LORAPAR_DATA=folder with gsm8k/, mmlu/ and humaneval/ (JSON Lines).
"""

import os
from collections import Counter
from pathlib import Path

import pytest

from stages.config import EvalSection
from stages.evaluation.benchmarks import gsm8k, humaneval, mmlu
from stages.evaluation.grading import Context
from stages.pipeline.resolve import registries
from stages.prompts.answers import parse_number
from stages.sandbox import Limits, Sandbox, backends, selftest

DATA = Path(os.environ.get("LORAPAR_DATA", "nowhere"))

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="LORAPAR_DATA names no folder")


def section(kind: str, **settings):
    entries = {"benchmarks": {kind: settings}}
    return EvalSection.model_validate(entries, context=registries()).benchmarks[kind]


def test_every_gsm8k_answer_is_a_number_and_its_own_text_is_right():
    files = [str(DATA / "gsm8k" / name) for name in ("train.jsonl.gz", "test.jsonl")]
    problems = [example for file in files for example in gsm8k.load(section("gsm8k", path=file))]
    assert len(problems) == 8792
    assert all(parse_number(e.gold) is not None for e in problems)
    grades = [gsm8k.grade(e, e.response, Context("hash", chat=False)) for e in problems]
    assert all(grade.correct and grade.correct_flexible for grade in grades)


def test_mmlu_s_subjects_and_categories():
    rows = mmlu.load(section("mmlu", path=str(DATA / "mmlu/test.jsonl.gz")))
    assert len(rows) == 14042 and len({row.id for row in rows}) == 14042
    assert len(mmlu.CATEGORY) == 57 == len({row.extra["subject"] for row in rows})
    assert {row.extra["category"] for row in rows} == {"STEM", "humanities", "social sciences", "other"}


EQUAL = """
    class E:
        def __eq__(s, o): return True
        def __ne__(s, o): return False
        __lt__ = __gt__ = __le__ = __ge__ = __eq__
        def __getattr__(s, name): return lambda *a: E()
        def __sub__(s, o): return 0
        def __len__(s): return 0
        def __iter__(s): return iter(())
    return E()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bubblewrap", "landlock"])
def test_humaneval_s_solutions(name, capsys):
    """All canonical solutions pass, of every fourth in a chat, too; nothing, or equal to all, does not."""
    if problems := selftest(backends.BACKENDS[name]):
        pytest.skip(f"{name}: {problems[0]}")
    sandbox = Sandbox(name, Limits(seconds=10))
    tasks = humaneval.load(section("humaneval", path=str(DATA / "humaneval/HumanEval.jsonl")))
    answers = {
        "canonical": lambda e: (e.response, False),
        "canonical, chat": lambda e: (f"Here it is:\n```python\n{e.prompt}{e.response}```\nIt works.", True),
        "canonical body, chat": lambda e: (f"```python\n{e.response}```", True),
        "return None": lambda e: ("    return None\n", False),
        "always equal": lambda e: (EQUAL, False),
    }
    passed, standard = Counter(), Counter()
    for title, answer in answers.items():
        for example in tasks[:: 1 if title == "canonical" else 4]:
            text, chat = answer(example)
            grade = humaneval.grade(example, text, Context("hash", chat, sandbox))
            assert not grade.refused
            passed[title] += grade.correct
            standard[title] += grade.correct_flexible
    with capsys.disabled():
        print(f"\n{name}, of {len(tasks)}: {dict(passed)}; by the benchmark's own verdict: {dict(standard)}")
    assert len(tasks) == 164
    assert [passed[title] for title in answers] == [164, 41, 41, 0, 0]
    assert standard["canonical"] == 164 and standard["return None"] == 0 and standard["always equal"] > 25
