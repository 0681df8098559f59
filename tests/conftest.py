"""Fixtures: a random two-layer model and a byte tokenizer made on the spot, the demonstration set, commands.

Commands run as a person runs them.
"""

import contextlib
import ctypes
import errno
import gc
import importlib.util
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import psutil
import pytest
from filelock import FileLock
from hypothesis import settings
from tally import pytest_terminal_summary as pytest_terminal_summary
from tally import tally as tally

from lorapar_cli import terminal
from stages.config import Config
from stages.engines import EngineCache
from stages.errors import BusyError
from stages.pipeline.resolve import load, resolved
from stages.pipeline.run import run_step
from stages.pipeline.steps import Step, plan_steps
from stages.records import Labelled, read_labels
from stages.runtime import libraries
from stages.store.artifacts import Artifact, Store

settings.register_profile("lorapar", deadline=None)  # these machines are shared: a slow call is no failure
settings.load_profile("lorapar")

ROOT = Path(__file__).parent.parent
LORAPAR = [sys.executable, "-m", "lorapar_cli"]
"""The command, in a process of its own."""
HAS_VLLM = importlib.util.find_spec("vllm") is not None
"""`pytest_collection` hides it from the files of tests."""
TABLES = sorted((ROOT / "configs/tables").glob("*.yaml"))
CONFIGS = sorted(set((ROOT / "configs").rglob("*.yaml")) - set(TABLES))


def pytest_configure() -> None:
    """What the tests start must not ignore signals because nohup, or a script's background, made us do it."""
    for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Imports the libraries without what takes half of the time: optional packages, and garbage collection.

    TRL imports vLLM where it is installed. The libraries' objects are never collected: looking through them
    took a third of a small run of SFT.
    """
    gc.disable()
    with libraries.hide_packages(*libraries.UNUSED, "vllm"):
        result = yield
    gc.collect()
    gc.freeze()
    gc.enable()
    return result


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else libraries say at the end that they leak


@pytest.fixture(scope="session", autouse=True)
def no_curves() -> Iterator[None]:
    """Drawing its curves took half of a small run of RL; test_training.py draws some."""
    from stages.lora.training import curves

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "draw", lambda history, path: path.write_bytes(b""))
        yield


@pytest.fixture(scope="session")
def common_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this session have in common."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """The folder, made by the first worker that needs it."""
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            making = folder.with_name(f"{folder.name}.making")
            make(making)
            making.rename(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(common_folder: Path) -> Path:
    from stages.models.bundled import fetch

    return once(common_folder / "models", lambda folder: fetch("tiny-random", folder)) / "tiny-random"


@pytest.fixture(scope="session")
def demo_data(common_folder: Path) -> Path:
    from stages.data.demo import write

    return once(common_folder / "data", lambda folder: write(folder, 0))


@pytest.fixture
def tokenizer(tiny: Path) -> Any:
    from stages.config import ModelSection
    from stages.models.tokenizer import load_tokenizer

    return load_tokenizer(ModelSection(name=str(tiny)))


@pytest.fixture
def model_copy(tiny: Path, tmp_path: Path) -> Path:
    """A model of a test's own, to be changed."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def change_json(file: Path, **fields: object) -> None:
    """Set fields of the object in a file."""
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | fields), encoding="utf-8")


def paths(tiny: Path, data: Path, home: Path) -> list[str]:
    return [
        f"model.name={tiny}",
        f"data.path={data / 'train.jsonl'}",
        f"eval.benchmarks.demo.path={data / 'test.jsonl'}",
        f"runs_dir={home / 'runs'}",
    ]


class Small:
    """The smoke config with its runs in one folder, fewer rows, and the given settings changed."""

    def __init__(self, tiny: Path, data: Path, home: Path, rows: int = 48) -> None:
        self.home = [*paths(tiny, data, home), f"data.limit={rows}"]
        """For those who start a command."""

    def __call__(self, *more: str) -> Config:
        return load(ROOT / "configs/smoke.yaml", [*self.home, *more])


