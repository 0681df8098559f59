"""Where rows come from: a source, which is a file or a hub data set, is read into Examples.

Formats: gsm8k (`question`, `answer`), alpaca and Dolly (`instruction`, `input` or `context`, `output` or
`response`), `messages`, and `prompt` with `completion`. Any row may have a field `gold`, its verifiable
answer. If it has none, the answer is read from `#### answer` in the response.
"""

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.config import BenchmarkSection, SourceSection
from stages.data.hub import commit
from stages.errors import ConfigError, DataError, MissingInputError, first_line
from stages.prompts.answers import gold_of
from stages.records import Example, problems, read_jsonl
from stages.store.digests import id_of

log = logging.getLogger(__name__)

FIELDS = {
    "gsm8k": ("question", "answer"),
    "alpaca": ("instruction", "output"),
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
}
SYNONYMS = {"context": "input", "response": "output"}  # Dolly's names for the fields of alpaca


@dataclass(frozen=True)
class Rows:
    """What a source holds."""

    examples: list[Example]
    format: str
    empty: int
    """Rows without a prompt or a response, left out."""
    repeated: int
    """Rows with the prompt and the response of one before, left out."""


def read(source: SourceSection) -> list[Example]:
    """All examples of a source in order, with ids made from their content; DataError lists every bad row."""
    return read_rows(source).examples


def read_rows(source: SourceSection) -> Rows:
    """The same, and how many rows were left out."""
    rows, where = table(source), str(source.path)
    kind = source.format if source.format != "auto" else _detect(where, rows[0][1])
    log.info("%s: %d rows, format %s", where, len(rows), kind)
    needs = f"format {kind} needs {', '.join(FIELDS[kind])}"
    found, empty = each(source, lambda row, _: _example(kind, row), needs, rows)
    examples = once(found, source)
    return Rows(examples, kind, empty, len(found) - len(examples))


def each(
    source: SourceSection,
    of: Callable[[dict[str, Any], int], Example],
    needs: str,
    rows: list[tuple[int, dict[str, Any]]] | None = None,
) -> tuple[list[tuple[str, Example]], int]:
    """The example of each row with the row's place, and how many empty rows were left out.

    of: makes it from a row and its number; Empty if there is nothing to ask or to answer. needs: what the
    DataError, which lists every bad row, says that they lack. rows: those of the source, if they are read.
    """
    found: list[tuple[str, Example]] = []
    bad: list[str] = []
    empty = 0
    for number, row in table(source) if rows is None else rows:
        place = f"{source.path}:{number}"
        try:
            found.append((place, of(row, number)))
        except Empty as error:
            if source.empty == "error":
                bad.append(f"{place}: {error}")
            empty += 1
        except KeyError as error:
            bad.append(f"{place}: field {error.args[0]} is missing")
        except (ValueError, TypeError, SyntaxError) as error:
            bad.append(f"{place}: {error}")
    if bad:
        raise problems("bad row", bad, f"{needs}; empty: drop leaves out empty ones" if empty else needs)
    if empty:
        log.info("%s: %d rows with nothing to ask or to answer left out", source.path, empty)
    return found, empty


def once(found: list[tuple[str, Example]], source: SourceSection) -> list[Example]:
    """The examples, each with its place, without those whose id was there before.

    DataError instead if `source.duplicates` says so.
    """
    first: dict[str, tuple[str, Example]] = {}
    repeated = []
    for place, example in found:
        if example.id in first:
            repeated.append(f"{place} repeats {first[example.id][0]}")
        first.setdefault(example.id, (place, example))
    if repeated and source.duplicates == "error":
        raise problems("duplicate id", repeated, "take the first of each: duplicates: first")
    if repeated:
        log.info("%s: %d repeated rows left out", source.path, len(repeated))
    return [example for _, example in first.values()]


def table(source: SourceSection) -> list[tuple[int, dict[str, Any]]]:
    """The first `limit` rows of a source, each with its number.

    Rows are as they stand there, but for values of a hub data set that JSON has not: dates become texts.
    DataError lists every row with half of a surrogate pair, which no file could hold.
    """
    file = local_file(source)
    rows = read_jsonl(file)[: source.limit] if file else _of_hub(source)
    broken = [
        f"{source.path}:{number}: field {name} has half of a surrogate pair"
        for number, row in rows
        if not encodes(row)
        for name, value in row.items()
        if not encodes([name, value])
    ]
    if broken:
        raise problems("bad row", broken)
    return rows


