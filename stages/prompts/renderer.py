"""The only renderer: makes the prompts of score, sft, rl and eval, and the token rows of training."""

from __future__ import annotations

import datetime
import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.config import DataSection, PromptSection
from stages.errors import ConfigError, DataError, lacks_memory
from stages.prompts.answers import rewrite
from stages.records import Example, Labelled, problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

IGNORED = -100
DATE = datetime.datetime(2024, 7, 26)
"""The day that templates which write one are told, so that a prompt is the same on every day: the day that
Llama 3.1's has where there is no clock."""
PROBE = "How many legs has a cat"
"""Any text that no template changes."""

Shots = Sequence[tuple[str, str]]
"""Worked examples: question and answer."""


@dataclass(frozen=True)
class Row:
    """One tokenised example; prompt tokens are IGNORED in `labels`, which otherwise equals `input_ids`."""

    id: str
    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Asked:
    """One item as the model receives it."""

    text: str
    """The rendered prompt."""
    ids: list[int]
    stop: tuple[str, ...] = ()
    """Texts that end the answer, in addition to the renderer's stop tokens."""
    words: tuple[str, ...] = ()
    """If not empty, the likeliest of these words is the answer, and nothing is generated."""


def chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], ask: bool = True) -> str:
    """The text of a chat, with the opening of the answer if `ask`; ConfigError if the template refuses it."""
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=ask, strftime_now=DATE.strftime
        )
        return str(text)
    except Exception as error:  # a template is a program: it may raise anything
        if lacks_memory(error):
            raise
        roles = ", ".join(message["role"] for message in messages)
        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        raise ConfigError(
            f"the chat template refuses a chat of {roles}: {kind}{error}",
            "do without a system message, or --set prompt.template=plain",
        ) from None


class Renderer:
    """Turns questions into prompts and examples into rows, as a PromptSection says."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, section: PromptSection, labels: Iterable[Labelled] = ()
    ) -> None:
        """labels: of the examples to come, for `prompt.by_system`."""
        self.tokenizer = tokenizer
        self.section = section
        self.labels = {row.example.id: row.system for row in labels}
        if section.template == "chat" and not tokenizer.chat_template:
            raise ConfigError(
                "prompt.template is chat, and the tokenizer has no chat template",
                "--set prompt.template=plain",
            )
        if section.template == "chat" and PROBE not in chat(tokenizer, [{"role": "user", "content": PROBE}]):
            raise ConfigError(
                "the chat template does not show what it is asked", "--set prompt.template=plain"
            )
        self.end = self._end()
        """What closes an answer: the template's own mark, or EOS."""
        ends = tokenizer(self.end, add_special_tokens=False)["input_ids"]
        stops = {tokenizer.eos_token_id}
        if len(ends) == 1:
            stops.add(ends[0])
        self.stop_ids = sorted(stops)

    def _system(self, of: Example | None) -> str | None:
        """The system message; that for all if the example has no label."""
        label = self.labels.get(of.id) if of else None
        return (
            self.section.system if label is None else self.section.by_system.get(label, self.section.system)
        )

    def _messages(self, question: str, shots: Shots, of: Example | None) -> list[dict[str, str]]:
        system = self._system(of)
        messages = [{"role": "system", "content": system}] if system else []
        for asked, answer in shots:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answer})
        return [*messages, {"role": "user", "content": question}]

    def prompt(self, question: str, shots: Shots = (), of: Example | None = None) -> str:
        """The text that a model continues, with worked examples (question, answer) before the question.

        of: the example that is asked, whose label chooses the system message.

        The template `bare` has the form of the reference script of arXiv 2507.20999: the question and EOS,
        then the answer and EOS. Our scoring rows have that last EOS too, but the script's do not. Worked
        examples have the same form.
        """
        if self.section.template == "chat":
            return chat(self.tokenizer, self._messages(question, shots, of))
        if self.section.template == "bare":
            return "".join(text + self.end for turn in (*shots, (question,)) for text in turn)
        worked = "".join(f"Question: {asked}\nAnswer:\n{answer}\n\n" for asked, answer in shots)
        return f"{self._lead(of)}{worked}Question: {question}\nAnswer:\n"

    def _lead(self, of: Example | None) -> str:
        """What the template plain puts before everything."""
        message = self._system(of)
        return f"{message}\n\n" if message else ""

    def few_shot(self, head: str, shots: Shots, last: str, of: Example) -> tuple[str, list[int]]:
        """Text and token ids of a benchmark's prompt: `head`, shots and `last`, unchanged or as a chat.

        of: the example that is asked.
        """
        if self.section.template == "chat":
            turns = [*shots, (last, "")]
            turns[0] = (head + turns[0][0], turns[0][1])
            text = chat(self.tokenizer, self._messages(turns[-1][0], turns[:-1], of))
        else:
            text = self._lead(of) + head + "".join(f"{asked} {answer}\n\n" for asked, answer in shots) + last
        return text, self.ids(text)

    def ids(self, prompt: str) -> list[int]:
        """Token ids of a rendered prompt."""
        # A chat template writes BOS itself. Other prompts keep what the tokenizer adds in front, not behind.
        if self.section.template == "chat":
            return list(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ids = list(self.tokenizer(prompt)["input_ids"])
        while ids and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()
        return [*ids, self.tokenizer.eos_token_id] if prompt.endswith(self.end) else ids

    def row(self, example: Example) -> Row:
        """The prompt and the reference response, which is rewritten into the answer format and closed."""
        prompt = self.ids(self.prompt(example.prompt, of=example))
        response = rewrite(example.response, example.gold, self.section.answer_format)
        answer = self.tokenizer(response + self.end, add_special_tokens=False)["input_ids"]
        return Row(example.id, prompt + answer, [IGNORED] * len(prompt) + answer)

    def rows(self, examples: list[Example], data: DataSection) -> tuple[list[Row], int]:
        """The rows of all examples and how many were dropped or cut, as `data.too_long` says."""
        rows, long = [], []
        for example in examples:
            row = self.row(example)
            if len(row.input_ids) <= data.max_length:
                rows.append(row)
                continue
            long.append(f"{example.id} has {len(row.input_ids)} tokens")
            cut = row.labels[: data.max_length]
            if data.too_long == "truncate" and any(label != IGNORED for label in cut):
                rows.append(Row(row.id, row.input_ids[: data.max_length], cut))
        if long and data.too_long == "error":
            raise problems(
                f"longer than data.max_length {data.max_length}",
                long,
                "raise it, or --set data.too_long=drop (or truncate)",
            )
        if not rows:
            raise DataError(f"no row fits into data.max_length {data.max_length}")
        return rows, len(long)

    def never_stop(self, rows: list[Row]) -> list[str]:
        """Ids of rows whose last trained token stops no answer: cut ones, or an end of many tokens."""
        return [row.id for row in rows if row.labels[-1] not in self.stop_ids]

    def digest(self) -> str:
        """Identity of the rendering: the template, the settings and one rendered question."""
        text = repr((self.section.model_dump(), self.tokenizer.chat_template, self.prompt("?"), self.end))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def _end(self) -> str:
        if self.section.template != "chat":
            return str(self.tokenizer.eos_token)
        turns = [*self._messages("?", (), None), {"role": "assistant", "content": "@@"}]
        tail = chat(self.tokenizer, turns, ask=False).rpartition("@@")[2]
        return tail.strip() or str(self.tokenizer.eos_token)
