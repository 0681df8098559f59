"""Final answers in the short texts of a person's own rows, for `lorapar init`."""

import re

from stages.prompts.answers import extract_letter, is_answer, parse_number

WORDS, FEW = 14, 3
"""Most words of a sentence that holds an answer, and of an answer that is one as a whole."""
RULE = (
    "the number of a short sentence, or the number of the last one of a longer text, as in "
    "`So 12 are left.` or where it repeats a result, `= 12`; a yes or no at the beginning; a letter; or all "
    "of at most 3 words"
)
_YES_NO = re.compile(r"(yes|no)\b(?![-’'])", re.IGNORECASE)
# After these a number answers; after others it may name something, as in `Order 4521 has left`.
_BEFORE = re.compile(
    r"(?:^|[:=]\s*|\b(?:is|are|was|were|be|costs?|takes?|equals?|has|have|had|gets?|needs?|pays?|makes?|"
    r"totals?|of|to|in|for|at|by|about|exactly|only|within|until)\s+)(?:(?:a|the|about|exactly|only)\s+)?$",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
"""What stands between two sentences."""
_CONCLUDES = re.compile(
    r"^(?:so|thus|therefore|hence|altogether|in total|in all|(?:that|this) (?:is|makes|leaves))\b|"
    r"\b(?:answer|result|total|sum|remainder|difference|altogether|left|remain(?:s|ing)?)\b",
    re.IGNORECASE,
)
_NAMES_ANSWER = re.compile(r"\banswer(?:\s+is|\s*:)\s*(.+)$", re.IGNORECASE)
_NUMBER = re.compile(r"[-−]?(?:(?:USD|[$€£¥₹])\s?)?\d[\d,]*(?:\.\d+)?(?:\s?%|\s?[€£]|\s?/\s?\d+)?")
_RESULT = re.compile(rf"=\s*({_NUMBER.pattern})")


def final_answer(text: str) -> str | None:
    """The final answer that a text is, or has, as a person would say it (RULE); None if it has none."""
    if "\n" not in (text := text.strip()) and (answer := _of_sentence(text)):
        return answer
    *before, last = _SENTENCE.split(text)
    if before and (named := _NAMES_ANSWER.search(last)):
        return _of_sentence(named[1])
    # What follows the last = is the result.
    numbers = _NUMBER.findall(last.rpartition("=")[2]) if before else []
    if len(numbers) != 1 or (value := parse_number(numbers[0])) is None:
        return None
    repeats = value in (parse_number(number) for line in before for number in _RESULT.findall(line))
    return numbers[0].strip() if repeats or _CONCLUDES.search(last) else None


def _of_sentence(text: str) -> str | None:
    """The answer that a short text is, or has."""
    text = text.strip()
    if not text or len(text.split()) > WORDS:
        return None
    if letter := extract_letter(text, leading_only=True):
        return letter
    if is_answer(text):
        return text.rstrip(".")
    if verdict := _YES_NO.match(text):
        return verdict[1].lower()
    numbers = list(_NUMBER.finditer(text))
    if len(numbers) == 1 and parse_number(number := numbers[0][0].strip()) is not None:
        return number if _BEFORE.search(text[: numbers[0].start()]) else None
    return text.rstrip(".!") if len(text.split()) <= FEW and not numbers else None
