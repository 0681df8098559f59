"""Which commit a revision of the hub stands for."""

from __future__ import annotations

import functools
import re
from contextlib import suppress
from pathlib import Path

from stages.errors import MissingInputError, first_line


@functools.cache
def commit(kind: str, name: str, revision: str) -> str:
    """kind: model or dataset. Without a network the commit that was fetched last; else MissingInputError."""
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    try:
        return str(HfApi().repo_info(name, repo_type=kind, revision=revision).sha)
    except Exception as error:  # offline, unknown, gated: each its own class, one meaning here
        with suppress(ValueError, OSError):  # a name that can be none of the hub's
            folder = repo_folder_name(repo_id=name, repo_type=kind)
            reference = Path(constants.HF_HUB_CACHE) / folder / "refs" / revision
            return reference.read_text(encoding="utf-8").strip()
        reason = first_line(error)
        raise MissingInputError(f"no local folder and no hub {kind} {name!r} ({reason})") from None
