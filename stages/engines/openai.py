"""Answers and choices from a running OpenAI-compatible server, by the client of the package `openai`.

Choices are made by constrained decoding with log-probabilities. The server masks everything but the words
before it computes the log-probabilities (vLLM: `structured_outputs.choice`), so the words' probabilities are
read at the first token in which they differ, and nothing needs parsing. A server that cannot constrain its
output is asked for one word, and its reply is read strictly; so is the reply of a model that thinks first.
Retries and back-off are the package's; what a reply must be to count is in `reply_checks`.
"""

import asyncio
import logging
import os
import queue
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from typing import Any

import httpx

from stages.config import ServerSection
from stages.engines import (
    ChoiceRequest,
    ChoiceResult,
    Completion,
    EngineSpec,
    Failure,
    GenerateRequest,
    Sampling,
)
from stages.engines.reply_checks import (
    UNLIKELY,
    UNREADABLE,
    Reply,
    choice_body,
    choice_probabilities,
    obeys,
    parse_reply,
    parse_word,
    thinking_flags,
)
from stages.errors import AnswerError, ConfigError, ServerError
from stages.runtime.background import event_loop

log = logging.getLogger(__name__)

CONCURRENCY = 64
"""Requests in flight, unless `server.concurrency` or the caller says otherwise."""
TRIES = 6
"""How often a request is sent; again after a temporary failure, and after a reply that cannot be believed."""
PAUSE_S = 0.05  # after the first reply that cannot be believed; it doubles with each further one
MAX_WORD_TOKENS, REPLY_TOKENS = 8, 16
"""Room for a word, and for a word with what a model writes around it."""
KEPT_TEXT = 200  # characters from the end of a reply that was read as text; thinking is long
TOO_LONG = ("context length", "too long", "max_model_len")
"""What servers say of a prompt that does not fit."""
MIN_KEY, MIN_ID = 7, 20
"""Characters of a key that is secret, and of a reply's id that is unique; Ollama draws one of 999 numbers."""
Ask = Callable[[Any, Any], Awaitable[Any]]


@contextmanager
def open_engine(spec: EngineSpec, server: ServerSection, say: Callable[[str], None]) -> Iterator["Client"]:
    key = os.environ.get(spec.api_key_env, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"the key in {spec.api_key_env} has characters that no key has", "type it again")
    say(f"asking {spec.model.name} at {spec.url}")
    yield Client(spec.url or "", key, server, spec.model.name)


def check_reachable(url: str) -> None:
    """Raise ServerError if nothing takes connections at this address of a server."""
    try:
        httpx.get(f"{url.rstrip('/')}/models", timeout=5, trust_env=_uses_proxy(url))
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise ServerError(f"base_url {url} cannot be reached: {error}", "start that server") from None
    except (httpx.HTTPError, ValueError, ImportError):
        return  # it may be busy; of a proxy that cannot be used the stage speaks


def _uses_proxy(url: str) -> bool:
    return httpx.URL(url).host not in ("127.0.0.1", "::1", "localhost")


def max_reply_tokens(request: ChoiceRequest) -> int:
    """Return the most tokens of a reply, for which the prompt must leave room."""
    return request.max_thinking_tokens + REPLY_TOKENS if request.max_thinking_tokens else MAX_WORD_TOKENS


