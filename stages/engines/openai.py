"""Answers and choices from a running OpenAI-compatible server; choices by constrained decoding with log-probabilities.

The server masks all but the words before it takes log-probabilities (vLLM: `structured_outputs.choice`), so their shares are
read at the first token where they differ and nothing needs parsing.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any

import httpx

from stages.config import ServerSection
from stages.engines import Answer, Ballot, Choice, Question, Sampling, Served
from stages.errors import AnswerError, ConfigError, ServerError

TRIES = 4
TIMEOUT_S = 120
MAX_WORD_TOKENS = 8


@contextmanager
def open(served: Served, server: ServerSection, say: Callable[[str], None]) -> Iterator[Client]:
    assert served.base_url is not None
    key = os.environ.get(served.api_key_env, "")
    with Client(served.base_url, served.model.name, key, server.concurrency) as client:
        say(f"asking {client.model} at {served.base_url}")
        yield client


class Client:
    """One model of one server. ServerError if it does not answer, AnswerError if its answers cannot be read."""

    def __init__(self, base_url: str, model: str | None, key: str, concurrency: int) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=concurrency)
        self._http = httpx.Client(base_url=base_url.rstrip("/") + "/", headers=headers, timeout=TIMEOUT_S, limits=limits)
        self._concurrency = concurrency
        self._tokens: dict[tuple[str, ...], int] = {}
        """Tokens it takes until the words of a ballot differ, as learned from the first answers."""
        served = self._served()
        if model is not None and served and model not in served:
            raise ConfigError(f"{base_url} serves {', '.join(served)}, not {model}")
        if model is None and not served:
            raise AnswerError(f"{base_url} lists no model")
        self.model = model or served[0]

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def choose(self, ballots: list[Ballot]) -> Iterator[tuple[int, Choice]]:
        return self._each(self._choice, ballots)

    def generate(self, questions: list[Question], sampling: Sampling) -> Iterator[tuple[int, Answer]]:
        """Answers by token ids; vLLM gives them (`return_token_ids`), other servers do not."""
        return self._each(lambda question: self._answer(question, sampling), questions)

    def _each(self, ask: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        pool = ThreadPoolExecutor(self._concurrency)
        try:
            futures = {pool.submit(ask, item): i for i, item in enumerate(items)}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, question: Question, sampling: Sampling) -> Answer:
        body = {
            "model": self.model,
            "prompt": question.ids,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": question.seed,
            "stop": list(question.stop) or None,
            "stop_token_ids": list(sampling.stop_ids),
            "return_token_ids": True,
            "add_special_tokens": False,
        }
        answer = self._send("POST", "completions", body)
        try:
            choice = answer["choices"][0]
            return Answer([int(id) for id in choice["token_ids"]], choice["finish_reason"] == "stop")
        except (KeyError, IndexError, TypeError) as error:
            raise AnswerError(f"{self.model} gave no readable answer: {error!r}: {str(answer)[:120]}") from None

    def _served(self) -> list[str]:
        answer = self._send("GET", "models", None)
        try:
            return [entry["id"] for entry in answer["data"]]
        except (KeyError, TypeError):
            raise AnswerError(f"{self._http.base_url}models does not list models: {str(answer)[:80]}") from None

    def _choice(self, ballot: Ballot) -> Choice:
        """One choice; every token saved is a decoding step saved, so it asks for one and for more only if it must."""
        while True:
            tokens = self._tokens.get(ballot.words, 1)
            shares = self._read(ballot, tokens)
            if shares is not None:
                return Choice(shares, -1.0)
            if tokens >= MAX_WORD_TOKENS:
                raise AnswerError(f"{self.model}: the words {ballot.words} do not differ within {tokens} tokens")
            self._tokens[ballot.words] = max(tokens + 1, self._tokens.get(ballot.words, 1))

    def _read(self, ballot: Ballot, tokens: int) -> tuple[float, ...] | None:
        common = {
            "model": self.model,
            "max_tokens": tokens,
            "temperature": 0,
            "structured_outputs": {"choice": list(ballot.words)},
        }
        if isinstance(ballot.text, str) or isinstance(ballot.text[0], int):
            answer = self._send("POST", "completions", {**common, "prompt": ballot.text, "logprobs": 5})
        else:
            body = {**common, "messages": ballot.text, "logprobs": True, "top_logprobs": 5}
            answer = self._send("POST", "chat/completions", body)
        try:
            return _shares(_tokens(answer["choices"][0]["logprobs"]), ballot.words)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            shown = str(answer.get("choices", answer))[:120]
            raise AnswerError(f"{self.model} gave no readable choice between {ballot.words}: {error!r}: {shown}") from None

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        problem = ""
        for attempt in range(TRIES):
            try:
                response = self._http.request(method, path, json=body)
                if response.status_code < 400:
                    return response.json()
                problem = f"{response.status_code} {response.text[:200]}"
                if response.status_code < 500 and response.status_code != 429:
                    raise ConfigError(f"{self._http.base_url}{path} refused: {problem}")
            except (httpx.HTTPError, ValueError) as error:
                problem = f"{type(error).__name__} {error}"
            time.sleep(0.5 * 2**attempt)
        raise ServerError(f"{self._http.base_url}{path} does not answer: {problem}", "the votes so far are kept; run it again")


def _tokens(logprobs: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """Per generated token: its text and the log-probabilities of the alternatives; of a completion or of a chat."""
    if "content" in logprobs:
        return [(t["token"], {a["token"]: a["logprob"] for a in t["top_logprobs"]}) for t in logprobs["content"]]
    return list(zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True))


def _shares(tokens: list[tuple[str, dict[str, float]]], words: tuple[str, ...]) -> tuple[float, ...] | None:
    """Each word's share at the first token with alternatives that fit exactly one word; None if there is none yet."""
    before = ""
    for token, alternatives in tokens:
        mass = [0.0] * len(words)
        for text, value in alternatives.items():
            fits = [word.startswith(before + text) or (before + text).startswith(word) for word in words]
            if sum(fits) == 1:
                mass[fits.index(True)] += math.exp(value)
        if sum(mass) > 0:
            return tuple(part / sum(mass) for part in mass)
        before += token
    return None
