"""Texts of a model or of a stranger's rows, however long and odd, are read in linear time and never raise."""

import time

import pytest

from stages.prompts import answers, code
from stages.rewards.builtin import rewards

N = 40_000
PATIENCE_S = 1.5
"""Of the processor's time: a linear pattern takes a hundredth of it, a quadratic one many times as much."""

TEXTS = {
    "spaces": " " * N,
    "an answer tag and spaces": "<answer>" + " " * N,
    "a line with a gap": "#### a" + " " * N + "b",
    "many markers": "#### " * (N // 5),
    "a bracket and spaces": "(" + " " * N + "x",
    "digits": "9" * N,
    "underscores": "5" + "_" * N + "+",
    "many numbers": "1 " * (N // 2),
    "commas": "1" + "," * N + "x",
    "many tags": "<reasoning>\n" + "\n</reasoning>\n<answer>\n" * (N // 24),
    "answer, answer": "answer " * (N // 7),
    "many blocks": "```\n" * (N // 4),
    "brackets": "(" * N,
    "a name of a block": "```python " + " " * N,
}
GIVEN = {"gold": ["5"], "response": ["one two"], "test": [""], "entry_point": ["f"]}
REWARDS = ["integer", "strict_format", "soft_format", "tag_count", "correctness", "text_overlap"]


@pytest.mark.parametrize("style", ["hash", "xml"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_long_texts_are_read_at_once(text, style):
    start = time.process_time()
    for name in REWARDS:
        (value,) = rewards.pick(name)(completions=[text], answer_format=[style], **GIVEN)
        assert value <= 1
    assert rewards.pick("correctness")(completions=[text], gold=[text], answer_format=[style])[0] in (0, 1)
    assert answers.equals_gold("5", text) is answers.equals_gold(text, "5") is False
    assert answers.rewrite(text, "5", style) and isinstance(code.code_block(text, "f"), str)
    assert time.process_time() - start < PATIENCE_S


@pytest.mark.parametrize("digits", [150, 5_000])
def test_an_answer_of_many_digits_equals_itself_alone(digits):
    """Those too long to be numbers are compared as texts (Python reads at most 4,300 digits)."""
    text = "9" * digits
    assert answers.equals_gold(text, text) and not answers.equals_gold(text, text[1:])
