"""What a person sees: exact sentences, exit codes, and a start without the heavy libraries."""

import json
import logging
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from unittest.mock import Mock

import pytest
import typer
from conftest import ROOT, Small, flags

from lorapar_cli import terminal
from lorapar_cli.__main__ import main as begin
from lorapar_cli.app import app
from lorapar_cli.commands import COMMANDS

HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "vllm", "numpy", "scipy", "statsmodels"}
LIGHT = {"typer", "pydantic", "yaml", "rich"}


def loaded_by(code: str) -> set[str]:
    """The packages that a program loads, apart from light ones."""
    program = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}


def test_help_loads_nothing_but_itself_and_lists_every_command(monkeypatch, capsys):
    calling = "sys.argv[1:] = ['--help']; from lorapar_cli.__main__ import main; main()"
    assert not (HEAVY | LIGHT) & loaded_by(calling)
    commands = typer.main.get_command(app).commands
    assert {name: command.help for name, command in commands.items()} == COMMANDS
    for arguments in ([], ["-h"], ["--help"], ["--version"]):
        monkeypatch.setattr(sys, "argv", ["lorapar", *arguments])
        begin()
    printed = capsys.readouterr().out
    *usages, shown_version = re.split(r"^(?=Usage)|\n(?=[\d.]+.*\n$)", printed, flags=re.M)[1:]
    assert len({text.strip() for text in usages}) == 1
    assert shown_version == f"{version('lorapar')}\n"
    assert re.findall(r"^  ([a-z-]+) ", usages[0], re.M) == list(COMMANDS)


def test_quick_commands_load_nothing_heavy(config, begun):
    """Nor does a paired test of right and wrong answers load scipy."""
    commands = [["list"], ["list", "scorers"], ["config"], ["status", "-h"], ["status", *config]]
    commands += [["sft", *config, "--set", "sft.lrr=1"], ["partition", *smoke_of(begun)]]
    code = f"""
from lorapar_cli.app import main
for command in {[list(map(str, command)) for command in commands]!r}:
    sys.argv[1:] = command
    try:
        main()
    except SystemExit as end:
        assert end.code in (0, 78), end.code"""
    loaded = loaded_by(code)
    assert LIGHT & loaded and not HEAVY & loaded
    code = "from stages.evaluation.statistics import paired_p; assert paired_p([0, 1, 0], [1, 1, 1]) == 0.5"
    assert not {"scipy", "statsmodels"} & loaded_by(code)


def smoke_of(begun: Small) -> list[object]:
    """The config of `begun` as arguments."""
    return [ROOT / "configs/smoke.yaml", *flags(*begun.home)]


@pytest.fixture
def config(smoke_flags):
    return [ROOT / "configs/smoke.yaml", *smoke_flags]


@pytest.mark.parametrize(
    ("command", "code", "text"),
    [
        ("status CONFIG --set partition.thta=1", 78,
         "unknown setting partition.thta (did you mean partition.theta?)\n  hint: every setting"),
        ("status CONFIG --set model.name=/nowhere/m", 66,
         "no model folder /nowhere/m\n  hint: a hub id is NAME or OWNER/NAME\n"),
        ("status CONFIG --set model.name=elsewhere/models/tiny-random", 66,
         f"no model folder elsewhere/models/tiny-random in {ROOT}\n"
         "  hint: lorapar fetch tiny-random makes it, in models/\n"),
        ("status CONFIG --set 'model.name=my model'", 66,
         "no local folder 'my model', and cannot get the model from the hub: "),
        ("status CONFIG --set data.path=data/demo/none.jsonl", 66,
         f"no data file data/demo/none.jsonl in {ROOT}\n  hint: lorapar demo-data data/demo writes it\n"),
        ("status CONFIG --set data.path=none.jsonl", 66, f"no data file none.jsonl in {ROOT}\n"),
        ("status CONFIG --set data.path=/tmp", 66, "/tmp is a folder, not a file\n"),
        ("score CONFIG --set lora.target_modules=[q_prj,k_proj] --set partition.strategy=all", 78,
         "lora.target_modules: no q_prj in LlamaForCausalLM\n  hint: choose from: down_proj, gate_proj"),
        ("list things", 78, "nothing to list under 'things'\n  hint: choose from: scorers"),
        ("show CONFIG sleep", 78, "no stage 'sleep'"),
        ("run CONFIG --to sleep --quiet", 78, "unknown stage 'sleep'"),
        ("fetch gpt", 78, "unknown model 'gpt'"),
        ("partition CONFIG --only both", 78, "--only both: no such variant\n  hint: choose from: sft, rl\n"),
        ("show CONFIG --limit 3", 78, "--samples, --wrong and --limit go with an evaluation"),
        ("show CONFIG eval:sft --by kind", 78, "--by goes with the results of all"),
    ],
)  # fmt: skip
def test_mistakes_have_one_sentence_and_a_code(lorapar, config, command, code, text):
    words = [part for word in shlex.split(command) for part in (config if word == "CONFIG" else [word])]
    done = lorapar(*words)
    assert done.code == code and done.err.startswith(f"error: {text}") and "Traceback" not in done.err


