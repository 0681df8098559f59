import json
import math
import re
import reprlib
from fractions import Fraction
from unittest.mock import Mock

import numpy
import pytest
import torch

from stages.config import BenchmarkSection
from stages.errors import ConfigError, DataError, SandboxError, UnusableResult
from stages.evaluation.benchmarks import demo, jsonl
from stages.evaluation.grading import Context
from stages.prompts.code import code_block, program_from_output, stub
from stages.records import Example
from stages.rewards import calls
from stages.rewards.builtin import rewards
from stages.sandbox import Limits, Sandbox, SandboxFailure

XML = "<reasoning>\n3 + 4 = 7\n</reasoning>\n<answer>\n7\n</answer>"
HASH = "3 + 4 = 7.\n#### 7"
PAPER = ["correctness", "integer", "strict_format", "soft_format", "tag_count"]


@pytest.mark.parametrize(("text", "style"), [(XML, "xml"), (HASH, "hash")])
def test_the_ideal_answer_earns_one_of_each(text, style):
    given = {"completions": [text, "", "I do not know"], "gold": ["7"] * 3, "answer_format": [style] * 3}
    assert [rewards.pick(name)(**given) for name in PAPER] == [[1.0, 0.0, 0.0]] * 5


@pytest.mark.parametrize(
    ("name", "style", "text", "value"),
    [
        ("correctness", "xml", XML.replace("7\n</answer>", "8\n</answer>"), 0.0),
        ("integer", "xml", XML.replace("7\n</answer>", "7.5\n</answer>"), 0.0),
        ("strict_format", "xml", XML.replace("\n", ""), 0.0),
        ("soft_format", "xml", XML.replace("\n", ""), 1.0),
        ("tag_count", "xml", XML + "\nand so on", 1 - 0.002 * 10),
        ("tag_count", "xml", XML.replace("<reasoning>\n", ""), 0.75),
        ("strict_format", "hash", "There are # 3\n#### 3", 1), ("strict_format", "hash", "a #### 3", 0),
        ("strict_format", "hash", "#### 3\nmore\n#### 4", 0), ("tag_count", "hash", "#### 3\nm\n#### 4", 0),
        ("strict_format", "hash", "2\n#### 4\nmore", 0), ("tag_count", "hash", "2\n#### 4\nmore", 1),
        ("soft_format", "hash", "<think>I will write #### 18 at the end. But wait", 0),
        ("soft_format", "hash", "So\n##### 7", 0),
        ("strict_format", "xml", f"<think>Hm.</think>\n\n{XML}", 1),
    ],
)  # fmt: skip
def test_partial_answers(name, style, text, value):
    assert rewards.pick(name)(completions=[text], gold=["7"], answer_format=[style]) == pytest.approx([value])


@pytest.mark.parametrize(
    ("text", "wanted", "value"),
    [
        ("The cat sat.", "the cat sat", 1), ("the cat", "the cat sat", 0.8), ("a dog", "the cat sat", 0),
        ("", "the cat sat", 0), ("<think>Five words are not these.</think> Paris", "Paris", 1),
        # Without spaces each character is a word.
        ("今天北京的天气很好适合散步", "今天北京的天气很好，适合出门散步。", 26 / 28),
        ("हिन्दी भाषा", "हिन्दी", 2 / 3), ("don't stop", "do not stop", 1 / 3),
    ],
)  # fmt: skip
def test_overlap_is_the_f1_of_words(text, wanted, value):
    assert rewards.pick("text_overlap")(completions=[text], response=[wanted]) == [pytest.approx(value)]


TEST = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9\n"


def test_code_is_run_in_the_sandbox():
    texts = [
        "```python\ndef square(x):\n    return x + x\n```",
        "no code",
        "```bash\npip install x\n```\nThen:\n```python3\ndef square(x):\n    return x * x\n```\nDone.",
        "```text\n4 is 2 * 2\n```\nHence ```python\ndef square(x):\n    return x * x```\nwith ```x``` in it.",
    ]
    box = Sandbox("unsafe-no-sandbox", Limits(20, 512))  # which of them does not matter here
    given = {"test": [TEST] * 4, "entry_point": ["square"] * 4, "sandbox": box}
    assert rewards.pick("code_tests")(completions=texts, **given) == [0.0, 0.0, 1.0, 1.0]


def test_any_beginning_of_a_function_can_be_run_with_what_follows_a_thought():
    answer = "```python\ndef f(x):\n    return 2 * x\n```"
    beginnings = ("def f(x):\n    # twice\n", 'def f(x):\n\t"""Twice."""\n', "def f(x):\n    if x:\n")
    for prompt in beginnings:
        for text in (stub(prompt), program_from_output(answer, prompt, "f", chat=True)):
            compile(text, "", "exec")
    with pytest.raises(SyntaxError, match="not the beginning of a Python program"):
        stub("Write a function.")
    thought = f"<think>\n{answer.replace('2 *', '3 *')}\n"  # which is a draft
    assert program_from_output(thought, "def f(x):\n", "f", chat=True) is None
    assert "2 *" in program_from_output(f"{thought}</think>\n{answer}", "def f(x):\n", "f", chat=True)
    future = answer.replace("def f(x)", "from __future__ import annotations\ndef f(x: X) -> int")
    program = program_from_output(future, 'import math\n\ndef f(x):\n    """Double."""\n', "f", chat=True)
    compile(program, "program", "exec")  # imports from the future come first


F = "```"
DOC = f'def f():\n    """Doc\n    {F}\n    f()\n    {F}\n    """\n'


