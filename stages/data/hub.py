"""Resolves a revision on the hub to a commit."""

import functools
import re
from contextlib import suppress
from pathlib import Path

from stages.errors import HUB_HINT, MissingInputError, first_line
from stages.runtime.libraries import offline_without_network


@functools.cache
def resolve_commit(kind: str, name: str, revision: str) -> str:
    """Return the commit hash that a revision of a model or data set (`kind`: model, dataset) stands for.

    Without a network it is the commit that was downloaded last; MissingInputError if there is none.
    """
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    offline_without_network()
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    try:
        return str(HfApi().repo_info(name, repo_type=kind, revision=revision).sha)
    except Exception as error:  # offline, unknown, gated: many classes of error, one remedy
        with suppress(ValueError, OSError):  # not a valid hub id, or nothing downloaded
            folder = repo_folder_name(repo_id=name, repo_type=kind)
            reference = Path(constants.HF_HUB_CACHE) / folder / "refs" / revision
            return reference.read_text(encoding="utf-8").strip()
        # What the hub says of a request is below the HTTP status, such as `403 Client Error`.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if "Client Error" not in line), first_line(error))
        raise MissingInputError(
            f"no local folder {name!r}, and cannot get the {kind} from the hub: {reason}", HUB_HINT
        ) from None
