"""A table of answer strings: how a number may be written, times where it may stand, and what is odd."""

from fractions import Fraction

import pytest

from stages.prompts.answers import equals_gold, extract, parse_number

# As written, and its value.
WRITTEN = [
    ("7", 7), ("0", 0), ("18", 18), ("007", 7), ("1200", 1200), ("1,200", 1200), ("12,345,678", 12345678),
    ("100,000", 100000), ("-3", -3), ("−3", -3), ("–3", -3), ("－3", -3), ("-1,200", -1200), ("3.5", "3.5"),
    ("0.25", "0.25"), (".5", "0.5"), ("1,200.50", "1200.5"), ("12.00", 12), ("-0.75", "-0.75"), ("$5", 5),
    ("$1,200.50", "1200.5"), ("-$5", -5), ("$-5", -5), ("−$5", -5), ("€40", 40), ("£1,000", 1000),
    ("\\$7", 7), ("3/4", "3/4"), ("1/2", "1/2"), ("10/5", 2), ("-3/4", "-3/4"), ("1 1/2", "3/2"),
    ("2 3/4", "11/4"), ("-1 1/2", "-3/2"), ("1,000/4", 250), ("12345678901234567890", 12345678901234567890),
]  # fmt: skip

# Where it stands, and whether that is the format `hash`.
PLACES = [
    ("#### {}", True),
    ("2 + 2 = 4\n#### {}", True),
    ("#### 99\nNo, wait.\n#### {}", True),
    ("She has 3 left.\n####   {}  ", True),
    ("The answer is {}", False),
    ("The answer is {}.", False),
    ("So 2 * 3 = 6, and in all it is {} dollars.", False),
    ("Step 1: 4\nStep 2: 5\nAnswer: {}", False),
]


@pytest.mark.parametrize(("place", "strict"), PLACES)
def test_numbers_in_their_places(place, strict):
    for written, value in WRITTEN:
        found = extract(place.format(written), "hash")
        assert (found.strict is not None) is strict
        assert parse_number(found.flexible) == Fraction(value), written
        assert equals_gold(found.flexible, str(value))
        assert not equals_gold(found.flexible, str(Fraction(value) + 1))


# Text, and what the strict and the flexible reading make of it as a number.
ODD = [
    ("#### 12 dollars", 12, 12), ("#### 12 dollars per day", 12, 12), ("#### 12%", 12, 12),
    ("#### 12 %", 12, 12), ("#### 12.", 12, 12), ("#### **12**", 12, 12), ("#### $12.", 12, 12),
    ("#### 12 apples.", 12, 12), ("#### (12)", 12, 12), ("#### 12kg", 12, 12), ("#### 5 m/s", 5, 5),
    ("#### 3 hours 20 minutes", None, 20), ("#### 2 + 2", None, 2), ("#### x = 4", None, 4),
    ("#### twelve", None, None), ("#### ", None, None), ("####", None, None), ("", None, None),
    ("#### 3/0", None, None), ("#### 1 2", None, 2), ("#### 4-", None, 4), ("### 5", None, 5),
    ("##### 5", None, 5), ("#### 5\n#### ", 5, 5), ("#### 5 #### 6", None, 6), ("it takes 3-5 days", None, 5),
    ("(4)-2", None, 2), ("8 - 3 = 5", None, 5), ("a total of 1,200, at least", None, 1200),
    ("12, 13, and 14.", None, 14), ("\\boxed{12}", None, 12), ("**Answer: 12**", None, 12),
    ("There are none.", None, None), ("x=-4", None, -4), ("it is -4 degrees", None, -4), ("10/2=5", None, 5),
    ("the ratio 3/4", None, Fraction(3, 4)), ("#### -\n7", None, 7), ("#### 1.5e3", None, 3),
    ("12:30", None, 30), ("USD 40", None, 40), ("#### USD 40", 40, 40), ("$ 40", None, 40),
    ("#### $ 40", 40, 40), ("So.\n#### Final Answer:\n**18**", None, 18), ("#### Answer: 18", None, 18),
    ("#### Conclusion\nJanet makes $18 a day.", None, 18), ("#### $\\boxed{18}$", 18, 18),
    ("#### 3½", None, 3), ("#### 3 and a half", None, 3), ("#### 1,2", None, 2), ("#### 5 million", 5e6, 5e6),
    ("#### 2 dozen eggs", 24, 24), ("it is 5 hundred thousand", None, 500), ("#### 1,00,000", 1e5, 1e5),
]  # fmt: skip


@pytest.mark.parametrize(("text", "strict", "flexible"), ODD)
def test_what_is_odd(text, strict, flexible):
    found = extract(text, "hash")
    assert (parse_number(found.strict) if found.strict else None) == strict
    assert (parse_number(found.flexible) if found.flexible else None) == flexible
