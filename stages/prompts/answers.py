"""Extracts and compares final answers. Rewards and benchmarks both use it, so SFT, RL and eval agree.

An answer is a number if it can be read as one (commas between thousands, currency, units, `%`, decimals,
fractions, mixed numbers, `5 million`, a Unicode minus, bold type), else text.
"""

import collections
import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

# Texts are a model's, or a stranger's: no pattern here may take more than linear time (200,000 spaces must
# cost nothing), but for _ONE_NUMBER, which sees short texts only.
_MINUS = r"[-\u2010-\u2013\u2212\uFE63\uFF0D]"
_MONEY = r"(?:\\?[$€£¥₹]|USD\s)"
# Groups of three, or in India's way of two before the last; seven are enough, and keep the search linear.
_WHOLE = r"(?:\d{1,3}(?:,\d{2,3}){0,7},\d{3}(?!\d)|\d+)"
_DIGITS = rf"(?:{_WHOLE}(?:\.\d+)?|\.\d+)"
_SCALE = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "k": 10**3, "million": 10**6, "billion": 10**9}
_SCALE["trillion"] = 10**12
# `5k` is 5,000; `5 K` and `5m` have a unit.
_SCALED = rf"(?:\s?(?i:(?:{'|'.join(name for name in _SCALE if name != 'k')})s?\b)|[kK]\b)"
# A dash after a digit, letter or bracket joins (3-5 days) or subtracts; elsewhere it is a sign.
_NUMBER = re.compile(
    rf"(?:(?<![\w)\]]){_MINUS})?{_MONEY}?(?:(?<=[$€£¥₹]){_MINUS})?"
    rf"(?:\d+\s+\d+\s*/\s*\d+|{_DIGITS}(?:\s*/\s*{_WHOLE})?)(?:{_SCALED})?"
)
_PER = r"(?<=[A-Za-z])/(?=\s?[A-Za-z])|/(?=[A-Za-z]{2})"  # in `5 km/h` and `$12/hour`, not in `3/x`
_ONE_NUMBER = re.compile(
    rf"[*_`(]*(?P<sign>{_MINUS})?\s*{_MONEY}?\s*(?P<inner>{_MINUS})?"
    rf"(?:(?P<whole>\d+)\s+)?(?P<value>{_DIGITS})"
    rf"(?:\s*/\s*(?P<below>{_WHOLE}))?(?P<unit>(?:[^\d+*/=^<>]|{_PER})*)[*_`]*"
)
_AFTER_HASHES = re.compile(r"####(?!#)[ \t]*(\S[^\n]*)")
_HASHES = re.compile(r"(?<!#)####(?!#)")
_OPENED, _CLOSED = "<answer>", "</answer>"
THOUGHT = ("<think>", "</think>")
"""What stands around the thought of a model that thinks first."""
# No article and no pronoun; behind "the answer is" a reason may follow A.
_LETTER = r"([B-HJ]|A(?! [a-z])|I(?! [a-z]))\b(?!')"
_SAID = _LETTER.replace("A(?! [a-z])", r"A(?! (?!(?:because|since|as|and|or|but|not|for|so|due)\b)[a-z])")
_SAYS = [
    re.compile(rf"(?i:{says}\s*)\(?{_SAID}")
    for says in (
        r"answer(?: is|:)?(?:\s+(?:choice|option))?",
        r"(?:choice|option)(?: is|:)",
        r"(?:choice|option)",
    )
]
"""Ways to name a choice, those that say which is right before those that may speak of any."""
_EDGES = " .!?,:;\"'*。，！？：；、“”‘’„«»…·।؟،"
"""Punctuation that is no part of a text where it stands at its edges."""
LONGEST_NUMBER = 200
"""Characters that a text with its unit may have to be read as one number."""


@dataclass(frozen=True)
class Extracted:
    """The final answer of one text, read two ways; None where nothing was found."""

    strict: str | None
    """In the format asked for."""
    flexible: str | None
    """The strict answer, or the last number of the text, or its last word. A strict answer that is no number
    gives way to the last number in it and behind it: `####` before it may have been a heading."""


def after_thought(text: str) -> str:
    """What a model says after its thought: nothing if the thought has no end, and all if there is none."""
    opened, closed = THOUGHT
    _, ended, after = text.rpartition(closed)
    return "" if not ended and opened in text else after


def extract(text: str, answer_format: str) -> Extracted:
    """Read the final answer of a model's text, after its thought; the last occurrence counts."""
    text = after_thought(text)
    strict = _in_tags(text) if answer_format == "xml" else _after_hashes(text)
    if strict is None:
        return Extracted(None, _last_number(text) or next(reversed(re.findall(r"\w+", text)), None))
    if number(strict) is not None:
        return Extracted(strict, strict)
    behind = strict if answer_format == "xml" else text[text.rindex(strict) :]
    return Extracted(strict, _last_number(behind) or strict)


def _last_number(text: str) -> str | None:
    """The last number of a text, as it is written there."""
    last = collections.deque(_NUMBER.finditer(text), maxlen=1)
    return last[0][0] if last else None


