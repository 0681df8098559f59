"""Writes the files of a report: all of them or none, over earlier ones and over nothing else."""

from collections.abc import Iterable
from pathlib import Path

from stages.errors import OutputError
from stages.store.whole_files import whole_files

MARKS = {
    ".html": '<meta name="generator" content="lorapar">',
    ".md": "<!-- lorapar report -->",
    ".tex": "% lorapar report",
    ".csv": "row,column,mean,low,high,",
}
"""What a file of a report has at its start; another one of its name has not."""


def refuse_others(files: Iterable[Path]) -> None:
    """Raise OutputError if one of the files exists, and is not of an earlier report."""
    for file in files:
        if file.exists() and not (file.is_file() and _is_marked(file)):
            raise OutputError(f"{file} exists already, and is not of a report", "another folder: --out DIR")


def _is_marked(file: Path) -> bool:
    with file.open(encoding="utf-8", errors="replace") as start:
        return MARKS[file.suffix] in start.read(400)


def write(texts: dict[Path, str]) -> None:
    """Write each text to its file; text and LaTeX get their mark here."""
    with whole_files(list(texts), replace=True) as drafts:
        for draft, text in zip(drafts, texts.values(), strict=True):
            head = f"{MARKS[draft.suffix]}\n" if draft.suffix in (".md", ".tex") else ""
            draft.write_text(head + text, encoding="utf-8")
