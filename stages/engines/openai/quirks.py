"""Differences between servers in the parameters that they accept."""

from __future__ import annotations

import logging
from typing import Any

log = logging.getLogger(__name__)


class Quirks:
    """Parameter changes that OpenAI's reasoning models need, learned from their HTTP 400 replies."""

    def __init__(self) -> None:
        self._renames_max_tokens = self._fixes_temperature = False

    def apply(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the request with the server's parameters in place of the usual ones."""
        body = dict(body)
        if self._renames_max_tokens:
            body["max_completion_tokens"] = body.pop("max_tokens")
        if self._fixes_temperature:
            del body["temperature"]
        return body

    def learn(self, refusal: str) -> None:
        """Note the parameter that a refusal names, if it is a known one."""
        if "max_completion_tokens" in refusal:
            self._renames_max_tokens = True
        elif "temperature" in refusal and not self._fixes_temperature:
            self._fixes_temperature = True
            log.warning(
                "the server accepts no temperature: its answers are sampled, and may differ next time"
            )
