"""Answers as models and rows write them: numbers, letters, formats, and what is none.

However long and odd a text is, it is read in linear time, and nothing is raised.
"""

import time
from fractions import Fraction

import pytest

from stages.prompts import answers, code
from stages.prompts.answers import equals_gold, extract, gold_from_response, parse_number, rewrite, works_out
from stages.rewards.builtin import rewards


@pytest.mark.parametrize(
    ("text", "style", "strict", "flexible"),
    [
        ("#### 3\n#### 4", "hash", "4", "4"), ("#### 1,200.", "hash", "1,200", "1,200"),
        ("so it is 1,200 dollars", "hash", None, "1,200"), ("The answer is Paris.", "hash", None, "Paris"),
        ("", "hash", None, None), ("#### 5", "xml", None, "5"),
        ("<answer>1</answer><answer>2</answer>", "xml", "2", "2"),
        # A thought is no answer.
        ("<think>Maybe #### 5? No: 2 + 4 is 6.</think> The answer is 6.", "hash", None, "6"),
        ("Maybe 5?</think>\n#### 6", "hash", "6", "6"),  # the prompt had opened it
        ("<think>I will write #### 18 at the end. But wait", "hash", None, None),
        # The flexible reading begins at the answer that was found.
        ("#### Answer: 18\n#### \nDone", "hash", "Answer: 18", "18"),
        ("#### Answer\nThere are 18 eggs. That is the Answer.", "hash", "Answer", "18"),
    ],
)  # fmt: skip
def test_extraction(text, style, strict, flexible):
    found = extract(text, style)
    assert (found.strict, found.flexible) == (strict, flexible)


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("1200", "1,200", True), ("$12.00", "12", True), ("12.5", "12", False), (None, "12", False),
        ("paris.", "Paris", True), ("Lyon", "Paris", False), ("twelve", "12", False), ("0.5", "1/2", True),
        ("4 June", "4 July", False), ("7 weeks", "7 days", False), ("5 inches", "5 inch", True),
        ("2 boxes", "2 box", True), ("3 cities", "3 city", True), ("5 ms", "5 m", False), ("+5", "5", True),
        ("18", "$\\boxed{18}$", True), ("\\(18\\)", "18", True), ('"18"', "18", True), ("--5", "-5", False),
        ("+3x", "3", False), ("7", "7 days", True), ("7 days a week", "7 days", True), ("5%", "5", True),
        ("5 percent", "5%", True), ("$5", "5 dollars", True), ("5 million", "5,000,000", True),
        ("5 million", "5", False), ("3½", "3", False), ("1,2", "12", False), ("1,2", "1.2", False),
        ("3,50 €", "3.5", True), ("1.200,50 €", "1200.5", True), ("2,5 kg", "2.5 kg", True),
        ("34", "(3,4)", False), ("(3,4)", "(3,4)", True), ("3/4", "\\dfrac{3}{4}", True), ("3!", "3", False),
        ("是。", "是", True), ("“Paris”", "Paris", True), ("-x", "x", False), ("C#", "C", False),
        # The coefficient of a term is no number.
        ("3 x", "3", False), ("13x", "13", False), ("3π", "3", False), ("3sqrt(2)", "3", False),
        ("**3x**", "3", False), ("$3x", "3", False), ("3 x", "3 x", True), ("$3x", "$3x", True),
        ("5.0 km/h", "5 km/h", True), ("12", "$12/hour", True), ("3/x", "3", False), ("5 days!", "5", True),
    ],
)  # fmt: skip
def test_equality(answer, gold, right):
    assert equals_gold(answer, gold) is right


@pytest.mark.parametrize(
    "response",
    ["#### Step 1\nRun it.\n#### Step 2\nRun it again.", "##### 5", "Write `####` before it.\nThat is all."],
)
def test_a_heading_is_no_answer(response):
    """A response that does not end in `#### answer` stays whole."""
    assert gold_from_response(response) is None
    assert rewrite(response, gold_from_response(response), "hash") == response
    assert rewrite(response, "5", "hash") == f"{response}\n#### 5"
    assert f"<reasoning>\n{response}\n</reasoning>" in rewrite(response, "5", "xml")


def test_targets_are_rewritten():
    response = "3 * 4 = 12.\n#### 12"
    assert rewrite(response, gold_from_response(response), "hash") == response
    assert rewrite(response, "12", "xml") == "<reasoning>\n3 * 4 = 12.\n</reasoning>\n<answer>\n12\n</answer>"
    assert rewrite("free text", None, "xml") == "free text"
    assert gold_from_response("So it is 5. #### 5.\n\n") == "5"
    other = "3 * 4 = 12.\n#### 13"  # its row has a gold answer of its own
    assert rewrite(other, "12", "hash") == response
    for style in ("hash", "xml"):
        assert extract(rewrite("It is so.", "Paris", style), style).strict == "Paris"
    # An answer of several lines alone is not reasoning, and a response in xml is not wrapped again.
    assert rewrite("#### 2\n3", "2\n3", "hash") == "#### 2\n3"
    assert rewrite("#### 2\n3", "2\n3", "xml").startswith("<reasoning>\n\n</reasoning>")
    wrapped = "<reasoning>\n2+2=4\n</reasoning>\n<answer>\n4\n</answer>"
    assert rewrite(wrapped, "4", "xml") == wrapped


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("The correct answer is C. Option A is too small, option D is too large.", "C"),
        ("The answer is A. No, the answer is B.", "B"), ("Option A is too small, so option C", "C"),
        ("Answer: I think it is B.", "B"), ("The answer is A good one", None),
        ("The answer is A because B is wrong.", "A"), ("**Answer:** B. Not C.", "B"),
        ("Probably B, but I\u2019m not sure", "B"), ("<think>The answer is A, or B?</think> C", "C"),
        ("<think>The answer is A", None), ("The answer is (c)", "C"), ("The answer is a dog", None),
        (r"The answer is: $\boxed{D}$. Not A", "D"), ("**(B)** Hepatitis A", "B"), ("B (Vitamin C)", "B"),
        ("B \u2013 Vitamin C", "B"), ("A (small) dog, so C", "A"), ("* B has C", "C"), ("A-level, so D", "D"),
    ],
)  # fmt: skip
def test_the_choice_that_is_said_to_be_right(text, named):
    assert answers.extract_letter(text) == named