def _of_hub(source: SourceSection) -> list[tuple[int, dict[str, Any]]]:
    assert source.path is not None
    import datasets

    try:
        loaded = datasets.load_dataset(
            source.path, source.subset, split=source.split, revision=source.revision
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = first_line(error)
        raise MissingInputError(f"no file and no hub data set {source.path!r}: {reason}") from None
    _of_commit(source, loaded)
    if not len(loaded):
        raise DataError(f"{source.path} has no rows in {source.split}")
    return [
        (number, json.loads(json.dumps(row, default=str)))
        for number, row in zip(range(1, (source.limit or len(loaded)) + 1), loaded, strict=False)
    ]


def _of_commit(source: SourceSection, loaded: Any) -> None:
    """MissingInputError if the rows are of another commit: offline the library takes whatever it had last."""
    folders = {Path(file["filename"]).parent.name for file in loaded.cache_files}  # named by the commit
    found = {name for name in folders if re.fullmatch(r"[0-9a-f]{40}", name)}
    if found and found != {commit("dataset", str(source.path), source.revision)}:
        raise MissingInputError(
            f"{source.path} is here as of {', '.join(sorted(found))}, not of revision {source.revision}",
            "fetch it once with a network, or name the revision that is here",
        )


def encodes(value: Any) -> bool:
    """Whether a file can hold a value, which it cannot with half of a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


_DEMO_HINTS = {
    "data/demo": "lorapar demo-data data/demo writes it",
    "data/demo-long": "lorapar demo-data data/demo-long --long writes it",
}


def local_file(source: SourceSection) -> Path | None:
    """The file that a source names, or None if its path can only be a hub id; else MissingInputError."""
    if source.path is None:
        raise no_path()
    path = Path(source.path)
    if path.is_file():
        return path
    if not may_be_hub_id(source.path):
        if path.is_dir():
            raise MissingInputError(f"{path} is a folder, not a file")
        raise MissingInputError(f"no data file {path}", _DEMO_HINTS.get(str(path.parent)))
    return None


def may_be_hub_id(path: str) -> bool:
    """Whether a path is no file or folder here and has the form of a hub id."""
    named_as_file = path.endswith((".jsonl", ".gz", ".json"))
    return not Path(path).exists() and not named_as_file and path.count("/") == 1


def no_path(hint: str = "--set data.path=FILE, or a hub id") -> ConfigError:
    return ConfigError("data.path is not set", hint)


def _detect(where: str, row: dict[str, Any]) -> str:
    names = {SYNONYMS.get(name, name) for name in row}
    for kind, needed in FIELDS.items():
        if names >= set(needed):
            return kind
    raise DataError(
        f"{where}: cannot tell the format from the fields {', '.join(row)}",
        "; ".join(f"{kind}: {', '.join(needed)}" for kind, needed in FIELDS.items()),
    )


def text_field(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        got = "nothing" if value is None else type(value).__name__
        raise ValueError(f"field {name} must be text, got {got}")
    return value


def gold_field(value: Any) -> str:
    """A verifiable answer that a row gives as text or as a number; empty if it gives none."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"a verifiable answer must be text or a number, got {type(value).__name__}")
    return str(value).strip()


class Empty(ValueError):
    """Of a row with nothing to ask, or nothing to answer."""


def _example(kind: str, row: dict[str, Any]) -> Example:
    if kind == "alpaca":
        row = _in_alpaca(row)
        prompt = _instruction(row)
        response, used = text_field(row, "output"), {"instruction", "input", "output"}
    elif kind == "messages":
        prompt, response = _conversation(row["messages"])
        used = {"messages"}
    else:
        ask, reply = FIELDS[kind]
        prompt, response, used = text_field(row, ask), text_field(row, reply), {ask, reply}
    if not prompt.strip() or not response.strip():
        raise Empty("prompt or response is empty")
    gold = gold_field(row.get("gold")) or gold_of(response)
    extra = {name: value for name, value in row.items() if name not in used | {"gold"}}
    return Example(id_of([prompt, response]), prompt, response, gold, extra)


def instruction(row: dict[str, Any]) -> str:
    """What a row in the format of alpaca, or of Dolly, asks; DataError if it says two things."""
    try:
        return _instruction(_in_alpaca(row))
    except ValueError as error:
        raise DataError(str(error)) from None


def _instruction(row: dict[str, Any]) -> str:
    context = row.get("input") or ""
    return text_field(row, "instruction") + (f"\n\n{context}" if context else "")


def _in_alpaca(row: dict[str, Any]) -> dict[str, Any]:
    """The row with alpaca's names for its fields; an empty field gives way to its synonym."""
    found: dict[str, Any] = {}
    for given, value in row.items():
        name = SYNONYMS.get(given, given)
        if found.get(name) and value and found[name] != value:
            raise ValueError(f"field {given} says something else than its other name does")
        found[name] = found.get(name) or value
    return found


def _conversation(messages: Any) -> tuple[str, str]:
    """The question and the answer of a conversation; a system message is put before the question."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError("field messages must be a list of objects with role and content")
    roles = [m.get("role") for m in messages]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise ValueError(
            f"field messages: expected user and assistant, after an optional system, got {roles}"
        )
    texts = [text_field(m, "content") for m in messages]
    return "\n\n".join(text for text in texts[:-1] if text.strip()), texts[-1]


def shots_source(benchmark: BenchmarkSection) -> SourceSection:
    """The source of the worked examples in a benchmark's prompts; ConfigError if it is that of the items."""
    path = benchmark.shots_path or benchmark.path
    if path == benchmark.path and (benchmark.shots_split == benchmark.split or Path(path or "").exists()):
        raise ConfigError(
            f"{benchmark.shots} shots of {benchmark.kind} need shots_path: rows that are not asked",
            "or shots: 0; of a hub data set, shots_split or split would do",
        )
    return SourceSection(
        path=path, subset=benchmark.subset, split=benchmark.shots_split, revision=benchmark.revision
    )
