"""Extracts and compares final answers. Rewards and benchmarks both use it, so SFT, RL and eval agree.

An answer is a number if it can be read as one (commas between thousands, currency, units, `%`, decimals,
fractions, mixed numbers, `5 million`, a Unicode minus, bold type), else text. `3x` is a term, not the number
3. Exactly four `#` begin an answer line: `##### 5` is a heading.

The texts come from a model or from a stranger, so every pattern has to run in linear time (200,000 spaces
must cost nothing). The exception is _SINGLE_NUMBER, which sees at most LONGEST_NUMBER characters.
"""

import collections
import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

from stages.prompts.thoughts import after_thought, split

_ANSWER_LINE = re.compile(r"(?<!#)####(?!#)[ \t]*(\S[^\n]*)")
_HASHES = re.compile(r"(?<!#)####(?!#)")
_OPENING_TAG, _CLOSING_TAG = "<answer>", "</answer>"
_TAGGED = re.compile(r"<answer>(?:(?!</?answer>).)*</answer>", re.DOTALL)


@dataclass(frozen=True)
class Extracted:
    """The final answer of one text, read in two ways; None where nothing was found."""

    strict: str | None
    """The answer in the requested format."""
    flexible: str | None
    """The strict answer if it is a number. Otherwise the last number in or after it, because its `####` may
    have been a heading, or else the strict answer. Without a strict answer, the last number of the text or,
    if it has none, its last word."""


def extract(text: str, answer_format: str) -> Extracted:
    """Read the final answer of a model's text, after its thought; the last occurrence counts."""
    text = after_thought(text)
    if answer_format == "xml":
        strict = remainder = _in_tags(text)
    else:
        last = collections.deque(_ANSWER_LINE.finditer(text), maxlen=1)
        strict = _without_full_stop(last[0][1]) if last else None
        remainder = text[last[0].start(1) :] if last else None
    if strict is None:
        return Extracted(None, _last_number(text) or next(reversed(re.findall(r"\w+", text)), None))
    if parse_number(strict) is not None:
        return Extracted(strict, strict)
    return Extracted(strict, _last_number(remainder or "") or strict)


def works_out(text: str, answer_format: str) -> bool:
    """True if a text has a thought, or anything beside its final answer."""
    thought, answer = split(text)
    finals = _TAGGED.finditer(answer) if answer_format == "xml" else _ANSWER_LINE.finditer(answer)
    if last := collections.deque(finals, maxlen=1):  # the one that `extract` reads
        answer = re.sub(r"</?reasoning>|\s", "", answer[: last[0].start()] + answer[last[0].end() :])
    return bool(thought or (last and answer))


def _last_number(text: str) -> str | None:
    """Return the last number of a text, as it is written there; the coefficient of a term is none."""
    numbers = (match for match in _ANY_NUMBER.finditer(text) if not _VARIABLE.match(text, match.end()))
    last = collections.deque(numbers, maxlen=1)
    return last[0][0] if last else None


def _without_full_stop(line: str) -> str:
    return line.removesuffix(".").strip() or line.strip()


def _in_tags(text: str) -> str | None:
    """Return the content of the last answer tag that is not empty."""
    answer = None
    start = text.find(_OPENING_TAG)
    while start >= 0 and (end := text.find(_CLOSING_TAG, start)) >= 0:
        answer = text[start + len(_OPENING_TAG) : end].strip() or answer
        start = text.find(_OPENING_TAG, end)
    return answer


# Patterns of numbers, from their components to the whole.
_MINUS = r"[-\u2010-\u2013\u2212\uFE63\uFF0D]"
_CURRENCY = r"(?:\\?[$€£¥₹]|USD\s)"
# Groups of three digits, or as in India of two before the last; at most seven groups keep the search linear.
_INTEGER = r"(?:\d{1,3}(?:,\d{2,3}){0,7},\d{3}(?!\d)|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d+)?|\.\d+)"
_SCALES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "k": 10**3, "million": 10**6, "billion": 10**9}
_SCALES["trillion"] = 10**12
# `5k` is 5,000; in `5 K` and `5m` the letter is a unit.
_SCALE = rf"(?:\s?(?i:(?:{'|'.join(name for name in _SCALES if name != 'k')})s?\b)|[kK]\b)"
# A dash after a digit, letter or bracket joins (3-5 days) or subtracts; elsewhere it is a sign.
_ANY_NUMBER = re.compile(
    rf"(?:(?<![\w)\]]){_MINUS})?{_CURRENCY}?(?:(?<=[$€£¥₹]){_MINUS})?"
    rf"(?:\d+\s+\d+\s*/\s*\d+|{_DECIMAL}(?:\s*/\s*{_INTEGER})?)(?:{_SCALE})?"
)
# A variable after a number makes it a term: `3x`, `2xy`, `4n`, `3π`. Other letters are units: `5m`, `3μm`.
_VARIABLE = re.compile(r"(?:[xyz]+|[in]|pi|sqrt|[α-λν-ωΓΔΘΛΞΠΣΦΨ]+)(?![^\W_]|\.[A-Za-z])")
_PER = r"(?<=[A-Za-z])/(?=\s?[A-Za-z])|/(?=[A-Za-z]{2})"  # in `5 km/h` and `$12/hour`, not in `3/x`
_DECIMAL_COMMA = r"\d{1,3}(?:\.\d{3})*,\d{1,2}(?!\d)"  # `1.200,50`, and `3,5`: no group of thousands
_SINGLE_NUMBER = re.compile(
    rf"[*_`(]*(?:\+|(?P<sign>{_MINUS}))?\s*{_CURRENCY}?\s*(?P<inner_sign>{_MINUS})?"
    rf"(?:(?P<mixed>\d+)\s+)?(?P<value>{_DECIMAL_COMMA}|{_DECIMAL})"
    rf"(?:\s*/\s*(?P<denominator>{_INTEGER}))?(?P<unit>(?:[^\d+*/=^<>]|{_PER})*)[*_`]*\.?"
)
LONGEST_NUMBER = 200
"""Number of characters above which a text is not read as one number (with its unit)."""


