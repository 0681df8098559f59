"""Answers and choices from running OpenAI-compatible servers.

Choices are made by constrained decoding with log-probabilities. The server masks everything but the words
before it computes the log-probabilities (vLLM: `structured_outputs.choice`), so the words' probabilities are
read at the first token in which they differ, and nothing needs parsing. A server that cannot constrain its
output is asked for one word, and its reply is read strictly; so is the reply of a model that thinks first.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
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
from stages.engines.openai.choices import choice_probabilities, parse_word
from stages.engines.openai.identity import Identity
from stages.engines.openai.replies import ReplyChoice, TokenCount, least_probability
from stages.engines.openai.requests import (
    MAX_WORD_TOKENS,
    REPLY_TOKENS,
    Quirks,
    choice_body,
    constrained_body,
    generate_body,
    is_chat,
    max_reply_tokens,
    most_prompt_tokens,
    prompt_probabilities_body,
)
from stages.engines.openai.session import ItemFailed, Session
from stages.engines.openai.transport import Transport
from stages.errors import AnswerError, ConfigError

log = logging.getLogger(__name__)

TOP_LOGPROBS = 20
"""The most alternatives that a vLLM server gives per token."""
KEPT_TEXT = 200
"""Characters kept from the end of a reply that was read as text; thinking is long."""
UNLIKELY = ("zebra", "quartz")
"""Words to choose from that no model would write: a server that replies with one of them can constrain."""
PROBES = ("The old lighthouse keeper", "A recipe for", "In the year 1843", "My favorite theorem", "def load(")
"""Prompts whose greedy continuations tell one model from another."""
T = TypeVar("T")
_content = attrgetter("content")


@contextmanager
def open_engine(spec: EngineSpec, server: ServerSection, say: Callable[[str], None]) -> Iterator[Client]:
    key = os.environ.get(spec.api_key_env, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"the key in {spec.api_key_env} has characters that no key has", "type it again")
    client = Client(Transport(spec.urls, key, server), spec.model.name)
    say(f"asking {client.model} at {', '.join(spec.urls)}")
    yield client


class Client:
    """One model on one server or several. ServerError if they do not answer, ConfigError if they refuse."""

    def __init__(self, transport: Transport, model: str | None) -> None:
        """model: its name; None for the first one that the servers list."""
        self.transport = transport
        self._tokens_needed: dict[tuple[str, ...], int] = {}
        """For the words of a request: the tokens until they differ, learned from earlier replies."""
        self._can_constrain: dict[str, bool] = {}
        """For each endpoint: whether the server can constrain its output to given words."""
        self._quirks = Quirks()
        self._identity = Identity(transport, model)
        self.model, self.max_model_len = self._identity.model, self._identity.max_model_len

    def choose_words(self, requests: Iterable[ChoiceRequest]) -> Iterator[tuple[int, ChoiceResult | Failure]]:
        """Send the first request alone, then the others at the same time.

        So the server computes a shared prefix once, and mistakes show early.
        """
        remaining = iter(requests)
        for first in remaining:
            yield from self.transport.each([first], self._choose)
            break
        for i, choice in self.transport.each(remaining, self._choose):
            yield i + 1, choice

    def prepared_choice(
        self, request: ChoiceRequest
    ) -> tuple[str, dict[str, Any], Callable[[Any], tuple[float, ...] | None]]:
        """A choice for another client to ask for, once this one has learned how by others with its words.

        Returns its path, its body, and what reads the words' probabilities in the reply's JSON.
        """
        tokens = self._tokens_needed.get(request.words, 1)
        path, body = constrained_body(self.model, request, request.words, tokens)

        def read(reply: Any) -> tuple[float, ...] | None:
            return choice_probabilities(self._identity.choice_of(reply), words=request.words, asked=tokens)

        return path, body, read

    def generate(
        self, requests: list[GenerateRequest], sampling: Sampling
    ) -> Iterator[tuple[int, Completion]]:
        """Complete prompts as token ids, which vLLM returns (`return_token_ids`) and other servers do not."""

        def ask(session: Session, request: GenerateRequest) -> Awaitable[Completion]:
            body = generate_body(self.model, request, sampling)
            return session.send("completions", body, lambda reply: self._identity.choice_of(reply).completion)

        for i, completion in self.transport.each(requests, ask):
            if isinstance(completion, Failure):
                raise AnswerError(f"{self.model} gave no answer: {completion.reason}: {completion.detail}")
            yield i, completion

    def least_probabilities(self, rows: list[tuple[list[int], list[int]]]) -> Iterator[tuple[int, float]]:
        """Yield each completion's least token probability, which vLLM returns with those of a prompt.

        Not through a LoRA module: vLLM 0.31 then ends with an error.
        """

        def ask(session: Session, row: tuple[list[int], list[int]]) -> Awaitable[float]:
            body = prompt_probabilities_body(self.model, [*row[0], *row[1]])
            read = partial(least_probability, completion=row[1])
            return session.send("completions", body, lambda reply: read(self._identity.choice_of(reply)))

        for i, least in self.transport.each(rows, ask):
            if isinstance(least, Failure):
                raise AnswerError(f"{self.model} gave no probabilities: {least.reason}: {least.detail}")
            yield i, least

    def fingerprint(self) -> list[str]:
        """Return the greedy continuations of PROBES; ConfigError if the servers' differ."""
        fingerprints = [
            [server.call(self._continuation, text) for text in PROBES]
            for server in self.transport.per_server()
        ]
        for url, probes in zip(self.transport.urls, fingerprints, strict=True):
            if not same_model(probes, fingerprints[0]):
                raise ConfigError(
                    f"{url} and {self.transport.urls[0]} serve different models as {self.model}"
                )
        return fingerprints[0]

    async def _post(
        self, session: Session, path: str, body: dict[str, Any], read: Callable[[ReplyChoice], T]
    ) -> T:
        """Post a request, again if a refusal teaches that the server needs other parameters."""
        while True:
            adapted = self._quirks.apply(body)
            try:
                return await session.send(path, adapted, lambda reply: read(self._identity.choice_of(reply)))
            except (ConfigError, ItemFailed) as error:
                self._quirks.learn(str(error))
                # Compared with what was sent: another request may have taught the same meanwhile.
                if self._quirks.apply(body) == adapted:
                    raise

    async def _continuation(self, session: Session, text: str) -> str:
        """Continue a text by a few greedy tokens, in a chat if the server has no completions."""
        body = {"model": self.model, "max_tokens": 4, "temperature": 0}
        try:
            return await self._post(session, "completions", {**body, "prompt": text}, _content)
        except (ConfigError, ItemFailed) as error:
            if isinstance(error, ItemFailed) and error.busy:
                raise  # a chat's text would be another model's
            body["messages"] = [{"role": "user", "content": f"Continue: {text}"}]
            return await self._post(session, "chat/completions", body, _content)

    async def _choose(self, session: Session, request: ChoiceRequest) -> ChoiceResult:
        """Make one choice, by constrained decoding if the server can, else by reading its reply."""
        await self._check_length(session, request)
        if request.max_thinking_tokens or not await self._constrains(session, request):
            return await self._choose_by_text(session, request)
        # Each token costs a decode step. So the first request asks for one token, and for one more each time
        # the words agree in all of them; later requests with the same words start at the number it learned.
        while True:
            tokens = self._tokens_needed.get(request.words, 1)
            path, body = constrained_body(self.model, request, request.words, tokens)
            read = partial(choice_probabilities, words=request.words, asked=tokens)
            if probabilities := await self._post(session, path, body, read):
                mass = await self._mass(session, request) if request.measure_mass else -1.0
                return ChoiceResult(probabilities, mass)
            if tokens >= MAX_WORD_TOKENS:
                raise ItemFailed(
                    "unreadable", f"the words {request.words} do not differ within {tokens} tokens"
                )
            # Never lower: requests run at the same time, and another may have learned a higher number.
            self._tokens_needed[request.words] = max(tokens + 1, self._tokens_needed.get(request.words, 1))

    async def _mass(self, session: Session, request: ChoiceRequest) -> float:
        """Measure the probability that the unconstrained next token begins one of the words.

        Only the TOP_LOGPROBS likeliest tokens count. -1 if the server does not give them.
        """
        path, body = choice_body(self.model, request, 1, TOP_LOGPROBS)
        body["temperature"] = 0  # the sampled token is not used
        reply = await session.probe(f"{self.transport.urls[0]}/{path}", body)
        try:
            ((_, alternatives),) = self._identity.choice_of(reply).tokens
            # An empty token or a lone space begins a word, but any other text as well.
            fitting = [
                math.exp(logprob)
                for text, logprob in alternatives
                if text.strip() and any(word.startswith(text) for word in request.words)
            ]
            return min(1.0, sum(fitting))
        except ValueError:
            return -1.0

    async def _constrains(self, session: Session, request: ChoiceRequest) -> bool:
        """True if the server obeys a constraint and gives log-probabilities; tried once per endpoint.

        It takes two failures to conclude that the server cannot, because all votes are then read as text.
        """
        path, body = constrained_body(self.model, request, UNLIKELY, 1)
        if path not in self._can_constrain:
            obeys = await self._obeys(session, path, body) or await self._obeys(session, path, body)
            # Requests run at the same time: another one's success counts, too.
            self._can_constrain[path] = obeys or self._can_constrain.get(path, False)
            if not self._can_constrain[path]:
                log.warning("%s gives no log-probabilities of given words: votes are 0 or 1", self.model)
        return self._can_constrain[path]

    async def _obeys(self, session: Session, path: str, body: dict[str, Any]) -> bool:
        """True if the reply begins one of the UNLIKELY words; a busy server's ItemFailed is passed on."""
        try:
            choice = await self._post(session, path, body, lambda choice: choice)
            token = choice.tokens[0][0].strip()
            return bool(token) and any(word.startswith(token) for word in UNLIKELY)
        except (ConfigError, LookupError, ValueError):
            return False
        except ItemFailed as error:
            if error.busy:
                raise
            return False

    async def _choose_by_text(self, session: Session, request: ChoiceRequest) -> ChoiceResult:
        """Read the choice in the text of a reply, after the thinking if there is any."""
        tokens = request.max_thinking_tokens + REPLY_TOKENS
        path, body = choice_body(self.model, request, tokens)
        sampling = {"seed": request.seed} if request.temperature else {}
        body |= {"temperature": request.temperature, **sampling}
        text = await self._post(session, path, body, _content)
        index = parse_word(text, request.words)
        # The chosen word has probability 1, the others 0.
        probabilities = () if index is None else tuple(float(i == index) for i in range(len(request.words)))
        return ChoiceResult(probabilities, -1.0, text[-KEPT_TEXT:])

    async def _check_length(self, session: Session, request: ChoiceRequest) -> None:
        """Raise ItemFailed if a prompt is too long; the server counts its tokens if the upper bound is."""
        room = self.max_model_len - max_reply_tokens(request)
        if not self.max_model_len or most_prompt_tokens(request) <= room:
            return
        if isinstance(request.text, list) and not is_chat(request):
            count = len(request.text)
        else:
            url = f"{self.transport.urls[0].removesuffix('/v1')}/tokenize"
            body = {"messages": request.text} if is_chat(request) else {"prompt": request.text}
            reply = await session.probe(url, {"model": self.model, **body})
            try:
                count = TokenCount.model_validate(reply).count
            except ValueError:
                count = 0  # a server that cannot count gets the request all the same
        if count > room:
            raise ItemFailed("too_long", f"{count} tokens, and {self.model} has room for {room}")
