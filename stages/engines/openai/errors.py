"""Errors of a request to a server, and the wait that a server asks for by Retry-After."""

from __future__ import annotations

import time
from email.utils import parsedate_to_datetime

from stages.engines import Failure
from stages.errors import ConfigError


class RetryableError(Exception):
    """A failure that may pass: worth another try."""

    def __init__(self, reason: str, detail: str, busy: bool = False) -> None:
        """busy: a timeout or overload, which is no evidence that the server lacks a feature."""
        super().__init__(detail)
        self.reason, self.busy = reason, busy


class RequestRefused(ConfigError):
    """The server refuses something that every request contains, such as the key or the path."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class ItemFailed(Exception):
    """One item cannot be answered; the others can."""

    def __init__(self, reason: str, detail: str, busy: bool = False) -> None:
        """busy: as in RetryableError."""
        super().__init__(detail)
        self.busy = busy
        self.failure = Failure(reason, detail)


def retry_after_seconds(header: str) -> float:
    """Parse Retry-After (seconds or an HTTP date) into seconds from now; 0 if it is neither."""
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
