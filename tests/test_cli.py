"""What a person sees: exact sentences, exit codes, and a start without the heavy libraries."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
from conftest import ROOT, Small, paths

from lorapar_cli.__main__ import main as begin
from lorapar_cli.app import app
from lorapar_cli.commands import COMMANDS
from lorapar_cli.run import _next
from stages.pipeline.resolve import resolved
from stages.pipeline.steps import ancestors, plan_steps

HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "vllm", "numpy", "scipy", "statsmodels"}
LIGHT = {"typer", "pydantic", "yaml", "rich"}


def imported(*arguments: object) -> tuple[set[str], str]:
    """The packages that a command loads, and what it prints."""
    command = [sys.executable, "-X", "importtime", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (0, 66, 78), done.stderr
    names = re.findall(r"^import time:.*\| +(\w+)", done.stderr, re.MULTILINE)
    return set(names), done.stdout


def test_help_loads_nothing_but_itself():
    loaded, out = imported("-m", "lorapar_cli", "--help")
    assert "partition" in out and not (HEAVY | LIGHT) & loaded


def test_help_lists_every_command():
    commands = typer.main.get_command(app).commands
    assert {name: command.help for name, command in commands.items()} == COMMANDS
    help_text = imported("-m", "lorapar_cli", "-h")[1]
    assert [name for name in re.findall(r"^  ([a-z-]+) ", help_text, re.M)] == list(COMMANDS)
    assert help_text == imported("-m", "lorapar_cli", "--help")[1] == imported("-m", "lorapar_cli")[1]


def test_help_shows_no_value_of_a_flag():
    flags = [
        option
        for command in typer.main.get_command(app).commands.values()
        for option in command.params
        if getattr(option, "is_flag", False) and option.name != "help"
    ]
    assert len(flags) > 10 and {option.metavar for option in flags} == {""}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], ", or lorapar export c.yaml DIR (--views: both modes)"),
        (["eval.targets=[base, sft]"], ", or lorapar export c.yaml DIR --target sft"),
        (["rl.start_from=init", "eval.targets=[base, rl]"], ", or lorapar export c.yaml DIR"),
        (["eval.targets=[base]"], ""),
    ],
)  # fmt: skip
def test_a_run_names_the_next_commands_that_can_work(smoke, settings, said):
    config = resolved(smoke(*settings))
    commands = _next(config, ancestors(config, plan_steps(config), None), "c.yaml")
    assert commands == f"lorapar report c.yaml --out report{said}"


def test_version():
    assert imported("-m", "lorapar_cli", "--version")[1] == f"{version('lorapar')}\n"


def test_quick_commands_load_nothing_heavy(config, begun):
    current = ["partition", *smoke_of(begun)]
    for arguments in (["list"], ["status", *config], ["sft", *config, "--set", "sft.lrr=1"], current):
        loaded, _ = imported("-m", "lorapar_cli", *arguments)
        assert LIGHT & loaded and not HEAVY & loaded, arguments


def test_a_paired_test_of_right_and_wrong_loads_no_scipy():
    code = "from stages.evaluation.statistics import paired_p; assert paired_p([0, 1, 0], [1, 1, 1]) == 0.5"
    assert not {"scipy", "statsmodels"} & imported("-c", code)[0]


@pytest.mark.parametrize(
    "command", ["--help", "status --help", "status -h", "list", "list scorers", "config"]
)
def test_quick_commands(lorapar, command):
    done = lorapar(*command.split())
    assert done.code == 0 and len(done.out) > 40


def smoke_of(begun: Small) -> list[object]:
    """The config of `begun` as arguments."""
    return [ROOT / "configs/smoke.yaml", *(part for text in begun.home for part in ("--set", text))]


@pytest.fixture
def config(tiny, demo_data, tmp_path):
    return [
        ROOT / "configs/smoke.yaml",
        *(part for p in paths(tiny, demo_data, tmp_path) for part in ("--set", p)),
    ]


@pytest.mark.parametrize(
    ("override", "code", "text"),
    [
        (
            "partition.thta=1",
            78,
            "error: unknown setting partition.thta (did you mean partition.theta?)\n  hint: every setting",
        ),
        ("partition.theta=high", 78, "error: partition.theta: input should be a valid number"),
        (
            "partition.strategy=best",
            78,
            "error: partition.strategy: unknown strategy 'best'; "
            "choose from: all, complement, importance, random, random_half, random_within, swapped, topk, "
            "topk_within\n",
        ),
        (
            "model.name=/nowhere/m",
            66,
            "error: no model folder /nowhere/m\n  hint: a hub id is NAME or OWNER/NAME\n",
        ),
        (
            "model.name=elsewhere/models/tiny-random",
            66,
            "error: no model folder elsewhere/models/tiny-random\n"
            "  hint: lorapar fetch tiny-random makes it, in models/\n",
        ),
        *(
            (
                f"model.name={name}",
                66,
                f"error: no local folder '{name}', and cannot get the model from the hub: ",
            )
            for name in ("my model", "meta--llama/x", "models.")
        ),
        (
            "data.path=data/demo/none.jsonl",
            66,
            "error: no data file data/demo/none.jsonl\n  hint: lorapar demo-data data/demo writes it\n",
        ),
        (
            "data.path=data/demo-long/none.jsonl",
            66,
            "error: no data file data/demo-long/none.jsonl\n"
            "  hint: lorapar demo-data data/demo-long --long writes it\n",
        ),
        ("data.path=none.jsonl", 66, "error: no data file none.jsonl\n"),
        ("data.path=/tmp", 66, "error: /tmp is a folder, not a file\n"),
        ("data.path=null", 78, "error: data.path is not set\n"),
        ("lora.target_modules=[]", 78, "error: lora.target_modules: list should have at least 1 item"),
        (
            "lora.init=default",
            78,
            "error: lora.init default has B = 0, so every importance is zero; choose normal",
        ),
    ],
)
def test_mistakes_have_one_sentence_and_a_code(lorapar, config, override, code, text):
    done = lorapar("status", *config, "--set", override)
    assert done.code == code
    assert done.err.startswith(text)
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("content", "code", "text"),
    [
        ("", 65, " has no rows\n"),
        ('{"question": "a", "answer": "b"}\n{"question"\n', 65, ":2: Expecting ':' delimiter"),
        ('{"question": "a", "answer": "b"}\n' * 2, 65, "duplicate id: "),
    ],
)
def test_bad_data(lorapar, config, tmp_path, content, code, text):
    (tmp_path / "d.jsonl").write_text(content)
    done = lorapar("classify", *config, "--set", f"data.path={tmp_path / 'd.jsonl'}")
    assert done.code == code and text in done.err and "Traceback" not in done.err


@pytest.mark.parametrize("modules", ["[q_prj]", "[q_prj, k_proj]"])
def test_target_modules_that_are_not_there(lorapar, config, modules):
    changes = [f"lora.target_modules={modules}", "partition.strategy=all", "data.limit=8"]
    override = [part for change in changes for part in ("--set", change)]
    done = lorapar("score", *config, *override)
    assert done.code == 78
    assert (
        "error: lora.target_modules: no q_prj in LlamaForCausalLM\n  hint: choose from: down_proj, gate_proj"
        in done.err
    )


def test_a_stage_before_its_inputs(lorapar, config):
    done = lorapar("partition", *config)
    assert done.code == 66
    hint = done.err.removeprefix("error: score is missing (not run yet)\n  hint: ").rstrip()
    assert shlex.split(hint) == ["lorapar", "run", *map(str, config), "--to", "partition"]  # to be pasted


def test_without_training_rows_only_the_base_is_evaluated(lorapar, config):
    base_only = [*config, "--set", "data.path=null", "--set", "eval.targets=[base]"]
    assert json.loads(lorapar("status", *base_only, "--json").out).keys() == {
        "classify:demo",
        "eval:base@demo",
    }
    refused = "error: data.path is not set\n  hint: --set data.path=FILE, or a hub id\n"
    assert lorapar("sft", *base_only).err == refused


def test_a_port_in_use(lorapar, config):
    import socket

    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        from stages.engines.vllm import _port
        from stages.errors import ServerError

        with pytest.raises(ServerError, match=f"server.port {port} is in use"):
            _port(port)


def test_unknown_names(lorapar, config):
    assert lorapar("list", "things").err.startswith(
        "error: nothing to list under 'things'\n  hint: choose from: scorers"
    )
    assert lorapar("show", *config[:1], "sleep", *config[1:]).err.startswith("error: no stage 'sleep'")
    assert lorapar("run", *config, "--to", "sleep").err.startswith("error: unknown stage 'sleep'")
    assert lorapar("run", *config, "--from", "rl", "--to", "sft").err.startswith(
        "error: --from rl comes after --to sft"
    )
    assert lorapar("fetch", "gpt").err.startswith("error: unknown model 'gpt'")


def test_status_show_and_json(lorapar, config):
    small = ["--set", "data.limit=8", "--set", "eval.benchmarks.demo.limit=4"]
    one = lorapar("classify", *config, "--json", *small)
    rows = [json.loads(line) for line in one.out.splitlines()]
    assert [(r["step"], r["made"], r["summary"]["examples"]) for r in rows] == [
        ("classify:train", True, 8),
        ("classify:demo", True, 4),
    ]
    again = lorapar("classify", *config, "--set", "data.limit=8", "--set", "eval.benchmarks.demo.limit=4")
    assert again.err.count("is current") == 2
    status = lorapar("status", *config, "--json", *small)
    states = json.loads(status.out)
    assert states["classify:train"]["state"] == "current"
    assert states["score"] == {"state": "missing", "why": "not run yet"}
    shown = lorapar("show", *config, "classify:demo", *small)
    assert "examples: 4" in shown.out and "labels.jsonl" in shown.out


def test_engines_and_benchmarks_are_found_by_file(lorapar):
    found = lorapar("list").out
    kinds = {line: [] for line in found.splitlines() if not line.startswith(" ")}
    kind = ""
    for line in found.splitlines():
        kind = line if line in kinds else kind
        kinds[kind] += line.split()[:1] if line not in kinds else []
    assert kinds["engines"] == ["openai", "transformers", "vllm"]
    assert kinds["benchmarks"] == ["demo", "gsm8k", "humaneval", "jsonl", "mmlu"]


def test_a_variant_that_there_is_not(lorapar, config):
    done = lorapar("partition", *config, "--only", "both")
    assert (done.code, done.err) == (
        78,
        "error: --only both: no such variant\n  hint: choose from: sft, rl\n",
    )


def test_make_knows_every_stage():
    import subprocess

    from stages import ORDER

    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(ORDER) <= {line.split()[0] for line in shown.splitlines()}


def test_a_run_of_which_nothing_can_be_made_says_so(lorapar, config):
    done = lorapar("run", *config, "--set", "data.path=null", "--to", "sft")
    assert done.code == 78 and "data.path is not set" in done.err


def test_results_that_are_not_there(lorapar, config):
    done = lorapar("show", *config, "--set", "partition.theta=0.5")
    assert done.code == 66 and "no evaluation is current: eval:base@demo is" in done.err
    assert f"hint: lorapar run {config[0]} --set" in done.err and "--set partition.theta=0.5" in done.err
    done = lorapar("show", *config, "sft", "--set", "partition.theta=0.5")
    assert done.code == 66 and done.err.rstrip().endswith("--set partition.theta=0.5 --to sft")
    for more in (["sft", "--wrong"], ["--limit", "3"]):
        assert "--limit go with an evaluation" in lorapar("show", *config, *more).err
    assert "--by goes with the results of all" in lorapar("show", *config, "eval:sft", "--by", "kind").err


def test_bare_programs_run_in_rl_too(lorapar, config, monkeypatch):
    """`eval` has RL made as it is."""
    seen = []
    for name in ("run", "eval"):
        planned = f"lorapar_cli.{name}.plan_of"
        monkeypatch.setattr(planned, lambda path, sets: seen.append(sets) or (None, {}))
    lorapar("run", "c.yaml", "--unsafe-no-sandbox")
    lorapar("eval", "c.yaml", "--unsafe-no-sandbox", "--set", "seed=1")
    bare = "sandbox.backend=unsafe-no-sandbox"
    assert seen == [[f"rl.{bare}", f"eval.{bare}"], ["seed=1", f"eval.{bare}"]]


def test_an_error_that_cannot_be_printed_has_its_code():
    """As in a sweep, where the log is on the disk that is full."""
    command = f"{sys.executable} -m lorapar_cli status nofile.yaml 2>/dev/full"
    assert subprocess.run(command, shell=True).returncode == 66


def test_a_closed_stderr_ends_nothing():
    command = f"{sys.executable} -m lorapar_cli list 2>&-"
    done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0 and "scorers" in done.stdout


def test_quiet_leaves_errors_and_results(lorapar, begun):
    done = lorapar("partition", *smoke_of(begun), "--quiet")
    assert [line.split(":")[0] for line in done.err.splitlines()] == ["partition", "partition"]
    done = lorapar("run", *smoke_of(begun), "--to", "partition", "--quiet")
    assert done.err == "" and "partition:rl" in done.out
    assert "partition" in lorapar("run", *smoke_of(begun), "--to", "partition").err
    done = lorapar("run", *smoke_of(begun), "--to", "sleep", "--quiet")
    assert done.err.startswith("error: unknown stage")


def test_an_interrupt_while_it_begins_shows_no_trace(monkeypatch):
    class Interrupted:
        @property
        def main(self):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "lorapar_cli.app", Interrupted())
    monkeypatch.setattr(sys, "argv", ["lorapar", "list"])
    with pytest.raises(SystemExit) as caught:
        begin()
    assert caught.value.code == 130


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_while_it_exits_shows_no_trace(number, tmp_path):
    at_exit = f"import atexit, os; atexit.register(lambda: os.kill(os.getpid(), {int(number)}))"
    program = f"{at_exit}; from lorapar_cli.__main__ import main; main()"
    command = [sys.executable, "-c", program, "demo-data", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -number and "Traceback" not in done.stderr


def test_a_terminal_without_a_letter():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "lorapar_cli", "config"]
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert b"\\u" in done.stdout


@pytest.mark.slow
def test_stages_do_not_import_from_the_folder_they_stand_in(tiny, demo_data, tmp_path):
    (tmp_path / "statistics.py").write_text("raise SystemExit(99)")
    sets = [part for text in paths(tiny, demo_data, tmp_path) for part in ("--set", text)]
    command = [
        Path(sys.executable).with_name("lorapar"),
        "run",
        ROOT / "configs/smoke.yaml",
        "--to",
        "classify",
    ]
    sets += ["--set", "classify.strategy=random", "--set", "data.limit=8"]
    assert subprocess.run([*command, *sets], cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "c.yaml", "x", "--check", "-1"], ["export", "c.yaml", "x", "--check", "99999"],
        ["demo-data", "x", "--seed", "-1"], ["demo-data", "x", "--seed", str(2**32)],
        ["show", "c.yaml", "--limit", "0"], ["sweep", "t.yaml", "--jobs", "0"],
        ["sweep", "t.yaml", "--jobs", "9999"],
        ["sweep", "t.yaml", "--max-cells", "0"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_numbers_have_bounds(arguments, lorapar, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = lorapar(*arguments)
    assert done.code == 2 and "Invalid value for" in done.err and not list(tmp_path.iterdir())
