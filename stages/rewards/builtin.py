"""Built-in GRPO rewards: functions with TRL's signature, which return one float per completion.

They get columns of the rows by name: `id`, `question`, `answer_format`, and each of `gold`, `response`
and the further strings, numbers and booleans that all rows have. A parameter with a default gets the column
of its name in any case, with None where a row lacks it. The paper's five rewards (arXiv 2507.20999, §2 of
the settings) are adapted to the answer format in use.
"""

import re
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from stages.prompts.answers import extract, matches_gold, parse_number
from stages.prompts.code import code_block
from stages.prompts.thoughts import after_thought
from stages.registry import Registry
from stages.runtime import resources
from stages.sandbox import Sandbox

rewards: Registry = Registry("reward", file_setting="rl.rewards_file")

# The atomic groups (?>…) keep the first answer tag that they find: with backtracking, a text of many tags
# would take quadratic time.
_STRICT_FORMAT = {
    "xml": re.compile(r"<reasoning>\n(?>.*?\n</reasoning>\n<answer>\n).*?\n</answer>\n?", re.DOTALL),
    "hash": re.compile(r"(?:(?>(?:(?!\n?####).)+)\n)?#### [^\n#]+\n?", re.DOTALL),
}
_SOFT_FORMAT = {
    "xml": re.compile(r"\s*<reasoning>(?>.*?</reasoning>\s*<answer>).*?</answer>", re.DOTALL),
    "hash": re.compile(r".*(?<!#)####(?!#)\s*\S+", re.DOTALL),
}
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
# Scripts without spaces between words (Thai to Khmer, kana, Chinese): each character counts as a word.
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_TAGS = {"xml": ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>"), "hash": ("\n#### ",)}


@rewards.add()
def correctness(completions: list[str], gold: list[str], answer_format: list[str], **_: Any) -> list[float]:
    """1 if the strictly extracted answer equals gold, or names its letter."""
    rows = zip(completions, gold, answer_format, strict=True)
    return [float(matches_gold(extract(text, style).strict, answer)) for text, answer, style in rows]


@rewards.add()
def integer(completions: list[str], answer_format: list[str], **_: Any) -> list[float]:
    """1 if the strictly extracted answer is a whole number."""
    answers = [extract(text, style).strict for text, style in zip(completions, answer_format, strict=True)]
    values = [parse_number(answer) if answer is not None else None for answer in answers]
    return [float(value is not None and value.denominator == 1) for value in values]


def _reply(text: str) -> str:
    """Return a text without its thought, and without the space after that."""
    remainder = after_thought(text)
    return remainder if remainder == text else remainder.lstrip()


@rewards.add()
def strict_format(completions: list[str], answer_format: list[str], **_: Any) -> list[float]:
    """1 if the whole completion is in the answer format, line by line."""
    pairs = zip(completions, answer_format, strict=True)
    return [float(bool(_STRICT_FORMAT[style].fullmatch(_reply(text)))) for text, style in pairs]


@rewards.add()
def soft_format(completions: list[str], answer_format: list[str], **_: Any) -> list[float]:
    """1 if the text begins with both tags (xml) or has `####` before some text (hash), in any spacing."""
    pairs = zip(completions, answer_format, strict=True)
    return [float(bool(_SOFT_FORMAT[style].match(_reply(text)))) for text, style in pairs]


@rewards.add()
def tag_count(completions: list[str], answer_format: list[str], **_: Any) -> list[float]:
    """Share of the format's tags that occur exactly once, less 0.002 per character after the last (xml)."""
    scores = []
    for text, style in zip(completions, answer_format, strict=True):
        tags = _TAGS[style]
        text = _reply(text)
        text = f"\n{text}" if style == "hash" else text  # a completion may begin with its `#### answer`
        score = sum(text.count(tag) == 1 for tag in tags) / len(tags)
        if style == "xml" and text.count(tags[-1]) == 1:
            # The paper subtracts 0.001 per character from a reward of at most 0.5; this one is at most 1.
            score -= 0.002 * len(text.rpartition(tags[-1])[2].rstrip("\n"))
        scores.append(score)
    return scores


@rewards.add()
def text_overlap(completions: list[str], response: list[str], **_: Any) -> list[float]:
    """ROUGE-1 F1 of the completion against the reference response, for answers that cannot be verified."""
    pairs = [(_words(_reply(text)), _words(right)) for text, right in zip(completions, response, strict=True)]
    return [2 * (said & right).total() / max(1, said.total() + right.total()) for said, right in pairs]


def _words(text: str) -> Counter[str]:
    """Count the words of a text, without case and punctuation."""
    spaced = (c if c == "_" or unicodedata.category(c)[0] in "LNM" else " " for c in text.casefold())
    return Counter(_WORD.findall("".join(spaced)))


@rewards.add()
def code_tests(
    completions: list[str], test: list[str], entry_point: list[str], sandbox: Sandbox, **_: Any
) -> list[float]:
    """1 if the row's `test` (`def check(candidate)` as in HumanEval) passes on its function `entry_point`.

    The test and the function run in two sandboxes. Between them pass arguments and results of built-in types,
    and built-in exceptions. Results of other types fail, and so do tests that read printed output or pass a
    function as an argument.
    """

    def passes(text: str, tests: str, entry: str) -> float:
        return float(sandbox.check(code_block(text, entry), tests, entry).passed)

    with ThreadPoolExecutor(resources.usable_cores()) as pool:
        return list(pool.map(passes, completions, test, entry_point))