@pytest.mark.parametrize(
    ("text", "program"),
    [
        (f"{F}python\n{DOC}{F}\nDone", DOC),
        (f"The name is {F}f{F}\n{F}python\ndef f(): pass\n{F}\nDone", "def f(): pass\n"),
        (f"{F}python\ndef f(): pass{F}\nDone\n{F}\nother\n{F}", "def f(): pass"),
        (f"1. Like this:\n   {F}py\n   def f(): pass\n   {F}\n2. Done", "def f(): pass\n"),
    ],
)  # fmt: skip
def test_a_code_block_ends_at_its_own_fence(text, program):
    assert code_block(text, "f") == program


def test_columns_are_what_a_reward_must_be_given():
    names = ("correctness", "code_tests", "text_overlap")
    assert [calls.required_fields(rewards.pick(name)) for name in names] == [
        ["gold", "answer_format"], ["test", "entry_point"], ["response"],
    ]  # fmt: skip
    row = {"gold": "5", "level": 3, "prompt": "Q", "tags": ["x"], "mixed": 1, "note": None}
    assert calls.common_fields([row, row | {"level": 2.5, "mixed": "1", "other": 1}]) == {"gold", "level"}
    told = r"reward code_tests reads test, and 1 of 2 RL rows have none \(first: b\)"
    with pytest.raises(DataError, match=told):
        calls.check_fields({"code_tests": ["test"]}, [{"id": "a", "test": "x"}, {"id": "b"}])
    with pytest.raises(DataError) as caught:
        calls.check_fields({"f": ["answer"]}, [{"id": "a"}])
    assert "lorapar calls a row's answer `response`" in str(caught.value.hint)


OWN = """
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Limit:
    length: int
def short(completions, **_):
    return [float(len(text) <= Limit(3).length) for text in completions]
def broken(completions, gold, **_):
    return [1 / (text != "bad") for text in completions]
def _hidden(completions): ...
"""
PARAMETERS = """
raise SystemExit
def mine(completions, sandbox, **_): ...
def code_tests(completions, **given): ...
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    return str(tmp_path / "mine.py")


def test_a_file_of_own_rewards(file, tmp_path):
    """A sandbox goes to the rewards that have a parameter for one, found without running the file."""
    assert rewards.pick("short", file)(completions=["a", "long text"]) == [1.0, 0.0]
    rewards.check("short", file)
    with pytest.raises(ConfigError, match="unknown reward '_hidden'") as caught:
        rewards.check("_hidden", file)
    assert caught.value.hint.endswith("text_overlap, short, broken")
    (tmp_path / "parameters.py").write_text(PARAMETERS)
    needing = {"mine": True, "code_tests": False, "correctness": False}
    for name, needs in needing.items():
        assert calls.needs_sandbox([name], str(tmp_path / "parameters.py")) is needs
    assert calls.needs_sandbox(["correctness", "code_tests"], None)


def test_a_raising_reward_stops_with_its_name_and_sample_if_it_is_its_fault(file):
    reward = calls.with_checks("broken", rewards.pick("broken", file))
    assert reward(completions=["good"], gold=["1"]) == [1.0]
    with pytest.raises(UnusableResult) as caught:
        reward(completions=["good", "bad"], gold=["1", "2"], question=["one?", "two?"])
    text = "reward broken raised ZeroDivisionError: division by zero; sample 2 of 2: 'bad' to 'two?'"
    assert str(caught.value) == text

    for error, raised in ((SandboxFailure("bwrap: no"), SandboxError), (MemoryError(), MemoryError)):
        with pytest.raises(raised):
            calls.with_checks("mine", Mock(side_effect=error))(completions=["a"])


def test_rewards_of_other_libraries_are_floats_and_what_is_no_finite_number_stops():
    for value in (math.inf, "1.0", [1.0], 10**400, torch.ones(2), torch.tensor(math.nan)):
        reward = calls.with_checks("odd", lambda completions, value=value: [value])
        with pytest.raises(UnusableResult, match=f"odd is {re.escape(reprlib.repr(value))} for 'text'"):
            reward(completions=["text"])
    given = [torch.tensor(0.5), numpy.float32(0.25), True, Fraction(1, 8), torch.ones(1).bfloat16()]
    seen = calls.with_checks("odd", lambda completions: given)(completions=["text"] * 5)
    assert seen == [0.5, 0.25, 1, 0.125, 1] and {type(value) for value in seen} == {float}
    assert calls.with_checks("odd", lambda completions: [None])(completions=["text"]) == [None]
    for number, values in ((1, [1.0]), (0, None)):
        with pytest.raises(UnusableResult, match=f"reward odd gave {number} values for 2 completions"):
            calls.with_checks("odd", lambda completions, values=values: values)(completions=["a", "b"])


@pytest.mark.parametrize("gold", ["B", "(b)"])
def test_a_letter_is_right_however_it_is_written_and_for_benchmarks_alike(tmp_path, gold):
    said = {"#### B": 1, "#### B) because": 1, "#### (b)": 1, "#### A": 0}
    given = {"completions": list(said), "gold": [gold] * len(said), "answer_format": ["hash"] * len(said)}
    assert rewards.pick("correctness")(**given) == list(said.values())
    (tmp_path / "items.jsonl").write_text(json.dumps({"prompt": "P", "answer": gold}) + "\n")
    (item,) = jsonl.load(BenchmarkSection(path=str(tmp_path / "items.jsonl")))
    row, context = Example("i", "P", "", gold, {}), Context("hash", chat=False)
    for text, right in said.items():
        assert jsonl.grade(item, text, context).correct == bool(right)
        assert demo.grade(row, text, context).correct == bool(right)
    assert demo.grade(row, "The answer is (B) Paris", context).flexible == "B"
