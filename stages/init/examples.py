"""The example configs and tables that come with lorapar, copied with the files that they refer to."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.config.yaml import read_yaml
from stages.errors import ConfigError, OutputError
from stages.store.artifacts import refuse_store
from stages.store.whole_files import whole_files

HERE = Path(__file__).resolve().parent
FOLDER = next(folder for folder in (HERE / "configs", HERE.parents[1] / "configs") if folder.is_dir())
"""The configs: in a wheel beside this file (see `setup.py`), else `configs/` of the repository."""


def names() -> list[str]:
    """The paths below FOLDER without `.yaml`, those at its top first."""
    paths = [path.relative_to(FOLDER).with_suffix("") for path in FOLDER.rglob("*.yaml")]
    return [str(path) for path in sorted(paths, key=lambda path: (len(path.parts) > 1, path))]


def describe() -> dict[str, str]:
    """Map each name to the first sentence of its file's comment."""
    comments = {
        name: " ".join(re.findall(r"^# (.*)$", _text(FOLDER / f"{name}.yaml"), re.M)) for name in names()
    }
    # Where it goes on with commands, these begin after two blanks.
    return {name: re.split(r"(?<=\.) |:?  ", comment)[0] for name, comment in comments.items()}


def write(name: str, out: Path | None) -> list[Path]:
    """Copy the example to `out`, or to its name below the current folder; returns the files it consists of.

    Files that it refers to are written to their own names below the current folder, so that the references
    hold; such an example cannot have another name. Comments name files as they are there. A file that
    exists with the same text stays; OutputError if one has another text.
    """
    if name not in names():
        raise ConfigError(f"no example {name!r}", "their names: lorapar list examples")
    sources = list(_with_references(FOLDER / f"{name}.yaml"))
    if out and len(sources) > 1:
        raise OutputError(f"--out {out}: {name} refers to other files, so it keeps its name", "without --out")
    texts = {out or source.relative_to(FOLDER): _text(source) for source in sources}
    for path in texts:
        refuse_store(path)
    with whole_files(list(texts), "another name: --out FILE, or another folder") as drafts:
        for draft, text in zip(drafts, texts.values(), strict=True):
            draft.write_text(text, encoding="utf-8")
    return list(texts)


def _with_references(source: Path) -> Iterator[Path]:
    """Yield a file, and every file that it `extends` or that it, or a row of it, has as `base`."""
    yield source
    settings: dict[str, Any] = read_yaml(source, str(source))
    rows = settings.get("rows", {}).values()
    for reference in (settings.get("extends"), *(section.get("base") for section in (settings, *rows))):
        if reference:
            yield from _with_references((source.parent / reference).resolve())


def _text(source: Path) -> str:
    """The text of a copy: without the link to the repository's schema and `configs/` before file names."""
    text = source.read_text(encoding="utf-8")
    return re.sub(r"^# yaml-language-server: .*\n", "", text).replace("configs/", "")