def _after_hashes(text: str) -> str | None:
    found = _AFTER_HASHES.findall(text)
    return _without_stop(found[-1]) if found else None


def _without_stop(line: str) -> str:
    return line.removesuffix(".").strip() or line.strip()


def _in_tags(text: str) -> str | None:
    answer = None
    at = text.find(_OPENED)
    while at >= 0 and (end := text.find(_CLOSED, at)) >= 0:
        answer = text[at + len(_OPENED) : end].strip() or answer
        at = text.find(_OPENED, end)
    return answer


def number(text: str) -> Fraction | None:
    """The exact value of a text that is one number, else None.

    Numbers are `$1,200.50`, `−3`, `3/4`, `1 1/2`, `12%`, `**7**.`, `5 million` and `5 apples a day`. Words
    may follow the number, but nothing that changes it: `2 + 2`, `3 hours 20 minutes`, `3½` and `3 and a half`
    are not one number.
    """
    found = _measure(text)
    return found[0] if found else None


def _measure(text: str) -> tuple[Fraction, list[str]] | None:
    """The value of a text that is one number, and the words of its unit, in the singular and without case."""
    text = text.strip()
    match = _ONE_NUMBER.fullmatch(text) if len(text) <= LONGEST_NUMBER else None
    if not match or (match["sign"] and match["inner"]) or (match["whole"] and not match["below"]):
        return None
    below, unit = int((match["below"] or "1").replace(",", "")), match["unit"]
    if below == 0 or re.match(rf"\s*{_MINUS}?[A-Za-z]?\s*{_MINUS}\s*$", unit):
        return None
    value = Fraction(match["value"].replace(",", "")) / below + int(match["whole"] or 0)
    while scaled := re.match(_SCALED, unit):
        value *= _SCALE[scaled[0].strip().lower().removesuffix("s")]
        unit = unit[scaled.end() :]
    if re.match(r"\s*(?:and\b|&)", unit) or unicodedata.category((unit + " ")[0]) == "No":
        return None
    words = re.findall(r"[^\W\d_]+", unit.casefold())
    unit_words = [word.removesuffix("s") or word for word in words if word != "percent"]
    return (-value if match["sign"] or match["inner"] else value), unit_words


def letter(text: str, whole: bool = False) -> str | None:
    """The choice, A to J, that a text names: its first letter or, unless `whole`, the one it says is right.

    `B`, `(B)`, `B.` and `B) because` begin with a letter; `Because` and `A dog` do not. What is said last
    counts, but other choices may be spoken of after `the answer is B`. A thought does not count.
    """
    text = after_thought(text)
    begins = re.match(r"\s*\(?([A-J])(?:[).:,\n]|\s*$)", text)
    if begins or whole:
        return begins[1] if begins else None
    for says in _SAYS:
        if named := says.findall(text):
            return str(named[-1])
    loose = re.findall(rf"\b{_LETTER}", text)
    return loose[-1] if loose else None


def right(answer: str | None, gold: str) -> bool:
    """Whether an extracted answer is the `same` as gold, or names it where it is a letter from A to J."""
    names = answer is not None and re.fullmatch(r"\s*[A-J]\s*", gold)
    return same(answer, gold) or bool(names and letter(str(answer)) == gold.strip())


def same(answer: str | None, gold: str) -> bool:
    """Whether an answer equals the gold answer: as numbers if gold is one, else as `same_text`.

    If both have a unit, one begins with the other's: `7 days a week` is `7 days`, `7 weeks` is not.
    """
    if answer is None:
        return False
    wanted = _measure(gold)
    if wanted is None:
        return same_text(answer, gold)
    found = _measure(answer)
    return (
        found is not None
        and found[0] == wanted[0]
        and all(mine == its for mine, its in zip(found[1], wanted[1], strict=False))
    )


def same_text(answer: str | None, gold: str) -> bool:
    """Whether two texts are equal, without case and without punctuation at their edges."""
    return answer is not None and _plain(answer) == _plain(gold)


def _plain(text: str) -> str:
    return " ".join(text.casefold().strip(_EDGES).split())


def gold_of(response: str) -> str | None:
    """The verifiable answer of a reference response that ends in `#### answer`, else None.

    Further up `####` is a heading, or whatever its author meant by it.
    """
    closing = _closing(response)
    return _without_stop(closing[1]) if closing else None


def _closing(response: str) -> tuple[str, str] | None:
    """What stands before `#### answer` in the last line, and that answer."""
    found = _HASHES.search(response, response.rstrip().rfind("\n") + 1)
    answer = response[found.end() :].strip() if found else ""
    return (response[: found.start()], answer) if found and answer else None


def rewrite(response: str, gold: str | None, answer_format: str) -> str:
    """A reference response in `answer_format`; responses without a gold answer stay as they are.

    One that is its answer alone has no reasoning in xml and is the one line in hash.
    """
    if gold is None:
        return response
    closing = _closing(response)
    reasoning = (closing[0] if closing else response).strip()
    if answer_format == "xml":
        return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{gold}\n</answer>"
    return f"{reasoning}\n#### {gold}".lstrip("\n")
