"""GRPO rewards, one function each, in TRL's signature: texts of completions in, one float per completion out.

TRL passes the columns of the rows by name: `id`, `question`, `gold`, `response`, `answer_format`, and every
further text, number or truth value that all rows have. The paper's five rewards (arXiv 2507.20999, §2 of the
settings) are adapted to the answer format in use.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import TYPE_CHECKING, Any

from stages.prompts.answers import extract, letter, number, right
from stages.prompts.code import code_block
from stages.registry import Registry
from stages.runtime import resources

if TYPE_CHECKING:
    from stages.sandbox import Sandbox

rewards: Registry = Registry("reward")

# The groups (?>…) keep the first answer tag that they find: else a text of many tags takes quadratic time.
_WHOLE = {
    "xml": re.compile(r"<reasoning>\n(?>.*?\n</reasoning>\n<answer>\n).*?\n</answer>\n?", re.DOTALL),
    "hash": re.compile(r"(?:(?>(?:(?!\n?####).)+)\n)?#### [^\n#]+\n?", re.DOTALL),
}
_LOOSE = {
    "xml": re.compile(r"\s*<reasoning>(?>.*?</reasoning>\s*<answer>).*?</answer>", re.DOTALL),
    "hash": re.compile(r".*####\s*\S+", re.DOTALL),
}
_APART = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
# Of scripts that put no spaces between words each character is one.
_WORD = re.compile(rf"[{_APART}]|[^\s{_APART}]+")
_TAGS = {"xml": ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>"), "hash": ("\n#### ",)}


@rewards.add()
def correctness(completions: list[str], gold: list[str], answer_format: list[str], **_: Any) -> list[float]:
    """1 if the strictly extracted answer equals gold, or names its letter."""
    pairs = zip(completions, gold, answer_format, strict=True)
    return [float(right(extract(text, style).strict, wanted)) for text, wanted, style in pairs]


@rewards.add()
def brief(
    completions: list[str],
    prompts: list[str],
    completion_ids: list[list[int]],
    gold: list[str],
    answer_format: list[str],
    **_: Any,
) -> list[float]:
    """How much shorter a correct completion is than its group's longest one, times the share of correct ones.

    From 0 to 1: 1 − tokens / tokens of the longest correct completion. To be added to `correctness` with a
    small weight. Wrong completions get 0, and where most are wrong, length counts little. Where all are
    correct they differ in length alone, and `rl.scale_rewards: group` scales that up; `none` leaves it small.
    Groups are runs of one prompt; of a group that several processes share, each knows its own part.
    """
    correct = correctness(completions, gold=gold, answer_format=answer_format)
    scores: list[float] = []
    for _prompt, run in groupby(zip(prompts, correct, completion_ids, strict=True), key=lambda row: row[0]):
        group = [(bool(right), len(ids)) for _, right, ids in run]
        longest = max((length for right, length in group if right), default=0)
        share = sum(right for right, _ in group) / len(group)
        scores += [share * (1 - length / longest) if right else 0.0 for right, length in group]
    return scores


@rewards.add()
def integer(completions: list[str], answer_format: list[str], **_: Any) -> list[float]:
    """1 if the strictly extracted answer is a whole number."""
    found = [extract(text, style).strict for text, style in zip(completions, answer_format, strict=True)]
    values = [number(text) if text is not None else None for text in found]
    return [float(value is not None and value.denominator == 1) for value in values]


@rewards.add()
def strict_format(completions: list[str], answer_format: list[str], **_: Any) -> list[float]:
    """1 if the whole completion is in the answer format, line by line."""
    pairs = zip(completions, answer_format, strict=True)
    return [float(bool(_WHOLE[style].fullmatch(text))) for text, style in pairs]


@rewards.add()
def soft_format(completions: list[str], answer_format: list[str], **_: Any) -> list[float]:
    """1 if the completion begins in the answer format, whatever its white space."""
    pairs = zip(completions, answer_format, strict=True)
    return [float(bool(_LOOSE[style].match(text))) for text, style in pairs]


@rewards.add()
def tag_count(completions: list[str], answer_format: list[str], **_: Any) -> list[float]:
    """The share of the format's tags that occur exactly once, less 0.002 per character behind them (xml)."""
    scores = []
    for text, style in zip(completions, answer_format, strict=True):
        tags = _TAGS[style]
        text = f"\n{text}" if style == "hash" else text  # the answer may be all there is
        score = sum(text.count(tag) == 1 for tag in tags) / len(tags)
        if style == "xml" and text.count(tags[-1]) == 1:
            # The paper's weight is 0.5 and its penalty 0.001 a character, so 0.002 here.
            score -= 0.002 * len(text.rpartition(tags[-1])[2].rstrip("\n"))
        scores.append(score)
    return scores


@rewards.add()
def number_match(completions: list[str], gold: list[str], answer_format: list[str], **_: Any) -> list[float]:
    """1 if the answer in the format equals gold, or else the last number of the text does."""
    found = [extract(text, style).flexible for text, style in zip(completions, answer_format, strict=True)]
    return [float(right(answer, wanted)) for answer, wanted in zip(found, gold, strict=True)]


@rewards.add()
def letter_match(completions: list[str], gold: list[str], **_: Any) -> list[float]:
    """1 if the text names the letter of gold (A to J) as its choice."""
    return [float(letter(text) == wanted.strip()) for text, wanted in zip(completions, gold, strict=True)]


@rewards.add()
def text_overlap(completions: list[str], response: list[str], **_: Any) -> list[float]:
    """F1 of the words that text and response share (ROUGE-1), for answers that nothing can verify."""
    return [_f1(_words(text), _words(wanted)) for text, wanted in zip(completions, response, strict=True)]


def _words(text: str) -> Counter[str]:
    spaced = (c if c == "_" or unicodedata.category(c)[0] in "LNM" else " " for c in text.casefold())
    return Counter(_WORD.findall("".join(spaced)))


def _f1(text: Counter[str], wanted: Counter[str]) -> float:
    return 2 * (text & wanted).total() / max(1, text.total() + wanted.total())


@rewards.add()
def code_tests(
    completions: list[str], test: list[str], entry_point: list[str], sandbox: Sandbox, **_: Any
) -> list[float]:
    """1 if the row's `test` (`def check(candidate)` as in HumanEval) passes on its function `entry_point`.

    The test runs in the sandbox, and the function in another: arguments and results cross as plain data of
    built-in types, exceptions as the built-in ones that they are. Other results fail, as do tests of what was
    printed and functions that are given as arguments.
    """

    def passes(text: str, tests: str, entry: str) -> float:
        return float(sandbox.check(code_block(text, entry), tests, entry).passed)

    with ThreadPoolExecutor(resources.usable_cores()) as pool:
        return list(pool.map(passes, completions, test, entry_point))