def parse_number(text: str) -> Fraction | None:
    """Return the exact value of a text that is one number, else None.

    Numbers are `$1,200.50`, `3,50 €`, `−3`, `3/4`, `1 1/2`, `12%`, `**7**.`, `5 million` and `5 apples a
    day`. Words may follow the number, but nothing that changes it: `2 + 2`, `3 hours 20 minutes`, `3½`, `3
    and a half` and `3x` are not one number.
    """
    quantity = _quantity(text)
    return quantity[0] if quantity else None


# LaTeX's box and inline formula, and quotation marks.
_WRAPPED = re.compile(r"\$*\\boxed\{(.*)\}\$*|\\\((.*)\\\)|\"(.*)\"|“(.*)”", re.DOTALL)
_FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")


def _without_markup(text: str) -> str:
    r"""Return a text without `\boxed{…}`, `\(…\)` or quotation marks around it, and `\frac{3}{4}` as 3/4."""
    text = text.strip()
    if wrapped := _WRAPPED.fullmatch(text.removesuffix(".")):
        text = next(filter(None, wrapped.groups()), "").strip()
    return _FRACTION.sub(r"\1/\2", text)


def _quantity(text: str) -> tuple[Fraction, list[str]] | None:
    """Return the value of a text that is one number, and the words of its unit, case-folded."""
    text = _without_markup(text)
    match = _SINGLE_NUMBER.fullmatch(text) if len(text) <= LONGEST_NUMBER else None
    if not match or (match["sign"] and match["inner_sign"]) or (match["mixed"] and not match["denominator"]):
        return None
    denominator, unit = int((match["denominator"] or "1").replace(",", "")), match["unit"]
    # A dash right after the number, or after one letter (`5 -`, `5x -`), begins a subtraction that was cut.
    if denominator == 0 or re.match(rf"\s*{_MINUS}?[A-Za-z]?\s*{_MINUS}\s*$", unit):
        return None
    number = match["value"]
    if re.fullmatch(_DECIMAL_COMMA, number):
        if not re.search(r"[^\W\d_]|[$€£¥₹]", text):
            return None  # `1,2` alone may be a list
        number = number.replace(".", "").replace(",", ".")
    # `1 1/2` is mixed 1, value 1, denominator 2.
    value = Fraction(number.replace(",", "")) / denominator + int(match["mixed"] or 0)
    while scale := re.match(_SCALE, unit):  # `5 hundred thousand apples`
        value *= _SCALES[scale[0].strip().lower().removesuffix("s")]
        unit = unit[scale.end() :]
    # `3 and a half` and `3½` are larger than 3, `3!` is 6, and `3x`, or `3 x` alone, is a term.
    attached = _VARIABLE.match(unit) or _VARIABLE.fullmatch(unit.strip(" *_`.)"))
    if attached or re.match(r"!|\s*(?:and\b|&)", unit) or unicodedata.category((unit + " ")[0]) == "No":
        return None
    words = re.findall(r"[^\W\d_]+", unit.casefold())
    unit_words = [word for word in words if word != "percent"]
    return (-value if match["sign"] or match["inner_sign"] else value), unit_words


# A choice. `A` and `I` before a lower-case word are the article and the pronoun.
_LETTER = r"([B-HJ]|A(?! [a-z])|I(?! [a-z]))\b(?!['\u2019])"
# After "the answer is", `A` is a choice even if a conjunction follows, such as `A because …`.
_NAMED_LETTER = _LETTER.replace(
    "A(?! [a-z])", r"A(?! (?!(?:because|since|as|and|or|but|not|for|so|due)\b)[a-z])"
)
_NAMINGS = [
    re.compile(rf'(?i:{phrase})[\s*("$]*(?:\\boxed{{)?(?:{_NAMED_LETTER}|(?<=\()([a-j])(?=\)))')
    for phrase in (
        r"answer(?: is)?:?(?:\s+(?:choice|option))?:?",
        r"(?:choice|option)(?: is:?|:)",
        r"(?:choice|option)",
    )
]
"""Ways to name a choice; those that say which one is right come before those that may mention any.

A bracket, a quotation mark, bold type and LaTeX's box may stand before the letter, which is small only in
brackets.
"""
_LEADING_LETTER = re.compile(
    r"""\s*[*_("“[]{0,4}(?:([A-J])(?:[).:,\n\]"”]|\*+(?!\w)|\s*$|\s+(?:[–—-]\s|\())|([a-j])(?:[)\]]|[.:]?\s*$))"""
)
"""A choice at the beginning: `B`, `(B)`, `b)`, `**B**`, `B. Paris`, `B (Paris)` or `B – Paris`."""


