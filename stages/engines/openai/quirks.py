"""How a server wants to be asked, where that is not as all others do."""

from __future__ import annotations

import logging
from typing import Any

log = logging.getLogger(__name__)


class Quirks:
    """What OpenAI's reasoning models want otherwise, learned from their refusals."""

    def __init__(self) -> None:
        self._renamed = self._drawn = False

    def put(self, body: dict[str, Any]) -> dict[str, Any]:
        """The request in the server's words."""
        body = dict(body)
        if self._renamed:
            body["max_completion_tokens"] = body.pop("max_tokens")
        if self._drawn:
            del body["temperature"]
        return body

    def learn(self, refusal: str) -> None:
        """From a refusal that names what it wants otherwise."""
        if "max_completion_tokens" in refusal:
            self._renamed = True
        elif "temperature" in refusal and not self._drawn:
            self._drawn = True
            log.warning("the server takes no temperature: its answers are drawn, and may differ next time")
