"""Renders the prompts of score, sft, rl and eval, and the rows of training. `engines/` asks voters."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from stages.config import MODES, DataSection, ModesSection, PromptSection, prompt_under
from stages.config.fields import cache_key_fields
from stages.errors import ConfigError, DataError
from stages.prompts import thoughts
from stages.prompts.answers import rewrite
from stages.prompts.chat_template import chat, check_arguments, ids_to_continue, tokenise
from stages.prompts.marks import Marks, around, marks_of, message
from stages.records import Example, data_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

IGNORED = -100
"""Label of tokens that do not count in the loss."""
PROBE = "How many legs has a cat"
"""A question to test chat templates with; no template should change it."""

Shots = Sequence[Sequence[str]]
"""Worked examples, each a question and its answer."""


@dataclass(frozen=True)
class Row:
    """One tokenised example; `labels` equals `input_ids`, but with IGNORED for the tokens of the prompt."""

    id: str
    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class RenderedPrompt:
    """The rendered prompt of one item, and how its answer is read."""

    text: str
    """The rendered prompt."""
    ids: list[int]
    stop: tuple[str, ...] = ()
    """Strings that end the answer, in addition to the renderer's stop tokens."""
    words: tuple[str, ...] = ()
    """If not empty, nothing is generated: the most likely of these words is the answer."""


def plain(question: str, system: str | None, worked: str = "") -> str:
    """Render a question as the template `plain` does. worked: rendered examples, before the question."""
    return f"{_plain_system(system)}{worked}Question: {question}\nAnswer:\n"


def _plain_system(message: str | None) -> str:
    """Return the system message as the template `plain` writes it, before all other text."""
    return f"{message}\n\n" if message else ""


def renderers_of(
    tokenizer: PreTrainedTokenizerBase, prompt: PromptSection, modes: ModesSection | None
) -> dict[str, Renderer]:
    """A renderer for each mode, or one under "" if there are no modes. ConfigError if two ask the same."""
    names = MODES if modes else ("",)
    renderers = {mode: Renderer(tokenizer, prompt_under(prompt, modes, mode)) for mode in names}
    if len({renderer.prompt(PROBE) for renderer in renderers.values()}) < len(names):
        raise ConfigError(
            "two modes have the same prompt: the chat template leaves out what tells them apart",
            "give each mode another message (modes.fast.system and so on)",
        )
    return renderers