@pytest.fixture
def smoke(tiny: Path, demo_data: Path, tmp_path: Path) -> Small:
    return Small(tiny, demo_data, tmp_path, rows=64)


def flags(*settings: str) -> list[str]:
    """The settings as options of a command."""
    return [part for text in settings for part in ("--set", text)]


@pytest.fixture
def smoke_flags(smoke: Small) -> list[str]:
    """What makes `configs/smoke.yaml` the config of `smoke`."""
    return flags(*smoke.home)


def config_file(config: Config, folder: Path) -> Path:
    """The config as a file that commands read."""
    file = folder / "config.json"
    file.write_text(config.model_dump_json(), encoding="utf-8")
    return file


def free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(true: Callable[[], object], seconds: float = 120) -> bool:
    """Whether it becomes true; the limit is for what never does, for the machine may be busy."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def alive(pid: int) -> bool:
    """Whether the process has not ended, reaped or not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def no_sandbox(why: str) -> None:
    """Skip a test, or fail it where the machine must have the sandbox."""
    (pytest.fail if os.environ.get("LORAPAR_REQUIRE_SANDBOX") else pytest.skip)(why)


def processes(mark: str) -> list[int]:
    """Those that have the text in their command line, in which \\0 stands between words."""
    lines = {child.pid: "\0".join(child.info["cmdline"] or []) for child in psutil.process_iter(["cmdline"])}
    return [pid for pid, line in lines.items() if mark in line and pid != os.getpid()]