class Client:
    """One model on a server. ServerError if it does not answer, ConfigError if it refuses."""

    def __init__(
        self,
        url: str,
        key: str,
        server: ServerSection,
        model: str,
        exit_error: Callable[[], ServerError | None] = lambda: None,
        concurrency: int = CONCURRENCY,
    ) -> None:
        """exit_error: why the server has ended, if it has."""
        self.url, self.key, self.server, self.model, self.exit_error = url, key, server, model, exit_error
        self._most = server.concurrency or concurrency
        self._answered = 0
        """Replies that were believed, so far."""
        self._ids = set[str]()  # of these replies
        self._can_constrain: bool | None = None
        """Whether the server can constrain its output to given words; None if it was not tried."""
        letters = (rf"(?:\\?{re.escape(c)}|\\u{ord(c):04x})" for c in key)  # as JSON may have them
        self._secret = re.compile("".join(letters) if len(key) >= MIN_KEY else "(?!)", re.IGNORECASE)

    def choose_words(self, requests: Iterable[ChoiceRequest]) -> Iterator[tuple[int, ChoiceResult | Failure]]:
        """Send the first request alone: it computes the others' prefix, and shows mistakes early."""
        return self._each(requests, self._choose, at_first=1)

    def generate(
        self, requests: list[GenerateRequest], sampling: Sampling
    ) -> Iterator[tuple[int, Completion]]:
        """Complete prompts as token ids, which vLLM returns (`return_token_ids`) and other servers do not."""
        common = {
            "max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature,
            "stop_token_ids": list(sampling.stop_ids), "return_token_ids": True, "add_special_tokens": False,
            # without top_p and top_k vLLM takes those in generation_config
            "top_p": 1.0, "top_k": sampling.top_k or -1,
        }  # fmt: skip

        async def ask(client: Any, request: GenerateRequest) -> Completion:
            body = {"prompt": request.ids, "seed": request.seed, "stop": list(request.stop) or None, **common}
            return await self._send(client, body, lambda r: Completion(r.token_ids, r.is_complete))

        for i, completion in self._each(requests, ask, at_first=self._most):
            if isinstance(completion, Failure):
                raise AnswerError(f"{self.model} gave no answer: {completion.reason}: {completion.detail}")
            yield i, completion

    def _each(self, items: Iterable[Any], ask: Ask, at_first: int) -> Iterator[tuple[int, Any]]:
        """Yield each item's index and answer as soon as it arrives; a Failure where it cannot be answered.

        at_first: items in flight until the first is answered. All requests end when this generator is left.
        """
        outcomes: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        client = self._connect()

        async def answer(i: int, item: Any) -> None:
            try:
                outcomes.put((i, await self._attempt(client, ask, item)))
            except Exception as error:
                outcomes.put((i, error))

        with event_loop() as start:
            waiting, most, numbered = 0, at_first, enumerate(items)
            while True:
                for i, item in islice(numbered, most - waiting):
                    start(partial(answer, i, item))
                    waiting += 1
                if not waiting:
                    return
                i, answered = outcomes.get()
                waiting, most = waiting - 1, self._most
                if isinstance(answered, Exception):
                    raise answered
                yield i, answered

    def _connect(self) -> Any:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        # One connection per request: on one kept alive, a reply sent twice would answer the next request.
        return AsyncOpenAI(
            base_url=self.url, api_key=self.key or "none",
            timeout=self.server.timeout_s, max_retries=TRIES - 1,
            http_client=DefaultAsyncHttpxClient(trust_env=_uses_proxy(self.url), follow_redirects=False),
            default_headers={"Connection": "close"},
        )  # fmt: skip

    async def _attempt(self, client: Any, ask: Ask, item: Any) -> Any:
        """Ask the server; a Failure if only this item failed."""
        import openai

        answered = self._answered
        try:
            # The package limits each read, which a server that sends byte by byte never exceeds.
            async with asyncio.timeout(TRIES * self.server.timeout_s):
                return await ask(client, item)
        except openai.APIStatusError as error:
            return self._refused(error)
        except (openai.APITimeoutError, TimeoutError):
            failure = Failure("timeout", f"no answer in {self.server.timeout_s:g} s")
        except openai.APIConnectionError as error:
            failure = Failure("transport", self._secret.sub("***", f"{error.__cause__ or error}"))
        except ValueError as error:
            return Failure("unreadable", " ".join(str(error).split()))
        if self._answered > answered:
            return failure
        raise self.exit_error() or ServerError(
            f"{self.url} does not answer: {failure.detail}",
            "run the same command again; the answers so far are kept",
        )

    def _refused(self, error: Any) -> Failure:
        """Return the failure that a status stands for; ConfigError if every request would meet it."""
        code = error.status_code
        text = f"{code} {' '.join(self._secret.sub('***', error.response.text)[:200].split())}"
        if code < 400 or code in (408, 409, 425, 429) or code >= 500:
            return Failure("server_error", text)
        is_too_long = any(words in text.lower() for words in TOO_LONG)
        if code in (400, 413, 422) and (is_too_long or self._answered):
            return Failure("too_long" if is_too_long else "refused", text)
        raise ConfigError(f"{self.url} refused: {text}")

    async def _send(self, client: Any, body: dict[str, Any], read: Callable[[Reply], Any]) -> Any:
        """Return what `read` makes of the reply, asked for again if it cannot be believed (ValueError)."""
        kind = "messages" if "messages" in body else "prompt"
        endpoint = client.chat.completions if kind == "messages" else client.completions
        for attempt in range(TRIES):
            response = await endpoint.with_raw_response.create(
                **{"model": self.model, kind: body[kind], "extra_body": body}
            )
            try:
                if response.status_code not in (200, 201):  # others are of caches and proxies
                    raise ValueError(f"no answer has the status {response.status_code}")
                text = self._secret.sub("***", response.content.decode())
                reply = parse_reply(text, self.model, body["max_tokens"])
                if reply.id in self._ids:
                    raise ValueError(f"an earlier reply had the id {reply.id[:80]}")
                answer = read(reply)
            except UNREADABLE as error:
                failed = f"no readable answer: {error}"[:300]
                await asyncio.sleep(PAUSE_S * 2**attempt)
                continue
            self._ids |= {reply.id} if len(reply.id) >= MIN_ID else set()
            self._answered += 1
            return answer
        raise ValueError(failed)

    async def _choose(self, client: Any, request: ChoiceRequest) -> ChoiceResult:
        """Make one choice, by constrained decoding if the server can, else by reading its reply."""
        if not await self._constrains(client, request) or request.max_thinking_tokens:
            return await self._choose_by_text(client, request)
        body = choice_body(request, MAX_WORD_TOKENS, request.words)
        read = partial(choice_probabilities, words=request.words)
        return ChoiceResult(await self._send(client, body, read))

    async def _constrains(self, client: Any, request: ChoiceRequest) -> bool:
        """True if the server obeys a constraint and gives log-probabilities; tried once.

        It takes two failures to conclude that the server cannot, because all votes are then read as text. A
        reply that cannot be believed, or a busy server, is none.
        """
        from openai import BadRequestError, UnprocessableEntityError

        for _ in range(2 if self._can_constrain is None else 0):
            with suppress(BadRequestError, UnprocessableEntityError):
                if await self._send(client, choice_body(request, 1, UNLIKELY), obeys):
                    self._can_constrain = True
                    return True
        if self._can_constrain is None:
            self._can_constrain = False
            log.warning("%s gives no log-probabilities of given words: votes are 0 or 1", self.model)
        return self._can_constrain

    async def _choose_by_text(self, client: Any, request: ChoiceRequest) -> ChoiceResult:
        """Read the choice in the text of a reply, after the thinking if there is any."""
        body = choice_body(request, request.max_thinking_tokens + REPLY_TOKENS)
        if self._can_constrain:  # then it is asked for text because the voter thinks
            body |= thinking_flags(True)
        if request.temperature:
            body |= {"temperature": request.temperature, "seed": request.seed}
        text = await self._send(client, body, lambda reply: reply.text)
        index = parse_word(text, request.words)
        # The chosen word has probability 1, the others 0.
        probabilities = () if index is None else tuple(float(i == index) for i in range(len(request.words)))
        return ChoiceResult(probabilities, text[-KEPT_TEXT:])
