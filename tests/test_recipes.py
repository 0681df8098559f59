"""The recipes of CONTRIBUTING: what they say is all that is needed, and every command knows it then."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, flags

DESCRIPTION = '''"""Count the labelled rows."""

from stages.config import Section
from stages.config.fields import setting
from stages.pipeline.stage import Planned, Stage


class Count(Section):
    unit: str = setting("row", "What is counted.")



STAGE = Stage(
    name="count",
    steps=lambda config: [Planned(sections=("count",), inputs=("classify:train",), asked_for=True)],
    files={"count.txt": "The number, and the unit."},
    section=Count,
)
'''
WORK = '''"""Counts."""

from stages.records import read_labels


def run(context, count):
    rows = read_labels(context.labels)
    (context.out / "count.txt").write_text(f"{len(rows)} {count.unit}s")
    return {"rows": len(rows)}
'''


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of the source."""
    for folder in ("stages", "lorapar_cli", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.fixture
def lorapar(source):
    """Runs a command from the copy; returns what it prints."""

    def run(*command: object) -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "lorapar_cli", *map(str, command)],
            cwd=source, env=os.environ | {"PYTHONPATH": str(source)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        return f"{done.stdout}exit {done.returncode}\n"

    return run


def add(file: Path, text: str, after: str = "") -> None:
    """Write a text at the end of a file, or behind another text in it."""
    old = file.read_text(encoding="utf-8") if file.exists() else ""
    assert after in old
    file.write_text(old.replace(after, after + text, 1) if after else old + text, encoding="utf-8")


@pytest.mark.slow
def test_a_stage_is_a_folder_and_a_name(source, lorapar, smoke_flags, labelled, tmp_path):
    (source / "stages/count").mkdir()
    add(source / "stages/count/__init__.py", DESCRIPTION)
    add(source / "stages/count/run.py", WORK)
    add(source / "stages/__init__.py", '"count", ', after='"classify", ')
    shutil.copytree(labelled / "runs", tmp_path / "runs", symlinks=True)
    settings = flags("data.limit=48", "eval.targets=[base]", "count.unit=line")
    config = (ROOT / "configs/smoke.yaml", *smoke_flags, *settings)

    assert "count      Count the labelled rows.\n" in lorapar("--help")
    assert "count           missing  not run yet" in lorapar("status", *config)
    assert "count" in lorapar("plan", *config, "--to", "count")
    assert "rows: 48" in lorapar("run", *config, "--to", "count")
    assert "count.txt" in lorapar("show", *config, "count")
    alone = lorapar("count", *config)
    assert "count.txt" not in alone and "is current" in alone and "exit 0" in alone
    assert "count.unit was line, now cell" in lorapar("status", *config, "--set", "count.unit=cell")
    [written] = Path(tmp_path / "runs").rglob("count.txt")
    assert written.read_text() == "48 lines"
    assert "exit 0" in lorapar("run", *config)
    assert "exit 0" in lorapar("report", *config, "--out", tmp_path / "page")
    assert (tmp_path / "page/report.html").exists()


FUNCTION = """

@{registry}.add()
def {name}({parameters}):
    \"\"\"Mine.\"\"\"
    return {value}
"""
FUNCTIONS = {
    "lora/importance/scorers.py": ("scorers", "my_scorer", "value, gradient, fisher", "value.abs()"),
    "lora/importance/strategies.py": ("strategies", "my_strategy", "*all", 'strategies.pick("all")(*all)'),
    "labelling/personas.py": ("personas", "my_persona", "*all", 'personas.pick("judge")(*all)'),
    "rewards/builtin.py": ("rewards", "my_reward", "completions, **_", "[1.0 for _ in completions]"),
}  # fmt: skip
MODULES = {
    "evaluation/benchmarks/my_benchmark.py": "from stages.evaluation.benchmarks.jsonl import *",
    "engines/my_engine.py": "from stages.engines.in_process import open_engine",
}


def test_scorers_and_others_are_a_function_or_a_file_and_a_name(source, lorapar, tiny):
    for file, parts in FUNCTIONS.items():
        fields = dict(zip(("registry", "name", "parameters", "value"), parts, strict=True))
        add(source / "stages" / file, FUNCTION.format(**fields))
    for file, text in MODULES.items():
        add(source / "stages" / file, f'"""Mine."""\n\n{text}\n')
    add(source / "stages/config/training.py", '"my_strategy", ', after="BY_THETA = (")
    add(source / "stages/evaluation/benchmarks/__init__.py", '"my_benchmark", ', after="BUILT_IN = (")
    mine, theirs = '"my_engine": "stages.engines.my_engine", ', '"transformers": "stages.engines.in_process",'
    add(source / "stages/engines/__init__.py", mine, after=theirs)
    add(source / "lorapar_cli/greet.py", "def command() -> None:\n    print('hello')\n")
    add(source / "lorapar_cli/commands.py", '"greet": "Greet.",\n        ', after='"Look": {\n        ')

    (source / "config.yaml").write_text(
        f"model: {{name: {tiny}}}\ndata: {{path: none.jsonl}}\nscore: {{scorer: my_scorer}}\n"
        "partition: {strategy: my_strategy}\nrl: {rewards: {my_reward: 1}}\n"
        "classify: {voters: [{persona: my_persona, engine: my_engine}]}\n"
    )
    listed = lorapar("list")
    names = ("my_scorer", "my_strategy", "my_persona", "my_reward", "my_benchmark", "my_engine")
    assert [name for name in names if name not in listed] == []
    assert lorapar("greet") == "hello\nexit 0\n" and "greet      Greet." in lorapar("--help")
    assert "no data file none.jsonl in " in lorapar("status", "config.yaml")  # no name is unknown
