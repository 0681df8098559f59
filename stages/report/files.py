"""Writes the files of a report: all of them or none, over earlier ones and over nothing else."""

from collections.abc import Iterable
from pathlib import Path

from stages.errors import OutputError
from stages.store.whole_files import whole_files

MARKS = {
    ".html": '<meta name="generator" content="lorapar">',
    ".csv": "row,column,paper,mean,items,",
}
"""What a file of a report has at its start; another one of its name has not."""


def refuse_others(files: Iterable[Path]) -> None:
    """Raise OutputError if one of the files exists, and is not of an earlier report."""
    for file in filter(Path.exists, files):
        if not (file.is_file() and MARKS[file.suffix].encode() in file.read_bytes()[:400]):
            raise OutputError(f"{file} exists already, and is not of a report", "another folder: --out DIR")


def write(texts: dict[Path, str]) -> None:
    """Write each text to its file."""
    with whole_files(list(texts), replace=True) as drafts:
        for draft, text in zip(drafts, texts.values(), strict=True):
            draft.write_text(text, encoding="utf-8")
