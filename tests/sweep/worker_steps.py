"""What workers of tests do, in a file that their processes import quickly."""

import os
import time
from pathlib import Path


def begin(device: str | None) -> None: ...


def touch(config, step, command, log, score=None):
    """Make the file. score: the exit code of that step, or the signal that ends it, in place of its file."""
    if command[0] == "score" and score is not None:
        if score < 0:
            os.kill(os.getpid(), -score)
        return score
    Path(command[1]).touch()
    return 0


def wait_for_long(config, step, command, log):
    log.write_text("waits")
    time.sleep(600)
