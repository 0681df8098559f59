"""Answers and choices from running OpenAI-compatible servers.

Choices are made by constrained decoding with log-probabilities. The server masks everything but the words
before it computes the log-probabilities (vLLM: `structured_outputs.choice`), so the words' shares are read at
the first token in which they differ, and nothing needs parsing. A server that cannot constrain its output is
asked for one word, and its reply is read strictly; so is the reply of a model that thinks first.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from stages.config import ServerSection
from stages.engines import (
    ChoiceRequest,
    ChoiceResult,
    Completion,
    EngineSpec,
    Failure,
    GenerateRequest,
    Sampling,
    same_model,
)
from stages.engines.openai.choices import choice_probabilities, word_of
from stages.engines.openai.errors import ItemFailed, RequestRefused
from stages.engines.openai.quirks import Quirks
from stages.engines.openai.schema import Reply, ReplyChoice, ServedModel, count_of, models_of
from stages.engines.openai.transport import Session, Transport
from stages.errors import AnswerError, ConfigError, ServerError

MAX_WORD_TOKENS = 8
REPLY_TOKENS = 16
"""Room for a word and for what a model writes around it."""
MESSAGE_BYTES = 64
"""More than a chat template puts around a message."""
TOP = 20
"""The most alternatives that a vLLM server gives per token."""
KEPT_TEXT = 200
"""Characters kept of a reply that had to be read; a thought is long."""
UNLIKELY = ("zebra", "quartz")
"""Words to choose from that no model would say: a server that answers with one of them can constrain."""
PROBES = ("The old lighthouse keeper", "A recipe for", "In the year 1843", "My favorite theorem", "def load(")
"""Beginnings of texts; their greedy continuations tell one model from another."""


T = TypeVar("T")


@contextmanager
def open(served: EngineSpec, server: ServerSection, say: Callable[[str], None]) -> Iterator[Client]:
    key = os.environ.get(served.api_key_env, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"the key in {served.api_key_env} has characters that no key has", "type it again")
    client = Client(served.urls, served.model.name, key, server)
    say(f"asking {client.model} at {', '.join(served.urls)}")
    yield client


def replied(ballot: ChoiceRequest) -> int:
    """The most tokens of a reply, for which a question must leave room."""
    return ballot.max_thinking_tokens + REPLY_TOKENS if ballot.max_thinking_tokens else MAX_WORD_TOKENS


class Client:
    """One model on one server or several. ServerError if they do not answer, ConfigError if they refuse."""

    def __init__(
        self,
        urls: tuple[str, ...],
        model: str | None,
        key: str,
        server: ServerSection,
        ended: Callable[[], ServerError | None] = lambda: None,
    ) -> None:
        self.transport = Transport(urls, key, server, ended)
        self._tokens: dict[tuple[str, ...], int] = {}
        """For the words of a ballot: the tokens it takes until they differ, learned from earlier answers."""
        self._constrains: dict[str, bool] = {}
        """For each endpoint: whether the server keeps to given words."""
        self._told: str | None = None
        """What replies call the model."""
        self._listed: dict[str, ServedModel] = {}
        """The models that the servers list, by name."""
        self._dialect = Quirks()
        self.model, self.max_model_len = self._look(model)

    def choose(self, ballots: Iterable[ChoiceRequest]) -> Iterator[tuple[int, ChoiceResult | Failure]]:
        """The first ballot goes alone: a shared beginning is computed once, and mistakes show early."""
        rest = iter(ballots)
        for first in rest:
            yield from self.transport.each([first], self._choice)
            break
        for i, found in self.transport.each(rest, self._choice):
            yield i + 1, found

    def generate(
        self, questions: list[GenerateRequest], sampling: Sampling
    ) -> Iterator[tuple[int, Completion]]:
        """Answers as token ids, which vLLM gives (`return_token_ids`) and other servers do not."""

        def answer(reply: Any) -> Completion:
            choice = self._completion(reply)
            return Completion(choice.ids, choice.finish_reason == "stop")

        async def ask(session: Session, question: GenerateRequest) -> Any:
            return await session.send("POST", "completions", self._request(question, sampling), answer)

        for i, found in self.transport.each(questions, ask):
            if isinstance(found, Failure):
                raise AnswerError(f"{self.model} gave no answer: {found.reason}: {found.detail}")
            yield i, found

    def fingerprint(self) -> list[str]:
        """Greedy continuations of PROBES; ConfigError if the servers do not answer alike."""
        found = [[one.one(self._continuation, text) for text in PROBES] for one in self.transport.singly()]
        for url, probes in zip(self.transport.urls, found, strict=True):
            if not same_model(probes, found[0]):
                raise ConfigError(f"{url} serves another {self.model} than {self.transport.urls[0]}")
        return found[0]

    def _look(self, wanted: str | None) -> tuple[str, int]:
        """Name and longest context of the model (0 if unknown); ConfigError unless every server serves it."""
        names, lengths = [], []
        for one in self.transport.singly():
            served = self._list(one, wanted)
            if wanted is not None and served and not any(entry.serves(wanted) for entry in served.values()):
                raise ConfigError(f"{one.urls[0]} serves {', '.join(served)}, not {wanted}")
            if wanted is None and not served:
                raise AnswerError(f"{one.urls[0]} lists no model")
            self._listed |= served
            names.append(wanted or next(iter(served)))
            lengths.append(served[names[-1]].max_model_len if names[-1] in served else 0)
        return names[0], min(lengths)

    def _list(self, one: Transport, wanted: str | None) -> dict[str, ServedModel]:
        """What a server lists; nothing if it has no list and the model's name is known."""
        try:
            return one.one(lambda session, _: session.send("GET", "models", None, models_of), None)
        except RequestRefused as error:
            if wanted is None or error.code not in (404, 405):
                raise
            return {}

    def _completion(self, reply: Any) -> ReplyChoice:
        """The only choice of a reply; ValueError if another model gave it.

        A gateway may call the model otherwise than it is asked for. Such a name counts if the first reply has
        it, and if the server does not list it as another model.
        """
        found = Reply.model_validate(reply)
        if self._told is None and found.model is not None:
            self._told = found.model if self._may_be(found.model) else self.model
        if found.model not in (None, self.model, self._told):
            raise ValueError(f"the reply is by {str(found.model)[:80]}, not by {self.model}")
        return found.choices[0]

    def _may_be(self, name: str) -> bool:
        """Whether a reply by `name` may be the model's: if it is not listed, or stands for the model.

        An alias's reply names its dated version; of several names of a model vLLM's replies have the first.
        """
        other, mine = self._listed.get(name), self._listed.get(self.model)
        if other is None or re.fullmatch(rf"{re.escape(self.model)}-\d[\d-]*", name):
            return True
        return mine is not None and mine.root is not None and mine.root == other.root

    async def _post(self, session: Session, path: str, body: dict[str, Any], read: Callable[[Any], T]) -> T:
        """The reply, read; asked for again if the server names words that it wants otherwise."""
        while True:
            put = self._dialect.put(body)
            try:
                return await session.send("POST", path, put, read)  # type: ignore[no-any-return]
            except (ConfigError, ItemFailed) as error:
                self._dialect.learn(str(error))
                if self._dialect.put(body) == put:
                    raise

    def _content(self, reply: Any) -> str:
        return self._completion(reply).content

    def _tokens_of(self, reply: Any) -> list[tuple[str, dict[str, float]]]:
        return self._completion(reply).tokens

    def _shares_of(self, words: tuple[str, ...], asked: int, reply: Any) -> tuple[float, ...] | None:
        """The words' shares, or None if they are alike in all `asked` tokens; ValueError for odd tokens."""
        tokens = self._tokens_of(reply)
        shares = choice_probabilities(tokens, words)
        if shares is None and len(tokens) < asked:
            raise ValueError(f"{len(tokens)} tokens of {asked}, and no word yet")
        return shares

    async def _continuation(self, session: Session, text: str) -> str:
        """A few greedy tokens, from a chat if the server knows no completions."""
        body = {"model": self.model, "max_tokens": 4, "temperature": 0}
        try:
            return await self._post(session, "completions", {**body, "prompt": text}, self._content)
        except (ConfigError, ItemFailed):
            messages = [{"role": "user", "content": f"Continue: {text}"}]
            return await self._post(
                session, "chat/completions", {**body, "messages": messages}, self._content
            )

    async def _choice(self, session: Session, ballot: ChoiceRequest) -> ChoiceResult:
        """One choice. A token costs a decoding step, so more than one is asked for only if needed."""
        await self._fits(session, ballot)
        if ballot.max_thinking_tokens or not await self._keeps_to_words(session, ballot):
            return await self._word(session, ballot)
        while True:
            tokens = self._tokens.get(ballot.words, 1)
            path, body = self._constrained(ballot, ballot.words, tokens)
            read = partial(self._shares_of, ballot.words, tokens)
            if shares := await self._post(session, path, body, read):
                return ChoiceResult(
                    shares, await self._mass(session, ballot) if ballot.measure_mass else -1.0
                )
            if tokens >= MAX_WORD_TOKENS:
                raise ItemFailed(
                    "unreadable", f"the words {ballot.words} do not differ within {tokens} tokens"
                )
            self._tokens[ballot.words] = max(tokens + 1, self._tokens.get(ballot.words, 1))

    async def _mass(self, session: Session, ballot: ChoiceRequest) -> float:
        """Probability that the unconstrained next token begins one of the words; -1 if not told.

        Only the TOP likeliest tokens count.
        """
        path, body = self._asked(ballot, 1)
        body |= {"logprobs": TOP} if path == "completions" else {"logprobs": True, "top_logprobs": TOP}
        body["temperature"] = 0  # nothing is drawn
        reply = await session.probe(f"{self.transport.urls[0]}/{path}", body)
        try:
            ((_, alternatives),) = self._tokens_of(reply)
            fit = [text for text in alternatives if any(word.startswith(text) for word in ballot.words)]
            return min(1.0, sum(math.exp(alternatives[text]) for text in fit if text.strip()))
        except ValueError:
            return -1.0

    async def _keeps_to_words(self, session: Session, ballot: ChoiceRequest) -> bool:
        """Whether the server keeps to given words and gives log-probabilities; tried once per endpoint.

        That it does not is believed when it is seen twice: all votes are then read in another way.
        """
        path, body = self._constrained(ballot, UNLIKELY, 1)
        if path not in self._constrains:
            kept = await self._kept(session, path, body) or await self._kept(session, path, body)
            self._constrains[path] = kept or self._constrains.get(path, False)
        return self._constrains[path]

    async def _kept(self, session: Session, path: str, body: dict[str, Any]) -> bool:
        try:
            choice = await self._post(session, path, body, self._completion)
            chosen = choice.tokens[0][0].strip()
            return bool(chosen) and any(word.startswith(chosen) for word in UNLIKELY)
        except (ConfigError, LookupError, ValueError):
            return False
        except ItemFailed as error:
            if error.busy:
                raise
            return False

    def _constrained(
        self, ballot: ChoiceRequest, words: tuple[str, ...], tokens: int
    ) -> tuple[str, dict[str, Any]]:
        path, body = self._asked(ballot, tokens)
        wanted = {"logprobs": 5} if path == "completions" else {"logprobs": True, "top_logprobs": 5}
        return path, {**body, **wanted, "temperature": 0, "structured_outputs": {"choice": list(words)}}

    def _asked(self, ballot: ChoiceRequest, tokens: int) -> tuple[str, dict[str, Any]]:
        body = {"model": self.model, "max_tokens": tokens}
        if _is_chat(ballot):
            return "chat/completions", {**body, "messages": ballot.text}
        return "completions", {**body, "prompt": ballot.text}

    async def _word(self, session: Session, ballot: ChoiceRequest) -> ChoiceResult:
        """The word in the model's reply, after its thought if it thinks."""
        path, body = self._asked(ballot, ballot.max_thinking_tokens + REPLY_TOKENS)
        body |= {"temperature": ballot.temperature, **({"seed": ballot.seed} if ballot.temperature else {})}
        text = await self._post(session, path, body, self._content)
        which = word_of(text, ballot.words)
        shares = () if which is None else tuple(float(i == which) for i in range(len(ballot.words)))
        return ChoiceResult(shares, -1.0, text[-KEPT_TEXT:])

    async def _fits(self, session: Session, ballot: ChoiceRequest) -> None:
        """ItemFailed if a prompt is too long; the server counts the tokens of prompts that may be."""
        room = self.max_model_len - replied(ballot)
        if not self.max_model_len or _most_tokens(ballot) <= room:
            return
        if isinstance(ballot.text, list) and not _is_chat(ballot):
            count = len(ballot.text)
        else:
            url = f"{self.transport.urls[0].removesuffix('/v1')}/tokenize"
            body = {"messages": ballot.text} if _is_chat(ballot) else {"prompt": ballot.text}
            reply = await session.probe(url, {"model": self.model, **body})
            try:
                count = count_of(reply)
            except ValueError:
                count = 0  # a server that cannot count is asked all the same
        if count > room:
            raise ItemFailed("too_long", f"{count} tokens, and {self.model} has room for {room}")

    def _request(self, question: GenerateRequest, sampling: Sampling) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": question.ids,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,  # without it vLLM takes the one in generation_config
            "seed": question.seed,
            "stop": list(question.stop) or None,
            "stop_token_ids": list(sampling.stop_ids),
            "return_token_ids": True,
            "add_special_tokens": False,
        }


def _is_chat(ballot: ChoiceRequest) -> bool:
    return not isinstance(ballot.text, str) and isinstance(ballot.text[0], dict)


def _most_tokens(ballot: ChoiceRequest) -> int:
    """An upper bound that needs no tokenizer: a token is at least one byte."""
    if isinstance(ballot.text, str):
        return len(ballot.text.encode())
    return sum(
        MESSAGE_BYTES + len(part["content"].encode()) if isinstance(part, dict) else 1 for part in ballot.text
    )