def test_what_is_not_there_is_said_with_the_command_that_makes_it(lorapar, config):
    def pasted(*command: str) -> tuple[str, list[str]]:
        done = lorapar(command[0], *config, *command[1:])
        error, hint = done.err.removeprefix("error: ").split("\n  hint: ")
        assert done.code == 66
        return error, shlex.split(hint)

    run = ["lorapar", "run", *map(str, config)]
    theta = ["--set", "partition.theta=0.5"]
    assert pasted("partition") == ("score is missing (not run yet)", [*run, "--to", "partition"])
    assert pasted("show", "sft", *theta) == ("sft is missing (not run yet)", [*run, *theta, "--to", "sft"])
    assert pasted("show", *theta) == (
        "eval:base@demo is missing (not run yet)",
        [*run, *theta, "--to", "eval"],
    )


def test_without_training_rows_only_the_base_is_evaluated(lorapar, config):
    modes = flags("modes={fast: {system: Now.}, slow: {}, auto: {system: Choose.}}", "sft.system2_share=0")
    base_only = [*config, *flags("data.path=null", "eval.targets=[base, 'base:fast']"), *modes]
    states = json.loads(lorapar("status", *base_only, "--json").out)
    assert list(states) == ["classify:demo", "eval:base@demo", "eval:base:fast@demo"]
    done = lorapar("status", *config, *flags("baseline={method: ia3}", "eval.targets=['init:fast']"), *modes)
    assert "ia3 has no scored initial adapter; take init out of eval.targets" in done.err
    refused = "error: data.path is not set\n  hint: --set data.path=FILE, or a hub id\n"
    assert lorapar("sft", *base_only).err == refused


def test_status_show_and_json(lorapar, config):
    small = flags("data.limit=8", "eval.benchmarks.demo.limit=4", "classify.strategy=random")
    said = lorapar("classify", *config, *small).err
    made = re.findall(r"^(\S+): .* in \d+ s.*\n  examples: (\d+)", said, re.M)
    assert made == [("classify:train", "8"), ("classify:demo", "4")]
    assert lorapar("classify", *config, *small).err.count("is current") == 2
    states = json.loads(lorapar("status", *config, "--json", *small).out)
    assert states["classify:train"]["state"] == "current"
    assert states["score"] == {"state": "missing", "why": "not run yet"}
    shown = lorapar("show", *config, "classify:demo", *small)
    assert "examples: 4" in shown.out and "labels.jsonl" in shown.out


def test_bare_programs_run_in_rl_too(lorapar, config, monkeypatch):
    seen = []
    for name in ("run", "stage"):
        planned = f"lorapar_cli.{name}.plan_of"
        monkeypatch.setattr(planned, lambda path, sets: seen.append(sets) or (None, {}, None))
    lorapar("run", "c.yaml", "--unsafe-no-sandbox")
    lorapar("eval", "c.yaml", "--unsafe-no-sandbox", "--set", "seed=1")
    bare = "sandbox.backend=unsafe-no-sandbox"
    assert seen == [[f"rl.{bare}", f"eval.{bare}"], ["seed=1", f"rl.{bare}", f"eval.{bare}"]]


def test_a_full_or_closed_stderr_and_a_terminal_without_a_letter_end_nothing():
    """As in a sweep, where the log is on the disk that is full."""
    command = f"{sys.executable} -m lorapar_cli"
    assert subprocess.run(f"{command} status nofile.yaml 2>/dev/full", shell=True).returncode == 66
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(f"{command} config 2>&-", shell=True, env=ascii_only, stdout=subprocess.PIPE)
    assert done.returncode == 0 and b"\\u" in done.stdout


def test_quiet_leaves_errors_warnings_and_results(lorapar, begun, capfd, monkeypatch):
    done = lorapar("partition", *smoke_of(begun), "--quiet")
    assert [line.split(":")[0] for line in done.err.splitlines()] == ["partition", "partition"]
    assert lorapar("run", *smoke_of(begun), "--to", "partition", "--quiet").err == ""
    assert "partition" in lorapar("run", *smoke_of(begun), "--to", "partition").err
    monkeypatch.setattr(terminal, "_quiet", True)
    for level in (logging.INFO, logging.WARNING):
        terminal.LogHandler().emit(logging.makeLogRecord({"levelno": level, "msg": f"of {level}"}))
    assert capfd.readouterr().err == f"of {logging.WARNING}\n"


