"""A page: sections of text, tables and figures, in one file that needs no network and no script."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar


@dataclass(frozen=True)
class Text:
    text: str
    quiet: bool = False
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Grid:
    """A table; the first cell of each row is its name."""

    head: list[str]
    rows: list[list[str]]
    caption: str = ""
    prose: bool = False
    """Cells are texts, not numbers: they stand to the left and may take several lines."""
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Picture:
    svg: str
    """Made by `figures.svg`; the only text that is put into the page as it is."""
    text: str
    """What it shows, for those who do not see it."""
    caption: str = ""


@dataclass(frozen=True)
class Pictures:
    figures: list[Picture]
    kind: ClassVar[str] = "figures"


@dataclass(frozen=True)
class Command:
    text: str
    kind: ClassVar[str] = "command"


@dataclass(frozen=True)
class ComparedItem:
    """One item that two targets answered unlike."""

    how: str
    """won or lost"""
    label: str
    question: str
    gold: str
    first: str
    before: str
    second: str
    after: str


@dataclass(frozen=True)
class Items:
    items: list[ComparedItem]
    kind: ClassVar[str] = "items"


@dataclass(frozen=True)
class Heading:
    text: str
    kind: ClassVar[str] = "heading"


@dataclass(frozen=True)
class Details:
    """Parts that a reader opens."""

    summary: str
    parts: list[Part]
    kind: ClassVar[str] = "details"


Part = Text | Grid | Pictures | Command | Items | Heading | Details


@dataclass(frozen=True)
class PageSection:
    id: str
    title: str
    parts: list[Part] = field(default_factory=list)


def render(title: str, lead: list[str], sections: list[PageSection]) -> str:
    """The page as HTML. All texts are escaped: questions and answers are not trusted."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    shown = [section for section in sections if section.parts]
    return environment.get_template("page.html.j2").render(title=title, lead=lead, sections=shown)
