"""The version of lorapar, with the commit of a clone."""

import subprocess
from importlib.metadata import version
from pathlib import Path


def own_version() -> str:
    """Return such as `0.1.0 (commit 1a2b3c4, changed)`; of a wheel the number alone."""
    clone = Path(__file__).parent.parent
    if not (clone / ".git").exists():
        return version("lorapar")
    command = ["git", "-C", str(clone), "describe", "--always", "--dirty=, changed", "--exclude=*"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or a clone that another user owns
        return version("lorapar")
    return f"{version('lorapar')} (commit {commit})"
