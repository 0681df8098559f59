"""Which model replies: the one that was asked for, under a name that the servers may change."""

from __future__ import annotations

import re
from typing import Any

from stages.engines.openai.replies import Reply, ReplyChoice, ServedModel, parse_models
from stages.engines.openai.session import RequestRefused
from stages.engines.openai.transport import Transport
from stages.errors import AnswerError, ConfigError


class Identity:
    """The name of a served model, and the names of others, which must not reply in its place."""

    def __init__(self, transport: Transport, model: str | None) -> None:
        """model: its name; None for the first one that the servers list."""
        self._reply_name: str | None = None
        """The model's name in replies, learned from the first one."""
        self._listed: dict[str, ServedModel] = {}
        """The models that the servers list, by name."""
        self.model, self.max_model_len = self._find(transport, model)

    def choice_of(self, reply: Any) -> ReplyChoice:
        """Return the only choice of a reply; ValueError if another model gave it.

        A gateway may give the model another name than it was requested by. Such a name is accepted if the
        first reply has it, and if the server does not list it as another model.
        """
        parsed = Reply.model_validate(reply)
        if self._reply_name is None and parsed.model is not None:
            self._reply_name = parsed.model if self._is_alias(parsed.model) else self.model
        if parsed.model not in (None, self.model, self._reply_name):
            raise ValueError(f"the reply is by {str(parsed.model)[:80]}, not by {self.model}")
        return parsed.choices[0]

    def _find(self, transport: Transport, name: str | None) -> tuple[str, int]:
        """Return the model's name and context length (0 if unknown); without a name, the first one listed.

        ConfigError unless every server serves it.
        """
        names, lengths = [], []
        for server in transport.per_server():
            listed = _list_models(server, name)
            if name is not None and listed and not any(model.serves(name) for model in listed.values()):
                raise ConfigError(f"{server.urls[0]} serves {', '.join(listed)}, not {name}")
            if name is None and not listed:
                raise AnswerError(f"{server.urls[0]} lists no model")
            self._listed |= listed
            names.append(name or next(iter(listed)))
            lengths.append(listed[names[-1]].max_model_len if names[-1] in listed else 0)
        return names[0], min(lengths)

    def _is_alias(self, name: str) -> bool:
        """True if a reply by `name` may be the model's: if it is not listed, or listed as the same model.

        A reply to an alias has its dated version; for a model of several names vLLM replies with the first.
        """
        replying, requested = self._listed.get(name), self._listed.get(self.model)
        if replying is None or re.fullmatch(rf"{re.escape(self.model)}-\d[\d-]*", name):
            return True
        return requested is not None and requested.root is not None and requested.root == replying.root


def _list_models(server: Transport, name: str | None) -> dict[str, ServedModel]:
    """Return the models that a server lists; none if it has no list and the model's name is known."""
    try:
        return server.call(lambda session, _: session.send("models", None, parse_models), None)
    except RequestRefused as error:
        if name is None or error.code not in (404, 405):
            raise
        return {}
