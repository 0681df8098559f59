"""A page of sections with text, tables and figures: one HTML file that needs no network and no script.

The files of a report are written all or none, over earlier ones and over nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from stages import escaping
from stages.errors import OutputError
from stages.store.whole_files import whole_files

MARKS = {
    ".html": '<meta name="generator" content="lorapar">',
    ".csv": "row,column,paper,mean,items,",
}
"""What a file of a report has at its start; another one of its name has not."""


@dataclass(frozen=True)
class Text:
    """A paragraph, or by its tag a heading (`h3`) or a command (`pre`)."""

    text: str
    tag: Literal["p", "h3", "pre"] = "p"
    quiet: bool = False
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Grid:
    """A table of texts, whose lines are parted by line feeds; the first cell of each row is its header.

    The template writes it as HTML; `lorapar_cli.terminal` draws it for the terminal.
    """

    head: list[str]
    rows: list[list[str]]
    caption: str = ""
    kind: ClassVar[str] = "table"

    def markdown(self) -> str:
        """Write the table without its caption; lines of a cell are parted by semicolons."""
        lines = [self.head, *self.rows]
        cells = [[escaping.markdown(cell.replace("\n", "; ")) for cell in line] for line in lines]
        cells.insert(1, ["---"] * len(self.head))
        return "\n".join(f"| {' | '.join(line)} |" for line in cells)


@dataclass(frozen=True)
class Picture:
    svg: str
    """SVG made by `figures.svg`: the only text that goes into the page unescaped."""
    text: str
    """Alternative text, for readers who cannot see the figure."""
    caption: str = ""
    kind: ClassVar[str] = "figure"


Block = Text | Grid | Picture
Tiles = list[tuple[str, str, str]]
"""Figures to see first, side by side: title, figure and what belongs to it, of each."""


@dataclass(frozen=True)
class PageSection:
    id: str
    title: str
    blocks: list[Block]


def render(title: str, lead: Sequence[str | Tiles], sections: list[PageSection]) -> str:
    """Render the page as HTML, without empty sections.

    Every text is escaped, because questions and answers are not trusted.
    """
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    filled = [section for section in sections if section.blocks]
    return environment.get_template("page.html.j2").render(title=title, lead=lead, sections=filled)


def write(texts: dict[Path, str]) -> None:
    """Write each text to its file; OutputError if one of them exists, and is not of an earlier report."""
    for file in filter(Path.exists, texts):
        if not (file.is_file() and MARKS[file.suffix].encode() in file.read_bytes()[:400]):
            raise OutputError(f"{file} exists already, and is not of a report", "another folder: --out DIR")
    with whole_files(list(texts), replace=True) as drafts:
        for draft, text in zip(drafts, texts.values(), strict=True):
            draft.write_text(text, encoding="utf-8")
