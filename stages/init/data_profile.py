"""Profile of a file of rows for a model: format, answers, and lengths in tokens."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.config import BenchmarkSection, DataSection, ModelSection, PromptSection
from stages.data.rows import Rows, local_file, read_rows
from stages.errors import ConfigError, DataError
from stages.evaluation.benchmarks import benchmarks
from stages.labelling.known import system_of
from stages.models.size import parameters
from stages.models.tokenizer import load_tokenizer
from stages.plan.tokens import Lengths
from stages.prompts.answers import extract_letter, parse_number
from stages.prompts.chat_template import arguments_of
from stages.prompts.renderer import IGNORED, PROBE, Renderer
from stages.prompts.thoughts import opened
from stages.records import Labelled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.records import Example

ASKS = "Work it out, then write the final answer after ####."
"""System message for rows whose answers can be verified, as in the demo."""
SMALL = 1e9
"""Parameters below which the rates of the demo's model are proposed."""
VERIFIED = {"number", "letter", "text"}
READ_BY_FORMAT = ("demo", "gsm8k", "jsonl")
"""Benchmarks that read an answer where the prompt asks for it."""
SWITCHES: dict[str, tuple[Any, Any]] = {
    **dict.fromkeys(("enable_thinking", "thinking", "enable_reasoning"), (False, True)),
    "reasoning_effort": ("low", "high"),
}
"""Argument of a chat template → its values for little or no thought, and for much."""


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
    bare: int
    """Number of rows with an answer to verify and nothing before it: no response, or the answer alone."""
    system2_rows: int | None
    """Number of System 2 rows, if every row has a label in the field `system`; else None."""
    thinks: bool
    """True if the model thinks before it answers, in one mode at least."""
    thoughts: int
    """Number of rows with a thought."""
    section: PromptSection
    """The prompt settings with which the rows were rendered."""
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
    renderer = _renderer(tokenizer, ASKS if asks else None, rows.examples)
    systems = [system_of(example.extra.get("system")) for example in rows.examples]
    base = without_weights(model)
    return DataProfile(
        rows=rows,
        answers=kinds,
        **_lengths(renderer, rows.examples, bool(answered)),
        unanswered=len(rows.examples) - len(answered),
        bare=sum(e.gold is not None and e.response in ("", e.gold) for e in rows.examples),
        system2_rows=systems.count(2) if None not in systems else None,
        thinks=bool(renderer.section.chat_template_kwargs_by_system or opened(renderer.prompt("?"))),
        thoughts=sum(bool(example.thought) for example in rows.examples),
        section=renderer.section,
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


def _renderer(tokenizer: PreTrainedTokenizerBase, system: str | None, examples: list[Example]) -> Renderer:
    """Render with the system message, or without it if the chat template takes none.

    If the template has two modes, examples are shown and measured in the slow one, whose rows are longer.
    """
    section = PromptSection(template="chat" if tokenizer.chat_template else "plain", system=system)
    try:
        renderer = Renderer(tokenizer, section)
    except ConfigError:
        if system is None:
            raise
        section = section.model_copy(update={"system": None})
        renderer = Renderer(tokenizer, section)
    if not (modes := _modes_of(tokenizer, section)):
        return renderer
    section = section.model_copy(update={"chat_template_kwargs_by_system": modes})
    return Renderer(tokenizer, section, [Labelled(example, 2, {}) for example in examples])


def _modes_of(tokenizer: PreTrainedTokenizerBase, section: PromptSection) -> dict[int, dict[str, Any]]:
    """Return the arguments of the chat template for System 1 and System 2; empty if it has no switch.

    A name in the template's source does not tell what it does: a switch changes the prompt, and the template
    takes both of its values.
    """

    def prompt(switch: dict[str, Any]) -> str:
        """The prompt with this argument; empty if the template refuses it."""
        with suppress(ConfigError):
            with_switch = section.model_copy(update={"chat_template_kwargs": switch})
            return Renderer(tokenizer, with_switch).prompt(PROBE)
        return ""

    arguments = arguments_of(tokenizer.get_chat_template()) if section.template == "chat" else set()
    for name in [name for name in SWITCHES if name in arguments]:
        off, on = ({name: value} for value in SWITCHES[name])
        if "" not in (prompts := {prompt(off), prompt(on)}) and len(prompts) == 2:
            return {1: off, 2: on}
    return {}


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


def answer_kind(example: Example) -> str:
    """The kind of a row's verifiable answer: number, letter, text, tests or none."""
    if {"test", "entry_point"} <= example.extra.keys():
        return "tests"
    if example.gold is None:
        return "none"
    if parse_number(example.gold) is not None:
        return "number"
    return "letter" if extract_letter(example.gold, leading_only=True) else "text"
