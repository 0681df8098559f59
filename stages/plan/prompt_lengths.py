"""Lengths of texts in tokens, beside what the model or a setting has room for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from stages.config import BenchmarkSection, Config, Voter
from stages.engines import ChoiceRequest, vllm
from stages.engines.in_process import choice_ids
from stages.engines.openai import client
from stages.evaluation.benchmarks import benchmarks
from stages.labelling.personas import persona_context, personas
from stages.models.load_errors import config_of, positions
from stages.plan.lengths import Lengths, Span, sampled
from stages.prompts.renderer import Renderer
from stages.records import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.plan.cost_model import CostModel

SAMPLE = 100
"""Rows drawn to tell the lengths of questions, which with worked examples may have a thousand tokens each."""


def spans(model: CostModel) -> Iterator[Span]:
    """The lengths of what is asked, and of training rows where rows are trained on."""
    config, rows, names = model.config, model.rows, [step.name for step in model.steps]
    for name in (name.partition(":")[2] for name in names if name.startswith("classify:")):
        if config.labelled_by(name) == "vote":
            yield from of_voters(config, model.tokenizer, name, rows[name])
    data, rl, number = config.data, config.rl, len(rows["train"])
    if model.stages & {"score", "sft"}:
        lengths = Lengths.of(len(row.input_ids) for row in model.training_rows("sft"))
        yield Span("row", number, lengths, "data.max_length", data.max_length, data.too_long)
    if "rl" in model.stages:
        yield Span(
            "prompt of rl",
            number,
            model.rl_prompts,
            "rl.max_prompt_length",
            rl.max_prompt_length,
            rl.too_long,
        )
        yield Span(
            "response", number, model.responses, "rl.max_completion_length", rl.max_completion_length, "cut"
        )
    for name in dict.fromkeys(name.partition("@")[2] for name in names if name.startswith("eval:")):
        if rows[name]:
            yield of_benchmark(config, model.tokenizer, name, rows[name])


def items(config: Config, name: str) -> list[Example]:
    """The rows of a benchmark; none if they are not ours to read."""
    section = config.eval.benchmarks[name]
    module = benchmarks.pick(section.kind)
    return list(module.load(section)) if hasattr(module, "load") else []


def of_voters(
    config: Config, tokenizer: PreTrainedTokenizerBase, name: str, examples: list[Example]
) -> Iterator[Span]:
    """What the voters that are the base itself are asked about some rows; others have their own tokens."""
    some = sampled(examples, SAMPLE)
    for voter in config.classify.voters:
        if voter.model or voter.urls or not some:
            continue
        asked = ballots(config, voter, some)
        lengths = Lengths.of(len(choice_ids(tokenizer, ballot)) for ballot in asked)
        answer = 0 if voter.engine == "transformers" else max(map(client.replied, asked))
        room = _room(config, voter.engine, answer)
        yield Span(f"vote on {name}, {voter.persona}", len(examples), lengths, *room, "fail")


def ballots(config: Config, voter: Voter, examples: list[Example]) -> list[ChoiceRequest]:
    """What a voter is asked about these rows."""
    persona = personas.pick(voter.persona)
    brief = persona_context(voter, config.model.title, config.classify.show_answer)
    return [persona(example, brief) for example in examples]


def of_benchmark(
    config: Config, tokenizer: PreTrainedTokenizerBase, name: str, examples: list[Example]
) -> Span:
    """What a benchmark asks."""
    engine = config.eval.engine
    lengths = Lengths.of(map(len, prompts(config, tokenizer, name, sampled(examples, SAMPLE))))
    beyond = "fail" if engine == "vllm" else "more than the model was made for"
    room = _room(config, engine, written(config.eval.benchmarks[name]))
    return Span(f"prompt of {name}", len(examples), lengths, *room, beyond)


def prompts(
    config: Config, tokenizer: PreTrainedTokenizerBase, name: str, examples: list[Example]
) -> list[list[int]]:
    """The token ids that a benchmark asks these rows in, with its worked examples."""
    section = config.eval.benchmarks[name]
    renderer = Renderer(tokenizer, section.prompt or config.prompt)
    return [each.ids for each in benchmarks.pick(section.kind).ask(examples, section, renderer)]


def written(section: BenchmarkSection) -> int:
    """The most tokens that a benchmark lets a model write."""
    return 1 if section.mode == "likelihood" else section.max_new_tokens


def _room(config: Config, engine: str, answer: int) -> tuple[str, int | None]:
    """What bounds a prompt beside an answer of so many tokens, and how long it may be."""
    if engine == "transformers":
        most, what = positions(config_of(config.model)), "what the model reads"
    else:
        most, what = vllm.longest(config.model, config.server, {}), "server.max_model_len"
    if most is None:
        return what, None
    return (f"{what}, less {answer}:" if answer > 1 else what), most - answer
