"""Replies of OpenAI-compatible servers, checked before they are believed, and the requests for choices.

The fields that are used are checked, all others ignored. A reply that is of another shape, contradicts itself
or has probabilities that cannot be raises one of `UNREADABLE`.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stages.engines import ChoiceRequest
from stages.prompts.chat_template import FLAGS
from stages.prompts.thoughts import after_thought
from stages.records import from_json

UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What reading a reply raises that cannot be believed; all but ValueError for another shape."""
ALTERNATIVES = 5
"""Likeliest tokens whose log-probabilities come with a choice among words."""
MAX_LOGPROB = 1e-4
"""Largest log-probability that is accepted: 0, and what rounding to four decimals may add."""
MAX_BEHIND = 0.05
"""How far the log-probability of a greedy token may be behind another one, for rounding."""
ROUNDING, BITS = 5e-4, 2**-8
"""How far log-probabilities may be off: by three decimals, and as a share by the 8 bits of bfloat16."""
BROKEN_OFF = ("abort", "error", "cancel", "content_filter", "fail", "incomplete", "timeout", "tool_call")
"""How reasons begin for which servers end an answer before its end, such as `cancelled`."""
MAX_ID = 2**31
UNLIKELY = ("zebra", "quartz")
"""Words to choose from that no model would write: a server that replies with one of them can constrain."""
Alternatives = list[tuple[str, float]]
"""Text and log-probability of the likeliest tokens at one place."""


@dataclass(frozen=True)
class Reply:
    """The parsed reply to a request, which has one choice. Its properties raise one of UNREADABLE."""

    fields: dict[str, Any]
    choice: dict[str, Any]
    message: dict[str, Any]
    """Empty for a completion."""
    model: str
    """The model that was asked."""
    most_tokens: int
    """The most tokens that were asked for."""

    @property
    def text(self) -> str:
        """The text of a chat or a completion; empty if thinking used up all tokens."""
        text: str = (self.message.get("content") or "") if self.message else self.choice["text"]
        text.encode()  # ValueError for a lone surrogate, which no file could hold
        return text

    @property
    def id(self) -> str:
        """Its id; empty if it has none."""
        return str(self.fields.get("id") or "")

    @property
    def is_complete(self) -> bool:
        """Terminated by a stop token or text, not by the length limit."""
        return self.choice.get("finish_reason") == "stop"

    @property
    def token_ids(self) -> list[int]:
        ids: list[int] = self.choice["token_ids"]
        if any(type(number) is not int or not 0 <= number < MAX_ID for number in ids):
            raise ValueError("it has token ids that are none")
        return ids

    @property
    def tokens(self) -> list[tuple[str, Alternatives]]:
        """For each token: its text and alternatives; ValueError unless they can be, and write the text."""
        given = self.choice["logprobs"]
        if self.is_chat:
            tokens = [
                (t["token"], [(a["token"], a["logprob"]) for a in t["top_logprobs"]])
                for t in given["content"]
            ]
        else:
            pairs = zip(given["tokens"], given["top_logprobs"], strict=True)
            tokens = [(token, list(alternatives.items())) for token, alternatives in pairs]
        for token, alternatives in tokens:
            _check_alternatives(token, alternatives)
        said, written = ("".join(text.split()) for text in (self.text, "".join(text for text, _ in tokens)))
        if not written.startswith(said):
            raise ValueError(f"the text is {said[:40]!r}, and the tokens write {written[:40]!r}")
        if (self.used or 0) > len(tokens) + 1:  # a server may count an end of the turn that it does not list
            raise ValueError(f"it has {len(tokens)} tokens, and says that it used {self.used}")
        return tokens

    @property
    def used(self) -> Any:
        """The number of its tokens, as it says; None if it does not."""
        return (self.fields.get("usage") or {}).get("completion_tokens")

    @property
    def is_chat(self) -> bool:
        """Whether its log-probabilities are those of a chat; a completion's are in two lists."""
        return self.choice["logprobs"].get("content") is not None


def _check_alternatives(token: str, alternatives: Alternatives) -> None:
    """Raise ValueError unless these can be the likeliest tokens of one distribution, the token among them."""
    for _, logprob in alternatives:
        if type(logprob) not in (int, float) or not -math.inf < logprob <= MAX_LOGPROB:
            raise ValueError(f"{str(logprob)[:40]} is no log-probability")
    total = sum(math.exp(logprob) for _, logprob in alternatives)
    if total > 1 + _rounding(alternatives):
        raise ValueError(f"the alternatives of {token[:40]!r} have a probability of {total:.4g} together")
    # Requests for a choice are greedy, and vLLM always adds the token that it took.
    taken = max((logprob for text, logprob in alternatives if text == token), default=-math.inf)
    if any(logprob > taken + MAX_BEHIND for _, logprob in alternatives):
        raise ValueError(f"{token[:40]!r} was taken, and is not the likeliest of its alternatives")


def _rounding(alternatives: Alternatives) -> float:
    """Return by how much the sum of the alternatives' probabilities may be off."""
    return ROUNDING - BITS * sum(math.exp(logprob) * logprob for _, logprob in alternatives)


