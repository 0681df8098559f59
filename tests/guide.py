"""README and the guide as text: their pages, fenced blocks, commands and links."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "docs/reference/from-trl.md"]
"""What a person reads to do something; tutorial first, for later pages use what it makes."""
PAGES.sort(key=lambda page: (page.name != "tutorial.md", page.name))
_FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]*)\")?\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    title: str
    text: str


def blocks(*languages: str) -> list[Block]:
    return [
        Block(page.name, language, title, text)
        for page in PAGES
        for language, title, text in _FENCE.findall(page.read_text(encoding="utf-8"))
        if language in languages
    ]


def own_reward() -> str:
    """The file with a reward of one's own that the guide shows."""
    [text] = [block.text for block in blocks("python") if "def short(" in block.text]
    return text


def commands() -> list[tuple[str, str, str]]:
    """Page, title of the block, and each command in it, continued lines joined and comments cut."""
    found = []
    for block in blocks("sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            if command := re.sub(r"\s+#.*", "", line).strip():
                found.append((block.page, block.title, command))
    return found


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
