"""`lorapar init`: from rows and a model to a config, with every choice and its reason; or an example."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from lorapar_cli import terminal
from lorapar_cli.options import argument, flag, pairs, value
from stages import escaping
from stages.config import DataSection, ModelSection
from stages.data.files import stem
from stages.data.rows import local_file
from stages.errors import ConfigError, MissingInputError, OutputError
from stages.pipeline.resolve import load, resolved
from stages.pipeline.steps import plan_steps
from stages.store.artifacts import refuse_store

if TYPE_CHECKING:
    from stages.config import BenchmarkSection
    from stages.init.data_profile import DataProfile
    from stages.init.own_rows import OwnRows

    Read = tuple[OwnRows, str, list[BenchmarkSection]]
    """The reading of a person's rows, the file to train on, and benchmarks."""

SHOWN = 5
"""Final answers that are shown with their texts."""
Data = Annotated[
    str | None, argument("Training rows: a file, or the hub id of a data set without subsets.", "DATA")
]
Model = Annotated[str | None, value("Base model: a folder or a hub id.", "NAME")]
Out = Annotated[Path | None, value("The config; by default the name of the rows, or of the example.", "FILE")]
Labels = Annotated[str | None, value("Labels of your own: id or question, and system, 1 or 2.", "FILE")]
Tests = Annotated[list[str] | None, value("Rows to evaluate on, or a hub id; repeatable.", "FILE", "--test")]
COLUMNS = "Columns with other names than those of usual formats, such as question=Prompt,answer=Completion."
Columns = Annotated[str | None, value(COLUMNS, "FIELD=COLUMN,…")]
HOLD_OUT = (
    "Without --test, evaluate on a fifth of the questions of a file, at most 300, and train on the rest."
)
HoldOut = Annotated[bool, value(HOLD_OUT, None, "--hold-out/--no-hold-out")]
EXAMPLE = "Without rows: copy a config or table that comes with lorapar. Their names: lorapar list examples."
Example = Annotated[str | None, value(EXAMPLE, "NAME")]
UPDATE = "Make the files of rows again from a changed DATA; the config and what is held out stay."
Update = Annotated[bool, flag("--update", UPDATE)]


def command(
    data: Data = None,
    model: Model = None,
    out: Out = None,
    labels: Labels = None,
    tests: Tests = None,
    columns: Columns = None,
    holds_out: HoldOut = True,
    example: Example = None,
    update: Update = False,
) -> None:
    """Read the rows and write a config that fits them and the model, with the reason for each setting."""
    if example is not None:
        if data or model or labels or tests or columns:
            problem = f"--example {example} takes no rows and no model"
            raise ConfigError(problem, "only --out may stand beside it")
        from stages.init import examples

        paths = examples.write(example, out)
        kind = "sweep --dry-run" if example.startswith("tables/") else "plan"
        _say_written(paths, kind)
        return
    mapping = pairs((columns or "").split(","), "--columns", "such as question=Prompt,answer=Completion")
    if update and data:
        _update(data, out or Path(f"{stem(data)}.yaml"), tests, mapping)
        return
    if data is None or model is None:
        raise ConfigError(
            "name your rows and a model: lorapar init rows.jsonl --model NAME",
            "or copy an example: lorapar init --example demo",
        )
    path = out or Path(f"{stem(data)}.yaml")
    _check_paths(data, path, labels)
    written: list[Path] = []
    try:
        rows = _rows(data, path.parent, tests or [], mapping, holds_out, written)
        _write_config(data, model, path, labels, rows)
    except BaseException:  # such as a full disk
        for file in [path, *written]:
            file.unlink(missing_ok=True)
        raise
    _say_written([path, *written], "plan", ", with the reason for each setting")


def _update(data: str, path: Path, tests: list[str] | None, columns: dict[str, str]) -> None:
    if tests:
        raise ConfigError("--update does not read --test", f"to evaluate on other rows, edit {path}")
    from stages.init.own_rows import make_again

    changes = make_again(data, str(load(path, []).data.path), columns)
    terminal.say(f"{data}: {changes}; next: lorapar run {escaping.shell(str(path))}")