def _problems(reply: Reply) -> Iterator[str]:
    """Yield the reasons not to believe a reply."""
    fields, choice, message = reply.fields, reply.choice, reply.message
    # A hub in front of servers may leave the owner out, and a reply to an alias has its dated version.
    model, short = fields.get("model"), re.escape(reply.model.rpartition("/")[2])
    if model not in (None, reply.model) and not re.fullmatch(rf"{short}(-\d[\d-]*)?", model):
        yield "another model wrote it"
    if any(record.get("error") is not None or record.get("refusal") for record in (fields, choice, message)):
        yield "it has an error or a refusal"
    # A server that shuts down returns what it has of its answers, as vLLM does with `abort`.
    names = ("finish_reason", "stop_reason", "status", "object")
    reasons = [str(record.get(name)) for record in (fields, choice) for name in names]
    if any(reason.lower().startswith(BROKEN_OFF) or reason.endswith(".chunk") for reason in reasons):
        yield "the server broke it off"
    is_possible = reply.used is None or (type(reply.used) is int and 1 <= reply.used <= reply.most_tokens)
    if not is_possible or len(choice.get("token_ids") or ()) > reply.most_tokens:
        yield "it has more tokens than were asked for, or none"
    if repr(choice.get("index", 0)) != "0":
        yield "it is not the first of its choices"
    if message.get("tool_calls") or choice.get("delta") is not None:
        yield "it is no text"


def parse_reply(body: str, model: str, most_tokens: int) -> Reply:
    """Parse the reply to a request for at most so many tokens of a model, or raise one of UNREADABLE."""
    fields = from_json(body)
    (choice,) = fields["choices"]
    reply = Reply(fields, choice, choice.get("message") or {}, model, most_tokens)
    if problem := next(_problems(reply), None):
        raise ValueError(f"{problem}: {body[:80]}")
    return reply


def choice_probabilities(reply: Reply, words: tuple[str, ...]) -> tuple[float, ...]:
    """Return the words' probabilities relative to each other.

    They are read at the first token at which an alternative fits exactly one word. ValueError if a token
    begins no word, if the probability of a word is missing, or if the reply tells no words apart.
    """
    prefix = ""  # the text before the current token
    for token, alternatives in reply.tokens:
        shares = [math.exp(logprob) for _, logprob in alternatives]
        # No other token is possible if there are fewer than were asked for, or one has no probability.
        is_whole = len(shares) < ALTERNATIVES or 0 in shares
        # In a completion two tokens of one text, a letter and its byte, are one entry.
        may_miss_one = not reply.is_chat and any(len(text) == 1 for text, _ in alternatives)
        if is_whole and sum(shares) < 1 - _rounding(alternatives) and not may_miss_one:
            raise ValueError(f"alternatives of {token[:40]!r} are missing: the others do not sum to 1")
        fits = [_fitting(prefix + text, words) for text, _ in alternatives]
        masses = [
            sum(share for share, indices in zip(shares, fits, strict=True) if indices == [i])
            for i in range(len(words))
        ]
        prefix += token
        fitting = _fitting(prefix, words) if token else []
        if not fitting:
            raise ValueError(f"{prefix[:40]!r} begins none of {words}")
        if not any(masses) or (0 in masses and len(fitting) > 1):
            continue
        # Where all words are possible, none has a probability of 0.
        if 0 in masses and (is_whole or not all(fits)):
            raise ValueError(f"the reply has no probability of {words[masses.index(0)]!r}")
        # A word behind the likeliest tokens has at most what they leave, and no more than the last of them.
        behind = max(0.0, min(1 - sum(shares), *shares))
        masses = [mass or behind for mass in masses]
        return tuple(mass / sum(masses) for mass in masses)
    raise ValueError(f"{prefix[:40]!r} tells none of {words} from the others")


def thinking_flags(thinks: bool) -> dict[str, Any]:
    """Flags of any chat template: vLLM ignores those that the template does not read."""
    return {"chat_template_kwargs": dict.fromkeys(FLAGS, thinks)}


def choice_body(request: ChoiceRequest, tokens: int, words: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a request for so many tokens, constrained to `words` and with log-probabilities if given."""
    is_chat = not isinstance(request.text, str) and not isinstance(request.text[0], int)
    body: dict[str, Any] = {"messages" if is_chat else "prompt": request.text}
    body |= {"max_tokens": tokens, "temperature": 0}
    if words:
        body |= {"structured_outputs": {"choice": list(words)}, "logprobs": True if is_chat else ALTERNATIVES}
    if words and is_chat:
        body |= {"top_logprobs": ALTERNATIVES, **thinking_flags(False)}
    return body


def obeys(reply: Reply) -> bool:
    """True if the reply has the log-probabilities of a token that begins one of the UNLIKELY words."""
    tokens = reply.tokens if reply.choice.get("logprobs") else []
    token = tokens[0][0].strip() if tokens else ""
    return bool(token) and any(word.startswith(token) for word in UNLIKELY)


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
