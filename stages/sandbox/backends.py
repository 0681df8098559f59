"""How `inside.py` is started: one function per back end gives the command, its environment and open files.

- bubblewrap: a separate root of read-only system folders, no network, no other processes, a seccomp filter.
- landlock: the file system and processes of the user, but all rights to them given up.
- none: limits only, for those who typed `unsafe-no-sandbox`.
"""

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from stages.sandbox.landlock import LEAST_ABI, abi

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    seconds: float = 5.0
    """Wall time for all tests of the program."""
    memory_mb: int = 512
    """Address space, in MiB."""

    def of_process(self) -> dict[str, int]:
        mb = 2**20
        cpu = int(self.seconds) + 1
        return {
            "CPU": cpu,
            "AS": self.memory_mb * mb,
            "FSIZE": 8 * mb,
            "NOFILE": 64,
            "CORE": 0,
            "STACK": 8 * mb,
        }


@dataclass(frozen=True)
class ChildProcess:
    """How to start a process: what `subprocess.Popen` needs, and the file descriptors it keeps open."""

    command: list[str]
    environment: dict[str, str]
    files: tuple[int, ...] = ()


def _python() -> tuple[str, list[str]]:
    """The interpreter outside of a virtual environment, and the folders it needs beside the system's."""
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    prefix = os.path.realpath(sys.base_prefix)
    return python, [] if prefix.startswith("/usr") else [prefix]


def _filter(kind: str) -> Path:
    machine = {"arm64": "aarch64", "amd64": "x86_64"}.get(platform.machine().lower(), platform.machine())
    path = HERE / "filters" / f"{kind}-{machine}.bpf"
    if not path.is_file():
        raise OSError(f"no seccomp filter for {machine}")
    return path


def _inside(python: str, script: str, role: str, limits: dict[str, int]) -> list[str]:
    return [python, "-I", "-S", "-X", "utf8", script, role, json.dumps(limits)]


ISOLATION = (
    *("--unshare-user", "--unshare-all", "--disable-userns", "--cap-drop", "ALL"),
    *("--die-with-parent", "--new-session"),
)
ENVIRONMENT = (
    "--clearenv",
    *("--setenv", "PATH", "/usr/bin"),
    *("--setenv", "LANG", "C.UTF-8"),
    *("--setenv", "HOME", "/tmp"),
    *("--setenv", "PYTHONDONTWRITEBYTECODE", "1"),
)


@contextmanager
def bubblewrap(role: str, limits: Limits) -> Iterator[ChildProcess]:
    """Namespaces by bubblewrap (in Debian and others the package bubblewrap), hardened.

    The seccomp filter refuses new processes, because RLIMIT_NPROC is never enforced for root.
    """
    found = shutil.which("bwrap")
    if found is None:
        raise OSError("bwrap is not installed (package bubblewrap)")
    python, folders = _python()
    allowed = {**limits.of_process(), "NPROC": 64}
    with _filter("namespaces").open("rb") as rules:
        number = rules.fileno()
        command = [found, *ISOLATION, *ENVIRONMENT, *_root(folders), "--seccomp", str(number)]
        command += _inside(python, "/inside.py", role, allowed)
        yield ChildProcess(command, {"PATH": "/usr/bin:/bin"}, (number,))


def _root(folders: list[str]) -> list[str]:
    """bwrap's arguments for the root: read-only system folders and `folders`, `inside.py`, and a small /tmp.

    There is no /proc: it would show the environment and memory of bwrap's first process. /dev is read-only
    and /dev/shm has a size, because both would be unlimited otherwise.
    """
    arguments = ["--ro-bind", "/usr", "/usr"]
    for path in ("/lib", "/lib64", "/bin"):
        if os.path.islink(path):
            arguments += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            arguments += ["--ro-bind", path, path]
    for folder in folders:
        arguments += ["--ro-bind", folder, folder]
    arguments += ["--dev", "/dev"]
    arguments += ["--size", str(16 * 2**20), "--perms", "1777", "--tmpfs", "/tmp"]
    arguments += ["--size", str(2**20), "--perms", "1777", "--tmpfs", "/dev/shm"]
    arguments += ["--ro-bind", str(HERE / "inside.py"), "/inside.py"]
    arguments += ["--chdir", "/tmp", "--hostname", "sandbox", "--remount-ro", "/", "--remount-ro", "/dev"]
    return arguments


@contextmanager
def landlock(role: str, limits: Limits) -> Iterator[ChildProcess]:
    """Landlock and a stricter seccomp filter, where there are no namespaces. Programs can write no file."""
    if abi() < LEAST_ABI:
        raise OSError(f"Landlock is at version {abi()}, {LEAST_ABI} is needed (kernel 6.2)")
    python, folders = _python()
    script = str(HERE / "inside.py")
    readable = ["/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", *folders, script]
    allowed = json.dumps(limits.of_process())
    launch = [python, "-I", "-S", str(HERE / "landlock.py"), str(_filter("landlock")), allowed]
    yield ChildProcess(
        [*launch, *readable, "--", *_inside(python, script, role, {})], {"PATH": "/usr/bin:/bin"}
    )


@contextmanager
def none(role: str, limits: Limits) -> Iterator[ChildProcess]:
    """Only limits of the process: the program can read, write, connect and start whatever its user can."""
    command = _inside(_python()[0], str(HERE / "inside.py"), role, limits.of_process())
    yield ChildProcess([*command, "--die-with-parent"], {"PATH": "/usr/bin:/bin"})


BACKENDS = {"bubblewrap": bubblewrap, "landlock": landlock, "unsafe-no-sandbox": none}