# As written, and its value.
WRITTEN = [
    ("0", 0), ("007", 7), ("12,345,678", 12345678), ("-3", -3), ("−3", -3), ("－3", -3), (".5", "0.5"),
    ("12.00", 12), ("$1,200.50", "1200.5"), ("-$5", -5), ("$-5", -5), ("€40", 40), ("\\$7", 7), ("10/5", 2),
    ("-3/4", "-3/4"), ("-1 1/2", "-3/2"), ("1,000/4", 250), ("12345678901234567890", 12345678901234567890),
]  # fmt: skip


@pytest.mark.parametrize("place", ["#### 99\nNo.\n####   {}  ", "So 2 * 3 = 6, and in all it is {} dollars."])
def test_numbers_in_their_places(place):
    for written, value in WRITTEN:
        found = extract(place.format(written), "hash")
        assert (found.strict is not None) is place.startswith("#")
        assert parse_number(found.flexible) == Fraction(value), written
        assert not equals_gold(found.flexible, str(Fraction(value) + 1))


# Text, and what the strict and the flexible reading make of it as a number.
ODD = [
    ("#### 5k", 5000, 5000), ("#### $1.5K.", 1500, 1500), ("#### 5 K", 5, 5), ("#### 3/x", None, 3),
    ("#### 5 km/h", 5, 5), ("#### 5μm", 5, 5), ("#### 5 a day", 5, 5), ("#### 12 %", 12, 12),
    ("#### **12**", 12, 12), ("#### 12 apples.", 12, 12), ("#### (12)", 12, 12), ("#### x = 4", None, 4),
    ("#### 3 hours 20 minutes", None, 20), ("#### twelve", None, None), ("####", None, None),
    ("#### 3/0", None, None), ("#### 4-", None, 4), ("### 5", None, 5), ("##### 5", None, 5),
    ("#### 5\n#### ", 5, 5), ("#### 5 #### 6", None, 6), ("it takes 3-5 days", None, 5), ("(4)-2", None, 2),
    ("a total of 1,200, at least", None, 1200), ("12, 13, and 14.", None, 14), ("\\boxed{12}", None, 12),
    ("**Answer: 12**", None, 12), ("There are none.", None, None), ("x=-4", None, -4), ("10/2=5", None, 5),
    ("the ratio 3/4", None, Fraction(3, 4)), ("#### -\n7", None, 7), ("#### 1.5e3", None, 3),
    ("12:30", None, 30), ("#### 13x", None, None), ("#### USD 40", 40, 40), ("$ 40", None, 40),
    ("So.\n#### Final Answer:\n**18**", None, 18), ("#### Conclusion\nJanet makes $18 a day.", None, 18),
    ("#### $\\boxed{18}$", 18, 18), ("#### 3 and a half", None, 3), ("#### 5 million", 5e6, 5e6),
    ("#### 2 dozen eggs", 24, 24), ("it is 5 hundred thousand", None, 500), ("#### 1,00,000", 1e5, 1e5),
]  # fmt: skip


@pytest.mark.parametrize(("text", "strict", "flexible"), ODD)
def test_what_is_odd(text, strict, flexible):
    found = extract(text, "hash")
    assert (parse_number(found.strict) if found.strict else None) == strict
    assert (parse_number(found.flexible) if found.flexible else None) == flexible


@pytest.mark.parametrize(
    ("text", "style", "works"),
    [
        ("#### 12", "hash", False), (" #### 12\n", "hash", False), ("3 * 4 = 12\n#### 12", "hash", True),
        ("#### 3 * 4 = 12\n#### 12", "hash", True), ("####\n3 * 4\n#### 12", "hash", True),
        ("##### 3 * 4\n#### 12", "hash", True), ("#### 12\nas 3 * 4 = 12", "hash", True),
        ("<think>3 * 4</think>#### 12", "hash", True), ("<think>\n\n</think>\n\n#### 12", "hash", False),
        ("<reasoning>\n\n</reasoning>\n<answer>\n12\n</answer>", "xml", False),
        ("<answer></answer> 3 * 4 <answer>12</answer>", "xml", True), ("Twelve.", "hash", False),
    ],
)  # fmt: skip
def test_an_answer_at_once_has_nothing_beside_it(text, style, works):
    assert works_out(text, style) == works


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
