"""Reads a source of rows, a file or a hub data set, into Examples.

`files.py` reads files, and `formats.py` knows the fields of a row. Any row may have a field `gold`, its
verifiable answer. If it has none, the answer is read from `#### answer` in the response. A row with such an
answer, or with a test, may have no response. Where no response has more than its answer, that one counts.
"""

import functools
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from stages.config import BenchmarkSection, SourceSection
from stages.data import formats
from stages.data.files import SUFFIXES, numbered, read_file
from stages.data.formats import EmptyRowError
from stages.data.hub import resolve_commit
from stages.errors import HUB_HINT, ConfigError, DataError, MissingInputError, first_line, sought
from stages.prompts.answers import is_answer
from stages.records import Example, data_error
from stages.runtime.libraries import offline_without_network

log = logging.getLogger(__name__)
_say_once = functools.cache(log.info)
"""Logs once in a process, however often its stages read the rows."""

MAX_CHARACTERS = 1_000_000
"""Longest prompt and response together: some tokenizers abort the process on texts of tens of megabytes."""
PASSAGES = ("context", "input", "passage", "body", "paragraph", "document", "story", "choices", "options")
"""Fields without which people's questions often cannot be answered."""

HALF = re.compile(r"[\ud800-\udfff]")
"""Half of a surrogate pair, as which a byte that is no UTF-8 is read, too."""


@dataclass(frozen=True)
class Rows:
    """The examples of a source, and how many rows were left out."""

    examples: list[Example]
    format: str
    empty: int
    """Number of rows without a prompt or a response, which are left out."""
    repeated: int
    """Number of rows with the same prompt and response as an earlier one, which are left out."""


def read(source: SourceSection) -> list[Example]:
    """Return all examples of a source in order, with ids made from their content.

    DataError lists every bad row.
    """
    return read_rows(source).examples


def read_rows(source: SourceSection) -> Rows:
    """Read like `read`, and also return the format and how many rows were left out."""
    rows, where = raw_rows(source), str(source.path)
    title = where if local_file(source) is None else Path(where).name  # a draft has its folder
    keeps = source.empty == "keep"
    kind = source.format if source.format != "auto" else formats.detect(where, rows[0][1], keeps)
    _say_once(f"{title}: {len(rows)} rows, {formats.NAMES[kind]}")
    needs = f"each row needs {' and '.join(formats.FIELDS[kind])}"
    located, empty = parse_rows(source, lambda row, _: formats.example(kind, row, keeps), needs, rows)
    examples = drop_duplicates(located, source)
    if all(example.gold is not None or is_answer(example.response) for example in examples):
        examples = [replace(e, gold=e.response.strip()) if e.gold is None else e for e in examples]
    if unseen := set().union(*map(_unseen, examples)):
        log.warning(
            "%s: no model sees %s: write what a question needs into it", title, ", ".join(sorted(unseen))
        )
    if unanswered := sum(not example.response for example in examples):
        log.info("%s: %d rows have no response: score and SFT leave them out", title, unanswered)
    return Rows(examples, formats.NAMES[kind], empty, len(located) - len(examples))


def parse_rows(
    source: SourceSection,
    parse: Callable[[dict[str, Any], int], Example],
    needs: str,
    rows: list[tuple[int, dict[str, Any]]] | None = None,
) -> tuple[list[tuple[str, Example]], int]:
    """Parse every row of a source; return the examples with their locations, and the number of empty rows.

    parse: makes an example from a row and its number; raises EmptyRowError for an empty one.
    needs: hint of the DataError that lists all bad rows. rows: the rows of the source, if already read.
    """
    located: list[tuple[str, Example]] = []
    bad: list[str] = []
    empty = 0
    for number, row in raw_rows(source) if rows is None else rows:
        location = f"{source.path}:{number}"
        try:
            example = parse(row, number)
            length = sum(map(len, (example.prompt, example.response, *chain(*example.turns))))
            if length > MAX_CHARACTERS:
                raise ValueError(f"a text of {length:,} characters, more than {MAX_CHARACTERS:,}")
            located.append((location, example))
        except EmptyRowError as error:
            if source.empty == "error":
                bad.append(f"{location}: {error}")
            empty += 1
        except KeyError as error:
            bad.append(f"{location}: field {error.args[0]} is missing")
        except (ValueError, TypeError, SyntaxError) as error:
            bad.append(f"{location}: {error}")
    if bad:
        raise data_error("bad row", bad, f"{needs}; empty: drop leaves out empty ones" if empty else needs)
    if empty:
        log.info("%s: %d rows with nothing to ask or to answer left out", source.path, empty)
    return located, empty