def test_an_interrupt_while_it_begins_shows_no_trace(monkeypatch):
    monkeypatch.setattr("lorapar_cli.app.main", Mock(side_effect=KeyboardInterrupt))
    monkeypatch.setattr(sys, "argv", ["lorapar", "list"])
    with pytest.raises(SystemExit) as caught:
        begin()
    assert caught.value.code == 130


@pytest.mark.slow
def test_stages_do_not_import_from_the_folder_they_stand_in(config, tmp_path):
    (tmp_path / "statistics.py").write_text("raise SystemExit(99)")
    settings = flags("classify.strategy=random", "data.limit=8")
    command = [Path(sys.executable).with_name("lorapar"), "run", *config, "--to", "classify", *settings]
    assert subprocess.run(command, cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    "arguments", [f"demo-data x --seed {2**32}", "show c.yaml --limit 0", "sweep t.yaml --jobs 9999"]
)
def test_numbers_have_bounds(arguments, lorapar, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = lorapar(*arguments.split())
    assert done.code == 2 and "Invalid value for" in done.err and not list(tmp_path.iterdir())


def test_columns_stand_below_their_heads_and_nothing_is_cut_or_obeyed(capsys, monkeypatch):
    """At a terminal, and in files and pipes."""
    monkeypatch.setenv("COLUMNS", "40")
    why = "sft.learning_rate was 0.01, now 0.003, sft.num_train_epochs was 1.0, now 2.0, sft.batch_size was 8"
    rows = [["eval:sft@demo", "stale", "7", why], ["漢字", "current", "12", "\x1b[31m"]]
    terminal.table(["step", "state", "n", "why"], rows, to_left=("state", "why"))
    assert capsys.readouterr().out.splitlines() == [
        "step           state     n  why",
        f"eval:sft@demo  stale     7  {why}",
        "漢字           current  12  \\x1b[31m",
    ]
    terminal.table(["demo", "base"], [["all", "16.7\np = .2"], ["tokens", "9"]])
    assert capsys.readouterr().out.splitlines() == [
        "demo      base",
        "all       16.7",
        "        p = .2",
        "tokens       9",
    ]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    terminal.table(
        ["step", "state", "n", "why"], [[*rows[0][:2], "", "16.7\np = .2, of an item in ten"], rows[1]]
    )
    assert capsys.readouterr().out.splitlines() == [
        "step: eval:sft@demo", "  state  stale", "  why    16.7, p = .2, of an item in ten",
        "step: 漢字", "  state  current", "  n      12", "  why    \\x1b[31m",
    ]  # fmt: skip


WHILE_IT_WORKS = """
import os, signal
from lorapar_cli import app
import stages.data.demo as demo

demo.write = lambda *_: os.kill(os.getpid(), signal.NAME)
app.main()
"""
WHILE_IT_EXITS = """
import atexit, os, signal
from lorapar_cli.__main__ import main

atexit.register(lambda: os.kill(os.getpid(), signal.NAME))
main()
"""
LOST = """
import signal, sys, time
from contextlib import suppress
from lorapar_cli import process

process.set_up()
sys.excepthook = lambda *_: None
signalled = lambda *_: signal.raise_signal(signal.NAME)
Dying = type("Dying", (), {"__del__": signalled})
with suppress(BaseException):
    LOSE
time.sleep(30)
"""
IN_A_DESTRUCTOR, BY_A_LIBRARY = LOST.replace("LOSE", "Dying()"), LOST.replace("LOSE", "signalled()")
"""Python drops the exception that the handler raises there, and some libraries do, and would go on."""


@pytest.mark.parametrize(
    ("program", "name", "code", "said"),
    [
        (WHILE_IT_WORKS, "SIGINT", 130, "stopped; the same command goes on from what is finished\n"),
        (WHILE_IT_WORKS, "SIGTERM", 143, "stopped; the same command goes on from what is finished\n"),
        (WHILE_IT_EXITS, "SIGTERM", -15, ""), (WHILE_IT_EXITS, "SIGINT", -2, ""),
        (IN_A_DESTRUCTOR, "SIGTERM", 143, ""), (IN_A_DESTRUCTOR, "SIGINT", -2, ""),
        (BY_A_LIBRARY, "SIGTERM", 143, ""),
    ],
)  # fmt: skip
def test_a_signal_ends_it_and_shows_no_trace(program, name, code, said, tmp_path):
    command = [sys.executable, "-c", program.replace("NAME", name), "demo-data", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == code and done.stderr.endswith(said), done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
