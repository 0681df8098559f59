"""Example, Labelled and Sample, and the JSON Lines files that hold them."""

import gzip
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stages import escaping
from stages.errors import DataError, MissingInputError

SHOWN_PROBLEMS = 20
SHOWN_LINES = 6
"""Line numbers that are shown for one reason, at most."""
MAX_LINE_BYTES = 32 * 2**20
WIDE = {
    "UTF-32": rb"\xff\xfe\0\0|\0\0\xfe\xff",
    "UTF-16": rb"\xff\xfe|\xfe\xff",
    "UTF-16LE": rb"[^\0]\0[^\0]\0",
    "UTF-16BE": rb"\0[^\0]\0[^\0]",
}
"""Encoding of more than one byte a character → how a text in it begins, with its mark or without."""


@dataclass(frozen=True)
class Example:
    """Prompt with its reference response."""

    id: str
    prompt: str
    response: str
    """Empty if the row has none; such a row can be voted on and rewarded, but not imitated."""
    gold: str | None
    """Verifiable final answer, of the row's own or at the end of its response; None if there is none."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Other fields of the row, unchanged."""
    turns: list[list[str]] = field(default_factory=list)
    """Earlier turns of a conversation, each the user's text and the assistant's."""
    thought: str = ""
    """What the model thinks before its response, if the row says it."""

    @property
    def conversation(self) -> str:
        """The prompt, after the earlier turns if there are any: what voters are shown."""
        earlier = (f"User: {user}\n\nAssistant: {assistant}\n\n" for user, assistant in self.turns)
        return "".join(earlier) + (f"User: {self.prompt}" if self.turns else self.prompt)


@dataclass(frozen=True)
class Labelled:
    """Example with its label: one row of labels.jsonl."""

    example: Example
    system: int | None
    """1 or 2; None for undecided."""
    votes: dict[str, float | None]
    """Calibrated probability of System 2 per voter; None where the voter's answer was invalid or failed."""


OUTCOMES = ("correct", "wrong", "unparsed", "truncated", "refused")


@dataclass(frozen=True)
class Sample:
    """Graded answer: one row of samples.jsonl."""

    id: str
    sample: int
    """Index of the answer, from 0, where an item is answered several times."""
    system: int | None
    prompt: str
    """The prompt as rendered, so that it can be read and replayed."""
    output: str
    gold: str | None
    strict: str | None
    """Answer parsed in the requested format; None if the output does not have that format."""
    flexible: str | None
    """Answer parsed by the benchmark's more lenient second rule."""
    correct: bool
    """Whether `strict` is right."""
    correct_flexible: bool
    """Whether `flexible` is right."""
    outcome: str
    """One of OUTCOMES. A `refused` answer could not be graded; its item counts as neither right nor wrong."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Other fields of the item and its grade; `tokens` is the length of a generated answer."""


def data_error(kind: str, lines: list[str], hint: str | None = None) -> DataError:
    """Build one error from many problems of one kind: it counts all of them and shows the first ones."""
    number = len(lines)
    lines = _grouped(lines)
    if number == 1:
        return DataError(f"{kind}: {lines[0]}", hint)
    listing = "\n  ".join(lines[:SHOWN_PROBLEMS])
    ellipsis = f"\n  … and {len(lines) - SHOWN_PROBLEMS} more" if len(lines) > SHOWN_PROBLEMS else ""
    return DataError(f"{number} × {kind}:\n  {listing}{ellipsis}", hint)


def _grouped(lines: list[str]) -> list[str]:
    """Put lines of a file with one reason, such as `rows.jsonl:7: broken`, into one line."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        located = re.fullmatch(r"(.*?):(\d+): (.*)", line, re.DOTALL)
        file, number, reason = located.groups() if located else ("", "", line)
        by_reason.setdefault((file, reason), []).append(number)
    grouped = []
    for (file, reason), numbers in by_reason.items():
        shown = ", ".join(numbers[1:SHOWN_LINES])
        more = f" and {len(numbers) - SHOWN_LINES} more" if len(numbers) > SHOWN_LINES else ""
        also = f" (line{'s' if len(numbers) > 2 else ''} {shown}{more} as well)" if len(numbers) > 1 else ""
        grouped.append(f"{file}:{numbers[0]}: {reason}{also}" if file else reason)
    return grouped


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Read the objects of a .jsonl or .jsonl.gz file with their line numbers; blank lines are skipped.

    Lines end only at \\n, so a U+2028 inside a string does not split a line. DataError names the file and the
    number of every bad line.
    """
    start = first_bytes(path).decode("utf-8-sig", "replace").strip()
    if start and start[0] not in "{[":
        reason = f"{path} is not JSON Lines: it begins with {start!r}"
        raise DataError(reason, "if it is a table, give it a name that ends in .csv or .tsv")
    rows = parse_jsonl(_lines(path), path)
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows


def parse_jsonl(lines: Iterable[bytes], path: Path, first: int = 1) -> list[tuple[int, dict[str, Any]]]:
    """Parse JSON Lines as `read_jsonl` does, but accept an empty file. `path` is only for error messages.

    first: number of the first line.
    """
    rows: list[tuple[int, dict[str, Any]]] = []
    bad: list[str] = []
    for number, line in enumerate(lines, first):
        if not line.strip():
            continue
        try:
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"longer than {MAX_LINE_BYTES} bytes")
            row = from_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            if not isinstance(row, dict):
                raise ValueError(f"expected an object, got {type(row).__name__}")
            rows.append((number, row))
        except (ValueError, RecursionError) as error:
            bad.append(f"{path}:{number}: {error}")
    if bad:
        raise data_error("broken JSON line", bad)
    return rows


def from_json(text: str) -> Any:
    """Parse JSON; ValueError also for a field that stands twice and a number that is none, such as 1e999.

    NaN, by which pandas marks an empty cell, is None, and so is Infinity, which no JSON has.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_float=_finite, parse_constant=lambda _: None)
    except ValueError as error:  # to one about too many digits Python adds what a program would call
        raise ValueError(str(error).partition("; use ")[0]) from None


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{text} is too large for a number")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(row := dict(pairs)) < len(pairs):
        raise ValueError(f"a field stands twice among {', '.join(row)[:80]}")
    return row


def read_bytes(path: Path) -> bytes:
    """Read a whole file, gzipped or not."""
    return b"".join(_lines(path))


def first_bytes(path: Path) -> bytes:
    """Return the first line of a file that is not blank, gzipped or not, or its beginning.

    DataError if it is text in UTF-16 or UTF-32.
    """
    start = next((line for line in _lines(path) if line.strip()), b"")[:64]
    if encoding := next((name for name, form in WIDE.items() if re.match(form, start)), None):
        hint = f"iconv -f {encoding} -t UTF-8 {escaping.shell(str(path))} > NEW"
        raise DataError(f"{path} is {encoding}, and must be UTF-8", hint)
    return start


def _lines(path: Path) -> Iterator[bytes]:
    if not path.is_file():
        raise MissingInputError(f"{path} is a folder, not a file" if path.is_dir() else f"no file {path}")
    with path.open("rb") as raw:
        is_gzip = raw.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path, "rb") if is_gzip else path.open("rb") as file:
            yield from file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file: {error}") from None


def write_labels(path: Path, rows: Iterable[Labelled]) -> None:
    """Write the examples, each with its label, and without `turns` and `thought` if it has none."""
    written = []
    for row in rows:
        fields = {k: v for k, v in asdict(row.example).items() if v or k not in ("turns", "thought")}
        written.append({**fields, "system": row.system, "votes": row.votes})
    write_jsonl(path, written)


def read_labels(path: Path) -> list[Labelled]:
    rows = []
    for _, row in read_jsonl(path):
        system, votes = row.pop("system"), row.pop("votes")
        rows.append(Labelled(Example(**row), system, votes))
    return rows


def read_samples(path: Path) -> list[Sample]:
    """Read the graded answers; the list is empty for a task whose metric is not an accuracy."""
    return [Sample(**row) for _, row in parse_jsonl(_lines(path), path)]


def read_json(path: Path) -> Any:
    """Read a JSON file of an artifact, whose digest tells that its stage wrote it."""
    return json.loads(path.read_text(encoding="utf-8"))


def examples_of_system(rows: list[Labelled], system: int) -> list[Example]:
    """Return the examples labelled `system`; DataError if there is none."""
    examples = [row.example for row in rows if row.system == system]
    if not examples:
        counts = {k: sum(row.system == k for row in rows) for k in (1, 2, None)}
        raise DataError(
            f"no example is labelled System {system} "
            f"({counts[1]} System 1, {counts[2]} System 2, {counts[None]} undecided)",
            "other labels or voters; if models vote, a known share: --set classify.system2_share=0.5",
        )
    return examples


def labelled_examples(rows: list[Labelled]) -> list[Example]:
    """Return the examples with a label; DataError if there is none."""
    examples = [row.example for row in rows if row.system is not None]
    if not examples:
        raise DataError(
            f"all {len(rows)} examples are undecided",
            "other voters, or lower classify.min_agreement and classify.quorum",
        )
    return examples
