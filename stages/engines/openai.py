"""Answers and choices from running OpenAI-compatible servers, by the client of the package `openai`.

Choices are made by constrained decoding with log-probabilities. The server masks everything but the words
before it computes the log-probabilities (vLLM: `structured_outputs.choice`), so the words' probabilities are
read at the first token in which they differ, and nothing needs parsing. A server that cannot constrain its
output is asked for one word, and its reply is read strictly; so is the reply of a model that thinks first.
Retries, back-off, Retry-After and time limits are the package's.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

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
from stages.errors import AnswerError, ConfigError, ServerError, first_line
from stages.prompts.thoughts import after_thought

log = logging.getLogger(__name__)

CONCURRENCY = 64
"""Requests in flight, unless `server.concurrency` says otherwise."""
MAX_WORD_TOKENS = 8
REPLY_TOKENS = 16
"""Room for a word and for what a model writes around it."""
ALTERNATIVES, TOP_LOGPROBS = 5, 20
"""Likeliest tokens whose log-probabilities come with a choice among words, and the most that there may be."""
KEPT_TEXT = 200
"""Characters kept from the end of a reply that was read as text; thinking is long."""
RETRIES = 6
Tokens = list[tuple[str, list[tuple[str, float]]]]
"""Of each token of a reply: its text, and the text and log-probability of each alternative."""


@contextmanager
def open_engine(spec: EngineSpec, server: ServerSection, say: Callable[[str], None]) -> Iterator[Client]:
    client = Client(spec.urls, os.environ.get(spec.api_key_env, "").strip(), server, spec.model.name)
    say(f"asking {client.model} at {', '.join(spec.urls)}")
    yield client


class Client:
    """One model on one server or several. ServerError if they do not answer, ConfigError if they refuse."""

    def __init__(
        self, urls: tuple[str, ...], key: str, server: ServerSection, model: str,
        exit_error: Callable[[], ServerError | None] = lambda: None,
    ) -> None:  # fmt: skip
        """exit_error: why the server has ended, if it has."""
        from openai import OpenAI

        self.urls, self.key, self.server, self.model, self.exit_error = urls, key, server, model, exit_error
        settings: dict[str, Any] = {"timeout": server.timeout_s, "max_retries": RETRIES}
        self._clients = itertools.cycle(
            [OpenAI(base_url=url, api_key=key or "none", **settings) for url in urls]
        )
        self._can_constrain = True

    def choose_words(self, requests: Iterable[ChoiceRequest]) -> Iterator[tuple[int, ChoiceResult | Failure]]:
        """Send the first request alone, then the others at the same time.

        So the server computes a shared prefix once, and mistakes show early.
        """
        remaining = enumerate(requests)
        yield from self._each(islice(remaining, 1), self._choose)
        yield from self._each(remaining, self._choose)

    def generate(
        self, requests: list[GenerateRequest], sampling: Sampling
    ) -> Iterator[tuple[int, Completion]]:
        """Complete prompts as token ids, which vLLM returns (`return_token_ids`) and other servers do not."""

        def ask(client: Any, request: GenerateRequest) -> Completion:
            choice = client.completions.create(
                model=self.model, prompt=request.ids, max_tokens=sampling.max_new_tokens, seed=request.seed,
                temperature=sampling.temperature, stop=list(request.stop) or None,
                top_p=1.0,  # without top_p and top_k vLLM takes those in generation_config
                extra_body={
                    "top_k": sampling.top_k or -1,
                    "stop_token_ids": list(sampling.stop_ids), "return_token_ids": True,
                    "add_special_tokens": False,
                },
            ).choices[0]  # fmt: skip
            return Completion(list(choice.token_ids), choice.finish_reason == "stop")

        for i, completion in self._each(enumerate(requests), ask):
            if isinstance(completion, Failure):
                raise AnswerError(f"{self.model} gave no answer: {completion.reason}: {completion.detail}")
            yield i, completion

    def _each(
        self, items: Iterable[tuple[int, Any]], ask: Callable[[Any, Any], Any]
    ) -> Iterator[tuple[int, Any]]:
        """Yield each item's index and answer as soon as it arrives; a Failure where it cannot be answered."""
        size = self.server.concurrency or CONCURRENCY
        with ThreadPoolExecutor(size) as threads:
            waiting = {}
            try:
                for i, item in items:
                    waiting[threads.submit(self._attempt, ask, item)] = i
                    if len(waiting) >= size:
                        yield from self._finished(waiting)
                while waiting:
                    yield from self._finished(waiting)
            finally:
                threads.shutdown(wait=False, cancel_futures=True)

    @staticmethod
    def _finished(waiting: dict[Any, int]) -> Iterator[tuple[int, Any]]:
        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            yield waiting.pop(future), future.result()

    def _attempt(self, ask: Callable[[Any, Any], Any], item: Any) -> Any:
        import openai

        try:
            return ask(next(self._clients), item)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise ConfigError(f"{self.urls[0]} refuses {self.model}: {first_line(error)}") from None
        except openai.APIStatusError as error:
            return Failure("refused" if error.status_code < 500 else "server_error", first_line(error))
        except openai.APITimeoutError as error:
            return Failure("timeout", first_line(error))
        except openai.APIConnectionError as error:
            raise self.exit_error() or ServerError(
                f"{', '.join(self.urls)} does not answer: {first_line(error)}",
                "the same command asks only for what is missing",
            ) from None
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            return Failure("unreadable", first_line(error))

    def _choose(self, client: Any, request: ChoiceRequest) -> ChoiceResult:
        """Make one choice, by constrained decoding if the server can, else by reading its reply."""
        import openai

        if not request.max_thinking_tokens and self._can_constrain:
            constraint = {"structured_outputs": {"choice": list(request.words)}}
            try:
                choice = self._ask(client, request, MAX_WORD_TOKENS, ALTERNATIVES, extra_body=constraint)
                if found := probabilities(_tokens(choice), request.words):
                    return ChoiceResult(found, self._mass(client, request))
            except (openai.BadRequestError, openai.UnprocessableEntityError, ValueError, TypeError):
                pass
            self._can_constrain = False
            log.warning("%s gives no log-probabilities of given words: votes are 0 or 1", self.model)
        sampling = {"temperature": request.temperature, "seed": request.seed} if request.temperature else {}
        choice = self._ask(client, request, request.max_thinking_tokens + REPLY_TOKENS, 0, **sampling)
        text = choice.message.content if hasattr(choice, "message") else choice.text
        index = parse_word(text or "", request.words)
        chosen = () if index is None else tuple(float(i == index) for i in range(len(request.words)))
        return ChoiceResult(chosen, -1.0, (text or "")[-KEPT_TEXT:])

    def _mass(self, client: Any, request: ChoiceRequest) -> float:
        """The probability that the unconstrained next token begins one of the words; -1 if not asked."""
        if not request.measure_mass:
            return -1.0
        ((_, alternatives),) = _tokens(self._ask(client, request, 1, TOP_LOGPROBS))
        begins = [p for text, p in alternatives if text.strip() and _fitting(text, request.words)]
        return min(1.0, sum(map(math.exp, begins)))

    def _ask(
        self, client: Any, request: ChoiceRequest, tokens: int, alternatives: int, **options: Any
    ) -> Any:
        path, body = self._body(request, tokens, alternatives)
        endpoint = client.chat.completions if path.startswith("chat") else client.completions
        return endpoint.create(**{"temperature": 0, **body, **options}).choices[0]

    def _body(self, request: ChoiceRequest, tokens: int, alternatives: int) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {"model": self.model, "max_tokens": tokens}
        if isinstance(request.text, str) or isinstance(request.text[0], int):
            logprobs = {"logprobs": alternatives} if alternatives else {}
            return "completions", {**body, **logprobs, "prompt": request.text}
        logprobs = {"logprobs": True, "top_logprobs": alternatives} if alternatives else {}
        return "chat/completions", {**body, **logprobs, "messages": request.text}


