"""`lorapar init`: from rows and a model to a config, with every choice and its reason; or an example."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorapar_cli import terminal
from lorapar_cli.tables import show, table
from stages import escaping
from stages.config import DataSection, ModelSection, ScoreSection
from stages.data.rows import local_file
from stages.errors import ConfigError, MissingInputError, OutputError
from stages.pipeline.resolve import load, resolved
from stages.pipeline.steps import plan_steps
from stages.store.artifacts import refuse_store

if TYPE_CHECKING:
    from stages.init.data_profile import DataProfile


DATA = "Training rows: a file, or the hub id of a data set without subsets."
PROTECT = (
    "Rows whose skill must survive. A part of them is held out to measure it, and of DATA, too, unless there "
    "is a --test."
)
EXAMPLE = (
    "Without rows: copy a config or table that comes with lorapar, such as demo. Their names: lorapar list "
    "examples."
)


def command(
    data: Annotated[str | None, typer.Argument(metavar="DATA", help=DATA)] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Base model: a folder or a hub id.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The config; by default the name of the rows, or of the example."),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Labels of your own: id or question, and system, 1 or 2."),
    ] = None,
    tests: Annotated[
        list[str] | None,
        typer.Option("--test", metavar="FILE", help="Rows to evaluate on, or a hub id; repeatable."),
    ] = None,
    protect: Annotated[str | None, typer.Option(metavar="FILE", help=PROTECT)] = None,
    example: Annotated[str | None, typer.Option(metavar="NAME", help=EXAMPLE)] = None,
) -> None:
    """Read the rows and write a config that fits them and the model, with the reason for each setting."""
    if example is not None:
        if data or model or labels or tests or protect:
            problem = f"--example {example} takes no rows and no model"
            raise ConfigError(problem, "only --out may stand beside it")
        from stages.init import examples

        paths = examples.write(example, out)
        commands = "; ".join(examples.next_commands(paths[0]))
        return terminal.say(f"wrote {', '.join(map(str, paths))}; next: {commands}")
    if data is None or model is None:
        raise ConfigError(
            "name your rows and a model: lorapar init rows.jsonl --model NAME",
            "or copy an example: lorapar init --example demo",
        )
    path = out or Path(Path(data).name.split(".")[0] + ".yaml")
    _check_paths(data, path, labels, protect)
    _write_config(data, model, path, labels, tests or [], protect)


def _check_paths(data: str, path: Path, labels: str | None, protect: str | None) -> None:
    """Raise the error of a wrong path at once, before libraries are loaded."""
    if path.exists():
        raise OutputError(f"{path} exists already", "another name: --out FILE")
    path.parent.mkdir(parents=True, exist_ok=True)
    refuse_store(path)
    for rows in filter(None, (data, protect)):
        local_file(DataSection(path=rows))
    if labels and not Path(labels).is_file():
        raise MissingInputError(f"--labels {labels}: no such file")


def _write_config(
    data: str, model: str, path: Path, labels: str | None, tests: list[str], protect: str | None
) -> None:
    from stages.init import config_writer
    from stages.init.data_profile import benchmark_of, survey
    from stages.init.hold_out import hold_out, stem
    from stages.init.open_questions import open_questions
    from stages.lora.examples import protected as protected_examples

    benchmarks = [benchmark_of(test) for test in dict.fromkeys(tests)]
    new = old = protected = None
    if protect:
        protected_examples(protect, ScoreSection(), 0)  # raises if no row has a response to score
        title = "protected" if stem(protect) == stem(data) else ""  # else the files would be one
        if not benchmarks:
            new = hold_out(data, path.parent)
            data, benchmarks = new.train, [new.test] if new.test else []
        old = hold_out(protect, path.parent, title)
    measured = [*benchmarks, *([old.test] if old and old.test else [])]
    base = ModelSection(name=model)
    profile = survey(base, DataSection(path=data, empty="drop", duplicates="first"), measured)
    if old:
        section = DataSection(path=old.train, empty="drop", duplicates="first")
        old_profile = survey(base, section, measured, profile.section)
        protected = config_writer.Protected(old.train, old_profile, old.test)
    settings = list(config_writer.choices(profile, model, data, benchmarks, labels, protected))
    questions = open_questions(profile, benchmarks, labels, protected)
    _print_profile(profile)
    print("\nwhat follows for the config, where it differs from the defaults:")
    for choice in settings:
        terminal.write(f"  {choice.name}: {choice.value}" + (f"  ({choice.why})" if choice.why else ""))
    print("\nwhat the rows do not say:")
    for question in questions:
        print(f"  {question}")
    head = [
        f"Settings for {data} ({profile.rows.format}) and {model} that differ from the defaults.",
        "Every setting with its default: lorapar config",
    ]
    try:
        path.write_text(config_writer.document(settings, head, questions), encoding="utf-8")
        plan_steps(resolved(load(path, [])))
    except BaseException:  # such as a full disk
        path.unlink(missing_ok=True)
        raise
    halves = [file for held in (new, old) if held and held.test for file in (held.train, str(held.test.path))]
    terminal.say(f"wrote {', '.join([str(path), *halves])}; next: lorapar plan {escaping.shell(str(path))}")


def _print_profile(profile: DataProfile) -> None:
    rows = profile.rows
    counts = {"empty": rows.empty, "repeated": rows.repeated}
    left_out = ", ".join(f"{number} {kind}" for kind, number in counts.items() if number)
    print(f"{len(rows.examples)} rows: {rows.format}" + (f"; left out: {left_out}" if left_out else ""))
    print("answers: " + ", ".join(f"{kind} {number}" for kind, number in profile.answers.most_common()))
    lengths_table = table("tokens", "median", "99 %", "longest")
    texts = {"prompt": profile.prompt}
    if profile.imitable:
        texts |= {"response": profile.response, "both": profile.row}
    for name, lengths in texts.items():
        lengths_table.add_row(name, *map(str, (lengths.median, lengths.p99, lengths.longest)))
    show(lengths_table)
    which = "the first row with a response" if profile.imitable and profile.unanswered else "the first row"
    print(f"{which}, in the template {profile.section.template}, as the model reads it:")
    for mark, text in zip(("  | ", "  > "), profile.sample, strict=True):
        terminal.write("\n".join(mark + line for line in text.splitlines()))
    if not profile.imitable:
        return
    stops = " or ".join(map(repr, profile.stops))
    if profile.never_stops:
        print(
            f"{len(profile.never_stops)} rows do not end in a stop token ({stops}), so that the model would "
            f"not learn to stop; the first is {profile.never_stops[0]}"
        )
    else:
        print(f"lines with > are trained; each row ends in a stop token: {stops}")
