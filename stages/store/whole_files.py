"""Writes files that people keep: whole or not at all, and never over others of their name."""

import filecmp
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from stages.errors import OutputError


@contextmanager
def whole_files(files: Sequence[Path], hint: str = "", replace: bool = False) -> Iterator[list[Path]]:
    """Yield a draft of each file, which gets the file's name when all are written, in the same order.

    OutputError with `hint` if one of the files exists with other content, unless `replace`.
    """
    with ExitStack() as unfinished:
        drafts = []
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            folder = unfinished.enter_context(TemporaryDirectory(prefix=".", dir=file.parent))
            drafts.append(Path(folder, file.name))
        yield drafts
        pairs = list(zip(drafts, files, strict=True))
        for draft, file in pairs:
            if not replace and file.exists() and not filecmp.cmp(draft, file, shallow=False):
                raise OutputError(f"{file} exists already, with other content", hint)
        for draft, file in pairs:
            draft.replace(file)
