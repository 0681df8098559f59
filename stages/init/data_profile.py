"""Profile of a file of rows for a model: format, answers, lengths in tokens, and a row as it is trained."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.config import BenchmarkSection, DataSection, ModelSection, PromptSection
from stages.data.rows import Rows, local_file, read_rows
from stages.errors import ConfigError, DataError
from stages.evaluation.benchmarks import benchmarks
from stages.init.modes import modes_of
from stages.labelling.known import system_of
from stages.models.size import parameters
from stages.models.tokenizer import load_tokenizer
from stages.plan.lengths import Lengths
from stages.prompts.answers import extract_letter, parse_number
from stages.prompts.renderer import IGNORED, Renderer
from stages.prompts.thoughts import opened
from stages.records import Labelled

if TYPE_CHECKING:
    from stages.records import Example

ASKS = "Work it out, then write the final answer after ####."
"""System message for rows whose answers can be verified, as in the demo."""
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
    bare: int
    """Number of rows with an answer to verify and nothing before it: no response, or the answer alone."""
    system2_rows: int | None
    """Number of System 2 rows, if every row has a label in the field `system`; else None."""
    ignores_system: int
    """Number of rows with a text in the field `system` that is no label."""
    never_stops: list[str]
    """Ids of rows whose last trained token does not stop an answer."""
    stops: list[str]
    """The stop tokens, as texts."""
    sample: tuple[str, str]
    """Prompt and trained text, as the model sees them, of the first row with a response, or of the first."""
    thinks: bool
    """True if the model thinks before it answers, in one mode at least."""
    thoughts: int
    """Number of rows with a thought."""
    section: PromptSection
    """The prompt settings with which the rows were rendered."""
    refuses_system: bool
    """True if the chat template takes no system message."""
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


def survey(
    model: ModelSection,
    data: DataSection,
    tests: list[BenchmarkSection],
    section: PromptSection | None = None,
) -> DataProfile:
    """Profile all rows, rendered for the model; no weights are loaded.

    tests: the benchmarks of the test rows. If they or the rows have answers to verify, the prompt asks for
    one. section: prompt settings that other rows have decided.
    """
    from stages.lora.adapter.adapter import linear_modules
    from stages.models.base import without_weights

    tokenizer = load_tokenizer(model)
    rows = read_rows(data)
    if not rows.examples:
        raise DataError(f"no row of {data.path} has a prompt and a response")
    kinds = Counter(answer_kind(example) for example in rows.examples)
    answered = [example for example in rows.examples if example.response]
    if set(kinds) == {"none"} and not answered:
        raise DataError(
            f"no row of {data.path} has a response to imitate, or an answer that a reward here can verify",
            "give each row a field gold, or test and entry_point, or write a config with your own reward",
        )
    section = section or _prompt_settings(tokenizer, set(kinds), tests)
    renderer = _renderer(tokenizer, section, rows.examples)
    systems = [system_of(example.extra.get("system")) for example in rows.examples]
    base = without_weights(model)
    return DataProfile(
        rows=rows,
        answers=kinds,
        **_measured(renderer, rows.examples),
        unanswered=len(rows.examples) - len(answered),
        bare=sum(e.gold is not None and e.response in ("", e.gold) for e in rows.examples),
        system2_rows=systems.count(2) if None not in systems else None,
        ignores_system=sum(
            isinstance(text := e.extra.get("system"), str) and system_of(text) is None for e in rows.examples
        ),
        stops=[tokenizer.decode([token]) for token in renderer.stop_ids],
        sample=_shown(renderer, (answered or rows.examples)[0]),
        thinks=bool(renderer.section.chat_template_kwargs_by_system or opened(renderer.prompt("?"))),
        thoughts=sum(bool(example.thought) for example in rows.examples),
        section=renderer.section,
        refuses_system=renderer.section.system != section.system,
        positions=getattr(base.config, "max_position_embeddings", None),
        parameters=parameters(model),
        linear=linear_modules(base),
    )


def _prompt_settings(tokenizer: Any, kinds: set[str], tests: list[BenchmarkSection]) -> PromptSection:
    asks = kinds <= VERIFIED or any(test.kind in READ_BY_FORMAT for test in tests)
    return PromptSection(
        template="chat" if tokenizer.chat_template else "plain", system=ASKS if asks else None
    )


def _shown(renderer: Renderer, example: Example) -> tuple[str, str]:
    """Prompt and trained text of a row, as the model sees them."""
    row, decode = renderer.row(example), renderer.tokenizer.decode
    start = row.labels.count(IGNORED)
    return decode(row.input_ids[:start]), decode(row.input_ids[start:]) if example.response else ""


def _measured(renderer: Renderer, examples: list[Example]) -> dict[str, Any]:
    """Render each row for what a profile says of its tokens; these take many times the memory of texts."""
    prompts, responses, lengths, never_stops = [], [], [], []
    imitable = any(example.response for example in examples)
    for example in examples:
        row = renderer.row(example)
        prompts.append(row.labels.count(IGNORED))
        lengths.append(len(row.labels))
        if example.response or not imitable:
            responses.append(lengths[-1] - prompts[-1])
            never_stops += renderer.rows_without_stop([row])
    return {
        "prompt": Lengths(prompts),
        "response": Lengths(responses),
        "row": Lengths(lengths),
        "never_stops": never_stops,
    }


def _renderer(tokenizer: Any, section: PromptSection, examples: list[Example]) -> Renderer:
    """Render as the section says, without its system message if the chat template takes none.

    If the template has two modes, examples are shown and measured in the slow one, whose rows are longer.
    """
    try:
        renderer = Renderer(tokenizer, section)
    except ConfigError:
        if section.system is None:
            raise
        renderer = Renderer(tokenizer, section.model_copy(update={"system": None}))
    if not (modes := modes_of(tokenizer, renderer.section)):
        return renderer
    section = renderer.section.model_copy(update={"chat_template_kwargs_by_system": modes})
    return Renderer(tokenizer, section, [Labelled(example, 2, {}) for example in examples])


def benchmark_of(path: str) -> BenchmarkSection:
    """The first benchmark that can read a file's rows; published ones are tried first.

    With all rows if it can, else without empty and repeated ones. DataError with each benchmark's reason if
    none can.
    """
    on_hub = local_file(BenchmarkSection(path=path)) is None
    modules = {name: benchmarks.pick(name) for name in benchmarks.names()}
    readers = [name for name, module in modules.items() if hasattr(module, "load")]
    readers.sort(key=lambda name: "revision" not in modules[name].DEFAULTS)
    sections = [BenchmarkSection(path=path, kind=name) for name in readers]
    if on_hub:  # its default split is that of training rows
        sections = [section.model_copy(update={"split": "test"}) for section in sections]
    sections += [s.model_copy(update={"empty": "drop", "duplicates": "first"}) for s in sections]
    reasons = {}
    for section in sections:
        try:
            modules[section.kind].load(section)
        except DataError as error:
            # The second line of an error about rows has the first row and what is wrong with it.
            reasons[section.kind] = " ".join(map(str.strip, str(error).splitlines()[:2]))
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