def _say_written(paths: list[Path], command: str, note: str = "") -> None:
    names, first = ", ".join(map(str, paths)), escaping.shell(str(paths[0]))
    terminal.say(f"wrote {names}{note}; next: lorapar {command} {first}")


def _check_paths(data: str, path: Path, labels: str | None) -> None:
    """Raise the error of a wrong path at once, before libraries are loaded."""
    if path.exists():
        hint = f"write elsewhere: --out FOLDER/{path.name}; for changed rows: --update"
        raise OutputError(f"{path} exists already", hint)
    path.parent.mkdir(parents=True, exist_ok=True)
    refuse_store(path)
    local_file(DataSection(path=data))
    if labels and not Path(labels).is_file():
        raise MissingInputError(f"--labels {labels}: no such file")


def _rows(
    data: str, folder: Path, tests: list[str], columns: dict[str, str], holds_out: bool, written: list[Path]
) -> Read:
    """Read the rows, and divide them unless there are others to evaluate on; `written` gets the new files."""
    from stages.init.data_profile import benchmark_of
    from stages.init.own_rows import hold_out, own_rows

    reading = own_rows(data, folder, columns, written)
    if tests or not holds_out or local_file(DataSection(path=reading.path)) is None:
        tests = list(dict.fromkeys(tests))
        if reading.path != data:  # the rows to evaluate on are of the same kind
            tests = [own_rows(test, folder, columns, written).path for test in tests]
        return reading, reading.path, [benchmark_of(test) for test in tests]
    train, test = hold_out(reading.path, str(folder / stem(data)), written)
    if test and (undivided := Path(reading.path)) in written:  # its two parts have all of its rows
        undivided.unlink()
        written.remove(undivided)
    return reading, train, [test] if test else []


def _write_config(data: str, model: str, path: Path, labels: str | None, rows: Read) -> None:
    from stages.init import config_writer
    from stages.init.data_profile import survey
    from stages.labelling.known import with_known_labels

    reading, train, tests = rows
    profile = survey(
        ModelSection(name=model), DataSection(path=train, empty="drop", duplicates="first"), tests
    )
    settings = list(config_writer.choices(profile, model, train, tests, labels, stem(data)))
    if labels:  # says how many rows have none
        with_known_labels(profile.rows.examples, "system", Path(labels))
    questions = config_writer.open_questions(profile, tests, labels)
    _print_rows(reading, data, profile)
    print("what the rows do not say:")
    for question in questions:
        terminal.write(f"  {question}")
    head = [
        f"Settings for {data} ({profile.rows.format}) and {model} that differ from the defaults.",
        "Every setting with its default: lorapar config",
    ]
    path.write_text(config_writer.document(settings, head, questions), encoding="utf-8")
    plan_steps(resolved(load(path, [])))


def _print_rows(reading: OwnRows, file: str, profile: DataProfile) -> None:
    """Print what was read from the rows of a file, and what of it is not as it should be."""
    from stages.init.final_answers import RULE

    if reading.columns:
        print(f"{file}: " + ", ".join(f"{name} is {column}" for name, column in reading.columns.items()))
    if reading.unread:
        terminal.write(reading.unread)
        print(f"({RULE}); a column that has them: --columns gold=COLUMN")
    if reading.golds:
        print(f"final answers, read from {len(reading.golds)} rows ({RULE}); others: --columns gold=COLUMN")
        for text, gold in reading.golds[:SHOWN]:
            terminal.write(f"  {text} → {gold}")
    rows = profile.rows
    counts = {"empty": rows.empty, "repeated": rows.repeated}
    left_out = ", ".join(f"{number} {kind}" for kind, number in counts.items() if number)
    print(f"{len(rows.examples)} rows: {rows.format}" + (f"; left out: {left_out}" if left_out else ""))
    print("answers: " + ", ".join(f"{kind} {number}" for kind, number in profile.answers.most_common()))