def drop_duplicates(located: list[tuple[str, Example]], source: SourceSection) -> list[Example]:
    """Return the examples without those whose id has occurred already.

    located: examples with their locations. DataError instead if `source.duplicates` is `error`.
    """
    first: dict[str, tuple[str, Example]] = {}
    repeated = []
    for location, example in located:
        if example.id in first:
            repeated.append(f"{location} repeats {first[example.id][0]}")
        first.setdefault(example.id, (location, example))
    if repeated and source.duplicates == "error":
        raise data_error("duplicate id", repeated, "take the first of each: duplicates: first")
    if repeated:
        _say_once("%s: %d repeated rows left out", source.path, len(repeated))
    return [example for _, example in first.values()]


def raw_rows(source: SourceSection) -> list[tuple[int, dict[str, Any]]]:
    """Return the first `limit` rows of a source, each with its number (counted from 1).

    Rows are unchanged, except that values of a hub data set that JSON cannot represent, such as dates, become
    strings. DataError lists every row that cannot be written to a file as UTF-8.
    """
    file = local_file(source)
    rows = read_file(file)[: source.limit] if file else _hub_rows(source)
    if broken := [
        f"{source.path}:{number}: field {name} has bytes that are no UTF-8, or half of a surrogate pair"
        for number, row in rows
        for name, value in row.items()
        if HALF.search(json.dumps([name, value], ensure_ascii=False))
    ]:
        raise data_error("bad row", broken, "leave out what is no text, such as an image")
    return rows


def _hub_rows(source: SourceSection) -> list[tuple[int, dict[str, Any]]]:
    assert source.path is not None
    offline_without_network()
    import datasets

    try:
        loaded = datasets.load_dataset(
            source.path, source.subset, split=source.split, revision=source.revision
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = first_line(error)
        # Other classes are about its parts: a split or a subset that is not there.
        hint = HUB_HINT if isinstance(error, OSError) else None
        raise MissingInputError(f"no file and no hub data set {source.path!r}: {reason}", hint) from None
    _check_commit(source, loaded)
    if not len(loaded):
        raise DataError(f"{source.path} has no rows in {source.split}")
    return numbered(islice(loaded, source.limit))


def _check_commit(source: SourceSection, loaded: Any) -> None:
    """Raise MissingInputError if the loaded rows are of another commit than `source.revision`.

    Offline, `datasets` loads whatever it downloaded last, whatever the revision.
    """
    folders = {Path(file["filename"]).parent.name for file in loaded.cache_files}  # named after the commit
    commits = {name for name in folders if re.fullmatch(r"[0-9a-f]{40}", name)}
    if commits and commits != {resolve_commit("dataset", str(source.path), source.revision)}:
        raise MissingInputError(
            f"the local copy of {source.path} is commit {', '.join(sorted(commits))}, not {source.revision}",
            "run once with a network, or set the revision to that commit",
        )


def _unseen(example: Example) -> set[str]:
    """Return the fields, PASSAGES or single choices, with a text or texts that are not in the prompt."""
    unseen = set()
    for name, value in example.extra.items():
        if name.casefold() in PASSAGES or formats.CHOICE.fullmatch(name):
            texts = value if isinstance(value, list) else [value]
            if any(isinstance(text, str) and text.strip() not in example.prompt for text in texts):
                unseen.add(name)
    return unseen


def local_file(source: SourceSection) -> Path | None:
    """Return the file that a source names, None if its path may be a hub id; MissingInputError otherwise."""
    if source.path is None:
        raise missing_path_error()
    path = Path(source.path)
    if path.is_file():
        return path
    owner, *rest = source.path.split("/")
    is_local = path.exists() or Path(owner).is_dir()
    if len(rest) != 1 or is_local or path.name.lower().endswith(SUFFIXES):  # else it may be OWNER/NAME
        if path.is_dir():
            raise MissingInputError(f"{path} is a folder, not a file")
        hint = "lorapar demo-data data/demo writes it" if path.parent == Path("data/demo") else None
        raise MissingInputError(f"no data file {sought(path)}", hint)
    return None


def missing_path_error(hint: str = "--set data.path=FILE, or a hub id") -> ConfigError:
    return ConfigError("data.path is not set", hint)


def shots_source(benchmark: BenchmarkSection) -> SourceSection:
    """Return the source of a benchmark's worked examples; ConfigError if it is the source of the items."""
    path = benchmark.shots_path or benchmark.path
    if path == benchmark.path and (benchmark.shots_split == benchmark.split or Path(path or "").exists()):
        raise ConfigError(
            f"shots of {benchmark.kind} would be rows that are asked, too: set shots_path",
            "or shots: 0; for a hub data set another shots_split will do",
        )
    return SourceSection(
        path=path, subset=benchmark.subset, split=benchmark.shots_split, revision=benchmark.revision
    )
