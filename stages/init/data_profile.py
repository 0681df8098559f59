"""Profile of a file of rows for a model: format, answers, and lengths in tokens."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.config import (
    SLOW,
    BenchmarkSection,
    DataSection,
    ModelSection,
    ModesSection,
    PromptSection,
    prompt_under,
)
from stages.config.modes import ModeSection
from stages.data.rows import Rows, local_file, read_rows
from stages.errors import ConfigError, DataError
from stages.evaluation.benchmarks import benchmarks
from stages.labelling.known import system_of
from stages.lora.examples import is_worked
from stages.models.size import parameters
from stages.models.tokenizer import load_tokenizer
from stages.plan.tokens import Lengths
from stages.prompts.answers import extract_letter, parse_number
from stages.prompts.chat_template import thinking_switch
from stages.prompts.renderer import IGNORED, Renderer, renderers_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.records import Example

ASKS = "Write the final answer after ####."
"""System message for rows whose answers can be verified: the mode auto; then those of slow and fast."""
WORK = "Work it out, then write the final answer after ####."
AT_ONCE = "Answer at once: only the final answer after ####."
THINK = "Think it through before you answer."
"""Message of the slow mode of a model that thinks under auto, too, if it chooses to."""
FEWEST_WORKED = 8
"""Rows that show their working that a slow mode learns from, at the least."""
SMALL = 1e9
"""Parameters below which the rates of the demo's model are proposed."""
VERIFIED = {"number", "letter", "text"}
READ_BY_FORMAT = ("demo", "gsm8k", "jsonl")
"""Benchmarks that read an answer where the prompt asks for it."""


@dataclass(frozen=True)
class DataProfile:
    rows: Rows
    answers: Counter[str]
    """Rows by the kind of their verifiable answer: number, letter, text, tests or none."""
    prompt: Lengths
    response: Lengths
    row: Lengths
    unanswered: int
    """Number of rows without a response, which are not in `response`, unless none has one."""
    worked: int
    """Number of rows whose response has more in it than the final answer."""
    system2_rows: int | None
    """Number of System 2 rows, if every row has a label in the field `system`; else None."""
    thinks: bool
    """True if the model thinks before it answers, in one mode at least, and its template shows thoughts."""
    thoughts: int
    """Number of rows with a thought."""
    section: PromptSection
    """The prompt settings."""
    modes: ModesSection | None
    """By a switch of the chat template or, to verify answers, by messages; in slow the rows were rendered."""
    positions: int | None
    """Number of tokens that the model can read, if its config says."""
    parameters: int | None
    """Number of the model's parameters, if its files or its config say."""
    linear: set[str]
    """Names of the linear modules that the base model has, without its head."""

    @property
    def is_small(self) -> bool:
        return self.parameters is not None and self.parameters < SMALL

    @property
    def imitable(self) -> bool:
        """Whether any row has a response that SFT could imitate."""
        return self.unanswered < len(self.rows.examples)

    @property
    def unverifiable(self) -> bool:
        """Whether no row has an answer that RL could verify."""
        return self.answers["none"] == self.answers.total()


def survey(model: ModelSection, data: DataSection, tests: list[BenchmarkSection]) -> DataProfile:
    """Profile all rows, rendered for the model; no weights are loaded.

    tests: the benchmarks of the test rows. If they or the rows have answers to verify, the prompt asks for
    one.
    """
    from stages.lora.adapter.adapter import linear_modules
    from stages.models.base import without_weights

    tokenizer = load_tokenizer(model)
    rows = read_rows(data)
    if not rows.examples:
        raise DataError(f"no row of {data.path} has a prompt and a response")
    kinds = Counter(map(answer_kind, rows.examples))
    answered = [example for example in rows.examples if example.response]
    if set(kinds) == {"none"} and not answered:
        raise DataError(
            f"no row of {data.path} has a response to imitate, or an answer that a reward here can verify",
            "give each row a field gold, or test and entry_point, or write a config with your own reward",
        )
    asks = kinds.keys() <= VERIFIED or any(test.kind in READ_BY_FORMAT for test in tests)
    section = _section(tokenizer, ASKS if asks else None)
    worked = sum(map(is_worked, rows.examples))
    switch = thinking_switch(tokenizer, section.system) if section.template == "chat" else None
    modes = None
    if answered and (switch or worked >= FEWEST_WORKED):
        with suppress(ConfigError):  # of a template that takes no message, or drops it
            renderers_of(tokenizer, *(pair := _modes(section, switch)))
            section, modes = pair
    renderer = Renderer(tokenizer, prompt_under(section, modes, SLOW))
    systems = [system_of(example.extra.get("system")) for example in rows.examples]
    base = without_weights(model)
    return DataProfile(
        rows=rows,
        answers=kinds,
        **_lengths(renderer, rows.examples, bool(answered)),
        unanswered=len(rows.examples) - len(answered),
        worked=worked,
        system2_rows=systems.count(2) if None not in systems else None,
        thinks=renderer.marks.known and bool(switch or renderer.marks.thinks),
        thoughts=sum(bool(example.thought) for example in rows.examples),
        section=section,
        modes=modes,
        positions=getattr(base.config, "max_position_embeddings", None),
        parameters=parameters(model),
        linear=linear_modules(base),
    )


