"""Finds in a vLLM server's log what it died of."""

from __future__ import annotations

import re
from pathlib import Path

SHOWN = 300
"""Characters of the error that are shown."""
PREFIX = re.compile(r"^\(\w+ pid=\d+\) ?|^(?:ERROR|CRITICAL) [\d-]+ [\d:.]+ \[[^\]]*\] ?")
"""Name of the process, then level, time and place, which stand before the lines of its log."""
ERROR = re.compile(r"^(?:[\w.]*\b\w*(?:Error|Exception)|\S+\.py: error): .*|^[\w.]*\w+Error$")
"""Last line of a traceback, or a message of its argument parser."""
NO_CAUSE = ("Engine core initialization failed", "EngineDeadError", "EngineCore encountered an issue")
"""Errors by which the API server reports that its engine ended; the engine's own stands above them."""


def last_error(log: Path) -> str:
    """Return the last error in the log with the line after it, which a validation error needs; shortened."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [PREFIX.sub("", PREFIX.sub("", line)) for line in text.splitlines()]
    errors = [i for i, line in enumerate(lines) if ERROR.match(line)]
    causes = [i for i in errors if not any(text in lines[i] for text in NO_CAUSE)] or errors
    if not causes:
        return "no error in its log"
    following = [line.strip() for line in lines[causes[-1] + 1 :][:1] if line.startswith("  ")]
    return " ".join([lines[causes[-1]], *following])[:SHOWN]