class Renderer:
    """Renders questions as prompts and examples as token rows, following a PromptSection."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, section: PromptSection) -> None:
        self.tokenizer = tokenizer
        self.section = section
        if section.template == "chat":
            problem = ""
            if not tokenizer.chat_template:
                problem = "prompt.template is chat, and the tokenizer has no chat template"
            elif PROBE not in chat(tokenizer, [{"role": "user", "content": PROBE}]):
                problem = "the chat template does not show what it is asked"
            if problem:
                raise ConfigError(problem, "--set prompt.template=plain")
            check_arguments(tokenizer, section.chat_template_kwargs)
        self.marks = self._marks()
        self._marker = self._end()
        self.stop_ids, self.end = self._stops()
        """Tokens and text that end an answer: the template's own end-of-turn marker, or EOS, or both."""
        self._asks = self.prompt(PROBE).rpartition(PROBE)[2]
        self.closing: list[int] = tokenizer(self.marks.closing, add_special_tokens=False)["input_ids"]
        """Tokens that close a thought, as in a row."""
        special = {n: str(token) for n, token in tokenizer.added_tokens_decoder.items() if token.special}
        of_marks = {n for n, t in special.items() if t in self.marks.tag + self.marks.closing + self.end}
        self._hidden, self._stray = special.keys() - of_marks, {special[n] for n in of_marks}
        probe = Example("", PROBE, "@@", None)
        self._probe = self.completion(probe, self.prompt(PROBE, example=probe))
        """The completion of a row, so that a template whose rows cannot be rendered is refused early."""

    def _chat(self, messages: list[dict[str, Any]], ask: bool = True) -> str:
        return chat(self.tokenizer, messages, ask, **self.section.chat_template_kwargs)

    def _messages(self, question: str, shots: Shots) -> list[dict[str, Any]]:
        """Return the messages of a chat: system message, worked examples as turns, and the question."""
        system = self.section.system
        messages = [{"role": "system", "content": system}] if system else []
        for shot_question, shot_answer in shots:
            messages.append({"role": "user", "content": shot_question})
            messages.append({"role": "assistant", "content": shot_answer})
        return [*messages, {"role": "user", "content": question}]

    def prompt(self, question: str, shots: Shots = (), example: Example | None = None) -> str:
        """Render the text that a model continues: worked examples, earlier turns, then the question.

        example: what the question is from, for its earlier turns.

        The template `bare` follows the reference script of arXiv 2507.20999: the question and EOS, then the
        answer and EOS, for worked examples too. Scoring rows here have that last EOS, those of the script do
        not.
        """
        if example and example.turns:
            shots = [*shots, *example.turns]
        if self.section.template == "chat":
            return self._chat(self._messages(question, shots))
        if self.section.template == "bare":
            return "".join(text + self.end for turn in (*shots, (question,)) for text in turn)
        worked = "".join(f"Question: {text}\nAnswer:\n{answer}\n\n" for text, answer in shots)
        return plain(question, self.section.system, worked)

    def few_shot(self, head: str, shots: Shots, last: str) -> tuple[str, list[int]]:
        """Return text and token ids of a benchmark's few-shot prompt, as plain text or as a chat.

        head: text before the worked examples. last: the question.
        """
        if self.section.template == "chat":
            turns = [*shots, (last, "")]
            turns[0] = (head + turns[0][0], turns[0][1])
            text = self._chat(self._messages(turns[-1][0], turns[:-1]))
        else:
            worked = "".join(f"{shot_question} {shot_answer}\n\n" for shot_question, shot_answer in shots)
            text = _plain_system(self.section.system) + head + worked + last
        return text, self.ids(text)

    def ids(self, prompt: str) -> list[int]:
        """Tokenise a rendered prompt."""
        # A chat template writes BOS itself. Other prompts keep the tokens that the tokenizer puts before the
        # text, but not an EOS after it, because the answer follows.
        if self.section.template == "chat":
            return tokenise(self.tokenizer, prompt)
        ids = ids_to_continue(self.tokenizer, prompt)
        # The template `bare` writes an EOS after the question, which was taken away, too.
        return [*ids, self.tokenizer.eos_token_id] if prompt.endswith(self.end) else ids

    def row(self, example: Example) -> Row:
        """Tokenise an example: its prompt, which has no label, and its completion."""
        text = self.prompt(example.prompt, example=example)
        prompt, answer = self.ids(text), tokenise(self.tokenizer, self.completion(example, text))
        return Row(example.id, prompt + answer, [IGNORED] * len(prompt) + answer)

    def completion(self, example: Example, prompt: str) -> str:
        """Return the text that follows an example's prompt: thought, response in the answer format, end.

        It is what the chat template writes for the whole conversation, if that begins as the prompt does.
        A thought that it leaves out, or the end of one that the prompt opens, stands as its marks say. No
        row has a thought after an empty one.
        """
        response, marks = rewrite(example.response, example.gold, self.section.answer_format), self.marks
        thought = "" if marks.closes else example.thought
        if self.section.template != "chat" or not response.strip():
            return f"{marks.head(thought) if thought else ''}{response}{self.end}"
        text = self._conversation(example, message(response, thought if marks.shows else "", marks.form))
        if not text.startswith(prompt) and not (marks.opens or marks.closes):
            raise ConfigError(
                "the chat template writes an answer in a conversation otherwise than it asks for one, so "
                f"rows would not be what the model sees: {text[-200:]!r} does not begin with "
                f"{prompt[-100:]!r}",
                "--set prompt.template=plain, or give the tokenizer another chat template",
            )
        before, answer, tail = text.rstrip().rpartition(response.strip())
        head = before[len(prompt) :]
        is_whole = thought in head if marks.shows else not thought
        if not (before.startswith(prompt) and is_whole and (not marks.opens or marks.end in head)):
            head = marks.head(thought)
        # Some templates mark the end of an answer only where something follows.
        tail = tail.partition(self._marker)[0] if answer else ""
        return head + (answer or response) + tail + self.end

    def _conversation(self, example: Example, answer: dict[str, Any]) -> str:
        """Return an example as the chat template writes a conversation. answer: of `message`."""
        return self._chat([*self._messages(example.prompt, example.turns), answer], ask=False)

    def _marks(self) -> Marks:
        """Return how thoughts begin and end."""
        source, default = str(self.tokenizer.chat_template), None
        if self.section.template != "chat":
            return around("", source, "")
        if self.section.chat_template_kwargs:
            with suppress(ConfigError):
                section = self.section.model_copy(update={"chat_template_kwargs": {}})
                default = Renderer(self.tokenizer, section).marks
        tell = partial(self._conversation, Example("", PROBE, "", None))
        return marks_of(self.prompt(PROBE), tell, source, default)

    def _stops(self) -> tuple[list[int], str]:
        """Return the tokens that end an answer, and the text that ends a row.

        No such token stands within a row, where it may end a thought: then EOS follows the marker.
        """
        ids = partial(self.tokenizer, add_special_tokens=False)
        marks = self.marks.opening + self.marks.closing + self.marks.silent
        within, end = set(ids(marks)["input_ids"]), ids(self._marker)["input_ids"]
        added = end if len(end) == 1 else [n for n in end if n in self.tokenizer.get_added_vocab().values()]
        # Of several tokens the first ends a turn, as Phi-3's `<|end|>`, after which its template writes EOS.
        first = [n for n in added if n not in within][:1]
        configured = getattr(self.tokenizer, "ends", ())
        stop_ids = {self.tokenizer.eos_token_id, *first, *(n for n in configured if n not in within)}
        eos = str(self.tokenizer.eos_token) if added and not first else ""
        return sorted(stop_ids), self._marker + eos

    def read(self, ids: list[int], prompt: str) -> str:
        """Return a completion's text without special tokens, after a tag if its prompt opens a thought.

        Thoughts stand between the tags of `thoughts.py`, whatever those of the template are.
        """
        text = str(self.tokenizer.decode([n for n in ids if n not in self._hidden])).removesuffix(self.end)
        text = self.marks.read(text)
        for token in self._stray - {thoughts.OPENING, thoughts.CLOSING}:
            text = text.replace(token, "")
        tag = thoughts.opened(prompt) or ("\n" if self.marks.opens and prompt.endswith(self._asks) else "")
        return (thoughts.OPENING + tag[len(tag.rstrip()) :] if tag else "") + text

    def closing_ids(self, prompt: str, begun: list[int]) -> list[int]:
        """Return `closing` if the beginning of a completion has left a thought open; else nothing."""
        is_open = thoughts.OPENING in self.read(begun, prompt).rpartition(thoughts.CLOSING)[2]
        return self.closing if is_open else []

    def closing_span(self, prompt: str, completion: list[int], limit: int) -> range:
        """Return the places of the tokens that closed a thought after `limit` tokens of a completion."""
        thought = completion[:limit]
        if len(thought) < limit or thought[-1] in self.stop_ids:
            return range(0)
        return range(limit, limit + len(self.closing_ids(prompt, thought)))

    def rows(self, examples: list[Example], data: DataSection) -> tuple[list[Row], int]:
        """Return the rows of all examples, and how many exceeded max_length (see `data.too_long`)."""
        rows, too_long = [], []
        for example in examples:
            row = self.row(example)
            if len(row.input_ids) <= data.max_length:
                rows.append(row)
                continue
            too_long.append(row)
            labels = row.labels[: data.max_length]
            # A row that is cut within its prompt has nothing to learn from, so it is dropped.
            if data.too_long == "truncate" and any(label != IGNORED for label in labels):
                rows.append(Row(row.id, row.input_ids[: data.max_length], labels))
        if too_long and data.too_long == "error":
            too_long.sort(key=lambda row: -len(row.input_ids))
            raise data_error(
                f"longer than data.max_length {data.max_length}",
                [f"{row.id} has {len(row.input_ids)} tokens" for row in too_long],
                "raise it, or --set data.too_long=drop (or truncate)",
            )
        if not rows:
            raise DataError(f"no row fits into data.max_length {data.max_length}")
        return rows, len(too_long)

    def rows_without_stop(self, rows: list[Row]) -> list[str]:
        """Return the ids of rows that do not end in a stop token: cut ones, or with an end of many tokens."""
        return [row.id for row in rows if row.labels[-1] not in self.stop_ids]

    def digest(self) -> str:
        """Return a digest of what determines the rendering: settings, template, a sample prompt, the end."""
        thought = self._probe.removeprefix("@@").removesuffix(self.end)  # empty for most templates
        settings = cache_key_fields(self.section)
        rendering = (settings, self.tokenizer.chat_template, self.prompt("?"), self.end)
        text = repr((*rendering, thought) if thought else rendering)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def _end(self) -> str:
        """Return the text that the chat template writes after an answer, or EOS if it writes none."""
        if self.section.template != "chat":
            return str(self.tokenizer.eos_token)
        turns = [*self._messages("?", ()), {"role": "assistant", "content": "@@"}]
        tail = self._chat(turns, ask=False).rpartition("@@")[2]
        # Some templates write the beginning of an answer even where they are not asked for one.
        turn_end, eos, _ = thoughts.OPENING_TAG.split(tail)[0].partition(str(self.tokenizer.eos_token))
        return (turn_end + eos).strip() or str(self.tokenizer.eos_token)