def check_reachable(url: str) -> None:
    """Raise ServerError if nothing takes connections at this address of a server."""
    address = urlsplit(url)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((str(address.hostname), port), timeout=10).close()
    except OSError as error:
        raise ServerError(f"{url}: {error.strerror or error}", "start the server, or mend base_url") from None


def max_reply_tokens(request: ChoiceRequest) -> int:
    """Return the most tokens of a reply, for which the prompt must leave room."""
    return request.max_thinking_tokens + REPLY_TOKENS if request.max_thinking_tokens else MAX_WORD_TOKENS


def _tokens(choice: Any) -> Tokens:
    if choice.logprobs is None:
        raise ValueError("the reply has no log-probabilities")
    if getattr(choice.logprobs, "content", None) is not None:  # a chat's
        return [(t.token, [(o.token, o.logprob) for o in t.top_logprobs]) for t in choice.logprobs.content]
    pairs = zip(choice.logprobs.tokens, choice.logprobs.top_logprobs, strict=True)
    return [(token, list(alternatives.items())) for token, alternatives in pairs]


def probabilities(tokens: Tokens, words: tuple[str, ...]) -> tuple[float, ...] | None:
    """Return the words' probabilities relative to each other, at the first token that tells all apart.

    None if no token does. ValueError if one begins no word, or some word's probability is missing.
    """
    prefix = ""
    for token, alternatives in tokens:
        masses = [0.0] * len(words)
        for text, logprob in alternatives:
            fitting = _fitting(prefix + text, words)
            if len(fitting) == 1:
                masses[fitting[0]] += math.exp(logprob)
        prefix += token
        if not token or not (possible := _fitting(prefix, words)):
            raise ValueError(f"{prefix[:40]!r} begins none of {words}")
        if any(masses) and (0 not in masses or len(possible) == 1):
            listed = [math.exp(logprob) for _, logprob in alternatives]
            behind = max(0.0, min(1 - sum(listed), *listed))  # of a word behind the likeliest tokens
            masses = [mass or behind for mass in masses]
            return tuple(mass / sum(masses) for mass in masses)
    return None


def _fitting(text: str, words: tuple[str, ...]) -> list[int]:
    """The indices of the words that a text begins, or that begin it."""
    return [i for i, word in enumerate(words) if word.startswith(text) or text.startswith(word)]


def parse_word(text: str, words: tuple[str, ...]) -> int | None:
    """Return the index of the word that a reply gives, or None if it gives no word or different ones.

    Reading is strict: the first or last line after the thinking must be the word and nothing else. Case,
    spaces, punctuation, markup and a leading "the answer is" are ignored.
    """
    lines = [line for line in after_thought(text).splitlines() if line.strip()]
    plain = [_plain(word) for word in words]
    indices = {plain.index(bare) for line in {*lines[:1], *lines[-1:]} if (bare := _plain(line)) in plain}
    return indices.pop() if len(indices) == 1 else None


def _plain(text: str) -> str:
    """Reduce a line to its letters and digits in lower case, without a leading "the answer is"."""
    words = " ".join(re.findall(r"[^\W_]+", text.casefold()))
    return re.sub(r"^(?:the )?(?:final )?answer (?:is )?", "", words).replace(" ", "")
