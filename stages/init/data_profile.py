"""What a file of rows holds for a model: formats, answers, lengths in tokens, and a row as it is trained."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.config import BenchmarkSection, DataSection, ModelSection, PromptSection
from stages.data.rows import Rows, local_file, read_rows
from stages.errors import ConfigError, DataError, first_line
from stages.evaluation.benchmarks import benchmarks
from stages.labelling.known import system_of
from stages.models.load_errors import config_of, load_errors
from stages.models.tokenizer import load_tokenizer
from stages.plan.lengths import Lengths
from stages.prompts.answers import letter, number
from stages.prompts.renderer import IGNORED, Renderer

if TYPE_CHECKING:
    from stages.records import Example

ASKS = "Work it out, then write the final answer after ####."
"""System message for rows whose answers can be verified: the words of the demo."""
VERIFIED = {"number", "letter", "text"}
READ_BY_FORMAT = ("demo", "gsm8k", "jsonl")
"""Benchmarks that read an answer where the prompt asks for it."""


@dataclass(frozen=True)
class Survey:
    """What is known of rows before anything is trained on them."""

    rows: Rows
    answers: Counter[str]
    """Rows by the kind of their verifiable answer: number, letter, text, tests or none."""
    prompt: Lengths
    response: Lengths
    row: Lengths
    slow: int | None
    """Rows of System 2, if every row says in the field `system` which system it is; else None."""
    ignores_system: int
    """Rows with a text in the field `system` that is no label."""
    never_stops: list[str]
    """Ids of rows whose last trained token does not stop an answer."""
    stops: list[str]
    """The stop tokens, as texts."""
    sample: tuple[str, str]
    """The first row as the model sees it: the prompt, and what is trained."""
    section: PromptSection
    """How the rows were rendered."""
    refuses_system: bool
    """Whether the chat template takes no system message."""
    positions: int | None
    """Tokens that the model can read, if its config says."""
    linear: set[str]
    """Names of the linear modules that the base model has, without its head."""


def survey(model: ModelSection, data: DataSection, tests: list[BenchmarkSection]) -> Survey:
    """Read all rows and render them; no weights are loaded.

    tests: the files of test rows. Where they or the rows have answers to verify, the prompt asks for them.
    """
    tokenizer = load_tokenizer(model)
    found = read_rows(data)
    if not found.examples:
        raise DataError(f"no row of {data.path} has a prompt and a response")
    kinds = Counter(_kind(example) for example in found.examples)
    section = PromptSection(
        template="chat" if tokenizer.chat_template else "plain",
        system=ASKS if set(kinds) <= VERIFIED or any(test.kind in READ_BY_FORMAT for test in tests) else None,
    )
    refuses = False
    try:
        renderer = Renderer(tokenizer, section)
    except ConfigError:
        if section.system is None:
            raise
        refuses, section = True, section.model_copy(update={"system": None})
        renderer = Renderer(tokenizer, section)
    rows = [renderer.row(example) for example in found.examples]
    asked = [sum(label == IGNORED for label in row.labels) for row in rows]
    first = rows[0].input_ids
    labels = [system_of(example.extra.get("system")) for example in found.examples]
    positions, linear = _model(model)
    return Survey(
        rows=found,
        answers=kinds,
        prompt=Lengths.of(asked),
        response=Lengths.of([len(row.labels) - n for row, n in zip(rows, asked, strict=True)]),
        row=Lengths.of([len(row.labels) for row in rows]),
        slow=labels.count(2) if None not in labels else None,
        ignores_system=sum(
            label is None and isinstance(example.extra.get("system"), str)
            for label, example in zip(labels, found.examples, strict=True)
        ),
        never_stops=renderer.never_stop(rows),
        stops=[tokenizer.decode([token]) for token in renderer.stop_ids],
        sample=(tokenizer.decode(first[: asked[0]]), tokenizer.decode(first[asked[0] :])),
        section=section,
        refuses_system=refuses,
        positions=positions,
        linear=linear,
    )


def benchmark_of(path: str) -> BenchmarkSection:
    """The benchmark that can read a file's rows, published ones first, and how it reads them.

    All rows if it can, else without empty and repeated ones. DataError with each benchmark's reason if none
    can.
    """
    local_file(BenchmarkSection(path=path))
    found = {name: benchmarks.pick(name) for name in benchmarks.names()}
    readers = [name for name, module in found.items() if hasattr(module, "load")]
    readers.sort(key=lambda name: "revision" not in found[name].DEFAULTS)
    sections = [BenchmarkSection(path=path, kind=name) for name in readers]
    sections += [one.model_copy(update={"empty": "drop", "duplicates": "first"}) for one in sections]
    reasons = {}
    for section in sections:
        try:
            found[section.kind].load(section)
        except DataError as error:
            reasons[section.kind] = first_line(error)
            continue
        return section
    told = "".join(f"\n  {name}: {reason}" for name, reason in reasons.items())
    raise DataError(f"no benchmark can read the rows of {path}{told}", "see: lorapar list benchmarks")


def _kind(example: Example) -> str:
    if {"test", "entry_point"} <= example.extra.keys():
        return "tests"
    if example.gold is None:
        return "none"
    if number(example.gold) is not None:
        return "number"
    return "letter" if letter(example.gold, whole=True) else "text"


def _model(model: ModelSection) -> tuple[int | None, set[str]]:
    """What the model's config says: the tokens it can read, and its linear modules by their last names."""
    import torch
    from transformers import AutoModelForCausalLM

    from stages.lora.adapter.adapter import linear_modules

    config = config_of(model)
    with load_errors("model", model), torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    return getattr(config, "max_position_embeddings", None), linear_modules(base)
