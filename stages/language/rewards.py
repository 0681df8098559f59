"""GRPO rewards, one function each, in TRL's signature: texts of completions in, one float per completion out.

The paper's five (arXiv 2507.20999, §2 of the settings), read for the answer format in use. TRL passes the columns of the
rows, `gold` among them, and the answer format as `answer_format`.
"""

import re
from typing import Any

from stages.language.answers import extract, number, same
from stages.registry import Registry

rewards: Registry = Registry("reward")

_WHOLE = {
    "xml": re.compile(r"<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n?", re.DOTALL),
    "hash": re.compile(r"[^#]+\n#### [^\n#]+\n?"),
}
_LOOSE = {
    "xml": re.compile(r"\s*<reasoning>.*?</reasoning>\s*<answer>.*?</answer>", re.DOTALL),
    "hash": re.compile(r".*####\s*\S+", re.DOTALL),
}
_TAGS = {"xml": ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>"), "hash": ("\n#### ",)}


@rewards.add
def correctness(completions: list[str], gold: list[str], answer_format: list[str], **_: Any) -> list[float]:
    """1 if the strictly extracted answer equals gold."""
    pairs = zip(completions, gold, answer_format, strict=True)
    return [float(same(extract(text, style).strict, wanted)) for text, wanted, style in pairs]


@rewards.add
def integer(completions: list[str], answer_format: list[str], **_: Any) -> list[float]:
    """1 if the strictly extracted answer is a whole number."""
    found = [extract(text, style).strict for text, style in zip(completions, answer_format, strict=True)]
    values = [number(text) if text is not None else None for text in found]
    return [float(value is not None and value.denominator == 1) for value in values]


@rewards.add
def strict_format(completions: list[str], answer_format: list[str], **_: Any) -> list[float]:
    """1 if the whole completion is in the answer format, line by line."""
    return [float(bool(_WHOLE[s].fullmatch(text))) for text, s in zip(completions, answer_format, strict=True)]


@rewards.add
def soft_format(completions: list[str], answer_format: list[str], **_: Any) -> list[float]:
    """1 if the completion begins in the answer format, whatever its white space."""
    return [float(bool(_LOOSE[s].match(text))) for text, s in zip(completions, answer_format, strict=True)]


@rewards.add
def tag_count(completions: list[str], answer_format: list[str], **_: Any) -> list[float]:
    """The share of the format's tags that stand exactly once, less 0.002 for each character after the last one (xml)."""
    scores = []
    for text, style in zip(completions, answer_format, strict=True):
        tags = _TAGS[style]
        score = sum(text.count(tag) == 1 for tag in tags) / len(tags)
        if style == "xml" and text.count(tags[-1]) == 1:
            # The paper's weight is 0.5 and its penalty 0.001 a character, so 0.002 here.
            score -= 0.002 * len(text.rpartition(tags[-1])[2].rstrip("\n"))
        scores.append(score)
    return scores