def quick(every: Iterable[str], *names: str) -> list[object]:
    """Every one as a parameter; those but the named are slow."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in every]


@contextlib.contextmanager
def descendants() -> Iterator[Callable[[], set[int]]]:
    """Tells what runs now and was started from here, by whatever that was started from here.

    Orphans become this process's own children for as long, so that what the tests beside this one start
    is never taken for theirs.
    """

    def adopts(orphans: int) -> None:
        if ctypes.CDLL(None, use_errno=True).prctl(36, orphans, 0, 0, 0):  # PR_SET_CHILD_SUBREAPER
            raise OSError(ctypes.get_errno(), "prctl")

    def living() -> set[int]:
        found = set()
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.cmdline():  # of what has ended, the memory goes first
                    found.add(process.pid)
        return found

    adopts(1)
    try:
        yield living
    finally:
        adopts(0)
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
                if child.status() == psutil.STATUS_ZOMBIE:
                    os.waitpid(child.pid, 0)


def servers() -> list[str]:
    """Living processes of a server; a dead one that nobody has waited for yet is none."""
    shown = subprocess.run(["ps", "-eo", "stat,pid,args"], capture_output=True, text=True, check=True).stdout
    found = [line for line in shown.splitlines() if "vllm.entrypoints" in line or "VLLM::" in line]
    return [line for line in found if not line.startswith("Z")]


def make_step(config: Config, name: str, force: bool = False) -> Artifact:
    """Run one step, or all of one stage, whose inputs are there; returns the last artifact."""
    return list(make_steps(config, name, force=force).values())[-1][0]


def make_steps(
    config: Config, *names: str, force: bool = False, progress: object = None
) -> dict[str, tuple[Artifact, bool]]:
    """Run the named steps, or all steps of the named stages; everything by default.

    Returns each artifact and whether it was made now.
    """
    config = resolved(config)
    made = {}

    def run(step: Step) -> tuple[Artifact, bool]:
        while True:
            try:
                return run_step(config, Store(config.root), step, force, progress or Silent(), engines)
            except BusyError:  # another worker makes it
                time.sleep(0.05)

    with EngineCache() as engines:
        for step in plan_steps(config).values():
            if not names or {step.name, step.stage.name} & set(names):
                made[step.name] = run(step)
    return made


class Built(Exception):
    """Carries what the stage was about to train."""


def trainer_of(config: Config, monkeypatch: pytest.MonkeyPatch, stage: str = "rl") -> tuple[Any, Any, Any]:
    """The trainer and its packed model, and how both began, as the stage makes them."""
    from stages.lora.training import loop

    def stop(trainer: Any, run: Any) -> None:
        run.start.begin(trainer.model)
        raise Built(trainer, trainer.model, run.start)

    monkeypatch.setattr(loop, "train", stop)
    with pytest.raises(Built) as caught:
        make_step(config, stage, force=True)
    return caught.value.args


def labels_of(config: Config) -> list[Labelled]:
    """The labels of the training rows that were made under this config."""
    step = plan_steps(resolved(config))["classify:train"]
    return read_labels(Store(config.root).folder("classify", step.key) / "labels.jsonl")


@pytest.fixture(autouse=True)
def warned_anew() -> None:
    """What is said once in a process is said once in a test."""
    if flat := sys.modules.get("stages.packing.support"):
        flat._warn.cache_clear()


@pytest.fixture(scope="session")
def labelled(tiny: Path, demo_data: Path, common_folder: Path) -> Path:
    """Runs with the first stages done, up to the masks. Nobody changes them."""

    def make(folder: Path) -> None:
        make_steps(Small(tiny, demo_data, folder)(), "classify", "score", "partition")

    return once(common_folder / "labelled", make)


@pytest.fixture(scope="session")
def begun(tiny: Path, demo_data: Path, labelled: Path, common_folder: Path) -> Small:
    """`labelled` and what is added to it by all tests of all workers: the same settings are made once.

    A test that watches a step being made, makes it by force, or damages it takes `own`.
    """
    home = once(common_folder / "begun", lambda folder: shutil.copytree(labelled, folder, symlinks=True))
    return Small(tiny, demo_data, home)


@pytest.fixture(scope="session")
def finished(tiny: Path, demo_data: Path, labelled: Path, common_folder: Path) -> Small:
    """A finished run, which nobody changes."""

    def make(folder: Path) -> None:
        shutil.copytree(labelled, folder, symlinks=True)
        make_steps(Small(tiny, demo_data, folder)())

    return Small(tiny, demo_data, once(common_folder / "finished", make))


@pytest.fixture
def own(tiny: Path, demo_data: Path, labelled: Path, tmp_path: Path) -> Small:
    """A copy of `labelled` for one test."""
    shutil.copytree(labelled, tmp_path / "own", symlinks=True)
    return Small(tiny, demo_data, tmp_path / "own")


def start_method() -> str:
    """How a test starts a process that computes: a fork is quick, but no GPU survives it.

    LORAPAR_START_METHOD=spawn has what needs a GPU otherwise: children without this process's patches.
    """
    import torch

    return os.environ.get("LORAPAR_START_METHOD") or ("spawn" if torch.cuda.is_available() else "fork")


@dataclass
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def lorapar(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Run the command in this process, errors rendered as at a terminal."""

    def run(*arguments: object) -> Done:
        from lorapar_cli.app import main

        monkeypatch.setattr(sys, "argv", ["lorapar", *map(str, arguments)])
        monkeypatch.setenv("PYTHONSAFEPATH", "1")  # which the command sets for good
        capfd.readouterr()
        code = 0
        handlers = {
            number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
        }
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            terminal.set_quiet(False)
            logging.getLogger("stages").setLevel(logging.NOTSET)  # the command has set it
        out, err = capfd.readouterr()
        return Done(code, out, err)

    return run


class Silent:
    """A Progress that keeps what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def start(self, what: str, total: int | None = None) -> None:
        self.said.append(what)

    def advance(self, n: int = 1, note: str = "") -> None: ...

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every text that is written to a file whole fits by its first ten characters only."""
    write = Path.write_text

    def half(self: Path, text: str, **settings: Any) -> int:
        write(self, text[:10], **settings)
        raise OSError(errno.ENOSPC, "full", str(self))

    monkeypatch.setattr(Path, "write_text", half)