def extract_letter(text: str, leading_only: bool = False) -> str | None:
    """Return the choice, A to J, that a text names after its thought, or None.

    A text that begins with a choice names that one: `B`, `(B)`, `**B.** Paris` and `B (Paris)` do, `Because`
    and `A dog` do not. With `leading_only`, no other text names a choice. Otherwise the last choice that is
    called right counts: after `the answer is B` other choices may be mentioned.
    """
    text = after_thought(text)
    first = _LEADING_LETTER.match(text)
    if first or leading_only:
        return (first[1] or first[2]).upper() if first else None
    for naming in _NAMINGS:
        if named := naming.findall(text):
            capital, small = named[-1]
            return str(capital or small).upper()
    letters = re.findall(rf"\b{_LETTER}", text)
    return letters[-1] if letters else None


def gold_letter(gold: str) -> str | None:
    """Return the choice that a gold answer is, as in `B`, `b` and `(B)`; None if it is something else."""
    match = re.fullmatch(r"\s*\(?([A-Ja-j])[).:]?\s*", gold)
    return match[1].upper() if match else None


def matches_gold(answer: str | None, gold: str) -> bool:
    """True if an extracted answer is the `same` as gold, or names the letter (A to J) that gold is."""
    letter = gold_letter(gold) if answer is not None else None
    return equals_gold(answer, gold) or (letter is not None and extract_letter(str(answer)) == letter)


def equals_gold(answer: str | None, gold: str) -> bool:
    """True if an answer equals the gold answer: as numbers if gold is one, else as `same_text`.

    If both have a unit, the words of one have to begin with those of the other: `7 days a week` equals
    `7 days`, `7 weeks` does not.
    """
    if answer is None:
        return False
    expected = _quantity(gold)
    if expected is None:
        return same_text(answer, gold)
    quantity = _quantity(answer)
    return (
        quantity is not None
        and quantity[0] == expected[0]
        and all(_same_word(*pair) for pair in zip(quantity[1], expected[1], strict=False))
    )


def _same_word(one: str, other: str) -> bool:
    """True if two words are equal but for a plural: `box` and `boxes`, not `m` and `ms`."""
    short, long = sorted((one, other), key=len)
    plurals = (f"{short}s", f"{short}es", f"{short.removesuffix('y')}ies")
    return short == long or (len(short) > 1 and long in plurals)


_EDGES = " .!?,:;\"'*。，！？：；、“”‘’„«»…·।؟،"
"""Punctuation that is ignored at the edges of a text."""


def same_text(answer: str | None, gold: str) -> bool:
    """True if two texts are equal, ignoring case and punctuation at their edges."""
    return answer is not None and _normalized(answer) == _normalized(gold)


def _normalized(text: str) -> str:
    return " ".join(_without_markup(text).casefold().strip(_EDGES).split())


def gold_from_response(response: str) -> str | None:
    """Return the verifiable answer of a reference response whose last line has `#### answer`, else None.

    In earlier lines `####` may be a heading, so it does not count.
    """
    closing = split_final_answer(response)
    return _without_full_stop(closing[1]) if closing else None


def is_answer(response: str) -> bool:
    """True if a response is an answer alone: a number with its unit, a letter, or yes, no, true or false."""
    is_number = len(response.split()) <= 3 and parse_number(response) is not None
    words = ("yes", "no", "true", "false")
    return is_number or gold_letter(response) is not None or any(same_text(response, word) for word in words)


def split_final_answer(response: str) -> tuple[str, str] | None:
    """Split a response at the `####` of its last line into reasoning and answer; None if there is none."""
    hashes = _HASHES.search(response, response.rstrip().rfind("\n") + 1)
    answer = response[hashes.end() :].strip() if hashes else ""
    return (response[: hashes.start()], answer) if hashes and answer else None


def rewrite(response: str, gold: str | None, answer_format: str) -> str:
    """Return a reference response in `answer_format`; without a gold answer it stays as it is.

    A response that is only its answer has empty reasoning in xml and is a single line in hash.
    """
    if gold is None:
        return response
    response = response.strip()
    if answer_format == "xml" and response.startswith("<reasoning>") and _in_tags(response) == gold:
        return response
    if response == f"#### {gold}":  # the answer alone, also of several lines
        reasoning = ""
    else:
        closing = split_final_answer(response)
        reasoning = (closing[0] if closing else response).strip()
    if answer_format == "xml":
        return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{gold}\n</answer>"
    return f"{reasoning}\n#### {gold}".lstrip("\n")