def _lengths(renderer: Renderer, examples: list[Example], imitable: bool) -> dict[str, Lengths]:
    """Lengths in tokens; the tokens, which take many times the memory of texts, do not stay."""
    prompts, responses, lengths = [], [], []
    for example in examples:
        labels = renderer.row(example).labels
        prompts.append(labels.count(IGNORED))
        lengths.append(len(labels))
        if example.response or not imitable:
            responses.append(lengths[-1] - prompts[-1])
    return {"prompt": Lengths(prompts), "response": Lengths(responses), "row": Lengths(lengths)}


def _section(tokenizer: PreTrainedTokenizerBase, system: str | None) -> PromptSection:
    """The prompt with the system message, or without it if the chat template takes none."""
    section = PromptSection(template="chat" if tokenizer.chat_template else "plain", system=system)
    try:
        Renderer(tokenizer, section)
    except ConfigError:
        if system is None:
            raise
        section = section.model_copy(update={"system": None})
        Renderer(tokenizer, section)
    return section


def _modes(
    section: PromptSection, switch: tuple[dict[str, Any], dict[str, Any]] | None
) -> tuple[PromptSection, ModesSection | None]:
    """The prompt and its modes: by a switch of the chat template, else by messages that ask for an answer."""
    if switch:
        off, on = switch
        slow, auto = ModeSection(system=THINK, chat_template_kwargs=on), ModeSection(chat_template_kwargs=on)
        return section, ModesSection(fast=ModeSection(chat_template_kwargs=off), slow=slow, auto=auto)
    if section.system is None:
        return section, None
    fast, slow, auto = (ModeSection(system=message) for message in (AT_ONCE, WORK, section.system))
    return section.model_copy(update={"system": None}), ModesSection(fast=fast, slow=slow, auto=auto)


def benchmark_of(path: str) -> BenchmarkSection:
    """The first benchmark that can read a file's rows; published ones are tried first.

    With all rows if it can, else without empty and repeated ones. DataError with each benchmark's reason if
    none can.
    """
    # The default split of a hub data set is that of training rows.
    split = {"split": "test"} if local_file(BenchmarkSection(path=path)) is None else {}
    modules = {name: benchmarks.pick(name) for name in benchmarks.names()}
    names = [name for name, module in modules.items() if hasattr(module, "load")]
    names.sort(key=lambda name: "revision" not in modules[name].DEFAULTS)
    reasons = {}
    for cleaning in ({}, {"empty": "drop", "duplicates": "first"}):
        for name in names:
            section = BenchmarkSection(path=path, kind=name).model_copy(update={**split, **cleaning})
            try:
                modules[name].load(section)
            except DataError as error:
                # The second line of an error about rows has the first row and what is wrong with it.
                reasons[name] = " ".join(map(str.strip, str(error).splitlines()[:2]))
                continue
            return section
    lines = "".join(f"\n  {name}: {reason}" for name, reason in reasons.items())
    raise DataError(f"no benchmark can read the rows of {path}{lines}", "see: lorapar list benchmarks")


def question(example: Example) -> str:
    """A row's question without that in which two writings of it differ: case, spaces, final marks."""
    return " ".join(example.conversation.casefold().split()).rstrip(" .?!")


def answer_kind(example: Example) -> str:
    """The kind of a row's verifiable answer: number, letter, text, tests or none."""
    if {"test", "entry_point"} <= example.extra.keys():
        return "tests"
    if example.gold is None:
        return "none"
    if parse_number(example.gold) is not None:
        return "number"
    return "letter" if extract_letter(example.gold, leading_only=True) else "text"
