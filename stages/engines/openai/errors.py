"""What can go wrong with a request to a server, and how long the server asks to be left alone."""

from __future__ import annotations

import time
from email.utils import parsedate_to_datetime

from stages.engines import Failure
from stages.errors import ConfigError


class RetryableError(Exception):
    """A failure that may pass: worth another try."""

    def __init__(self, reason: str, detail: str, busy: bool = False) -> None:
        """busy: it says nothing of what the server can do, only that it did not do it now."""
        super().__init__(detail)
        self.reason, self.busy = reason, busy


class RequestRefused(ConfigError):
    """The server refuses what every request asks for."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class ItemFailed(Exception):
    """One item cannot be answered; the others can."""

    def __init__(self, reason: str, detail: str, busy: bool = False) -> None:
        """busy: as in Trouble."""
        super().__init__(detail)
        self.busy = busy
        self.failure = Failure(reason, detail)


def seconds_of(retry_after: str) -> float:
    """Retry-After in either of its forms, as seconds from now; 0 if there is none."""
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
