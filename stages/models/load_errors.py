"""What can be wrong with a model's files, said in one sentence that names the model."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.config import ModelSection
from stages.errors import DataError, LoraparError, MissingInputError, first_line, lacks_memory, panicked

FULL = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)
"""Errors of this machine, not of the files."""
CHANGED = "the folder may be incomplete or of another kind: compare it with where it came from"


@contextmanager
def load_errors(what: str, model: ModelSection) -> Iterator[None]:
    """Turn whatever a library raises within into a sentence: MissingInputError or DataError."""
    if not Path(model.name).exists() and not model.of_hub:
        raise MissingInputError(f"no model folder {model.name}", "a hub id is NAME or OWNER/NAME")
    try:
        yield
    except LoraparError:
        raise
    except BaseException as error:
        if not (isinstance(error, Exception) or panicked(error)):
            raise
        if lacks_memory(error) or (isinstance(error, OSError) and error.errno in FULL):
            raise
        if isinstance(error, OSError | ImportError | ValueError):
            path = Path(model.name)
            near = not path.exists() and "/" in model.name and path.parent.is_dir()
            also = f"no folder {path}, and " if near else ""
            raise MissingInputError(f"{also}cannot load {what} {model.name}: {_first(error)}") from None
        raise DataError(
            f"cannot load {what} {model.name}: {type(error).__name__}: {_first(error)}", CHANGED
        ) from None


def config_of(model: ModelSection) -> Any:
    """The config of the model, of transformers' class for it."""
    from transformers import AutoConfig

    with load_errors("model", model):
        return AutoConfig.from_pretrained(model.name, revision=model.revision)


def positions(config: Any) -> int | None:
    """Tokens that a model of this config can read; None if it does not say, or stretches its positions."""
    of_text = config.get_text_config()
    rope = getattr(of_text, "rope_parameters", None) or getattr(of_text, "rope_scaling", None) or {}
    if rope.get("rope_type", "default") != "default":
        return None
    found = getattr(of_text, "max_position_embeddings", None)
    return int(found) if found else None


def check_no_missing_weights(model: ModelSection, missing: Iterable[str]) -> None:
    """DataError if parameters of the model have no weights in its files: they would be random."""
    names = sorted(missing)
    if names:
        number = "1 parameter" if len(names) == 1 else f"{len(names)} parameters"
        raise DataError(f"model {model.name} has no weights for {number}, such as {names[0]}", CHANGED)


def _first(error: BaseException) -> str:
    if "ignore_mismatched_sizes" in str(error):  # the library's advice is to take random weights
        return "its weights have other shapes than its config says"
    return first_line(error)
