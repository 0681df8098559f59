"""Labels of a person's own, for `lorapar init`: words in place of systems, and rows that have none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from stages.errors import ConfigError, DataError
from stages.labelling.known import read_labels_file, system_of
from stages.records import write_jsonl
from stages.store.whole_files import whole_files

FIELDS = ("system", "label", "class", "type", "kind", "mode")
"""Names of the field with the label, the most usual first."""


def own_labels(path: str, words: Mapping[str, int], file: Path, written: list[Path]) -> str:
    """The file of labels that a config can name: the person's own, or `file`, where words stand for systems.

    words: word of a label → system. ConfigError with every word that is no system and has none. written: gets
    `file`, unless it was there.
    """
    field, labels = _labels(Path(path))
    systems = {word.strip().casefold(): system for word, system in words.items()}
    read = [(key, systems.get(str(value).strip().casefold()) or system_of(value)) for key, value in labels]
    unknown = Counter(str(value) for (_, value), (_, system) in zip(labels, read, strict=True) if not system)
    if unknown:
        listing = " and ".join(f"{word} ({number})" for word, number in unknown.most_common(4))
        example = ",".join(f"{word}={n % 2 + 1}" for n, (word, _) in enumerate(unknown.most_common(4)))
        raise ConfigError(f"--labels {path}: which system is {listing}?", f"--label-words {example}")
    if field == FIELDS[0] and not words:
        return path
    with whole_files([file], "write elsewhere: --out FOLDER/rows.yaml") as (new,):
        written += [] if file.exists() else [file]
        write_jsonl(new, ({"question": key, "system": system} for key, system in read))
    return str(file)


def _labels(path: Path) -> tuple[str, list[tuple[str, object]]]:
    """The field with the labels, and the labels by id or question; those that are empty are left out."""
    problem = DataError(f"{path} has no label")
    for field in FIELDS:
        try:
            labels = [(key, value) for key, value in read_labels_file(path, field) if value is not None]
        except DataError as error:
            problem = problem if field != FIELDS[0] else error
            continue
        return field, labels
    raise problem
