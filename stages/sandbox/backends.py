"""How a role of `inside.py` is started: one class per back end, each giving a command line, its environment and its files.

bubblewrap: an own root of read-only system folders, no network, no other processes, a seccomp filter. landlock: the same
user and processes, all rights given up. none: limits only, for those who typed `unsafe-no-sandbox`.
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
    """Wall time for all of its tests."""
    memory_mb: int = 512
    """Address space."""

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
class Start:
    """What `subprocess.Popen` needs."""

    command: list[str]
    environment: dict[str, str]
    files: tuple[int, ...] = ()


def _python() -> tuple[str, list[str]]:
    """The interpreter without its virtual environment, and the folders it needs beside the system's."""
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


@contextmanager
def bubblewrap(role: str, limits: Limits) -> Iterator[Start]:
    """Namespaces by bubblewrap (Debian and others: package bubblewrap), hardened.

    No /proc: it would show the reaper's environment and memory. /dev is read-only and /dev/shm sized: they are unlimited
    otherwise. The filter refuses new processes: for root, RLIMIT_NPROC is never enforced.
    """
    found = shutil.which("bwrap")
    if found is None:
        raise OSError("bwrap is not installed (package bubblewrap)")
    python, folders = _python()
    command = [
        found,
        "--unshare-user",
        "--unshare-all",
        "--disable-userns",
        "--cap-drop",
        "ALL",
        "--die-with-parent",
    ]
    command += ["--new-session", "--clearenv", "--setenv", "PATH", "/usr/bin", "--setenv", "LANG", "C.UTF-8"]
    command += [
        "--setenv",
        "HOME",
        "/tmp",
        "--setenv",
        "PYTHONDONTWRITEBYTECODE",
        "1",
        "--ro-bind",
        "/usr",
        "/usr",
    ]
    for path in ("/lib", "/lib64", "/bin"):
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            command += ["--ro-bind", path, path]
    for folder in folders:
        command += ["--ro-bind", folder, folder]
    command += ["--dev", "/dev", "--size", str(16 * 2**20), "--perms", "1777", "--tmpfs", "/tmp"]
    command += [
        "--size",
        str(2**20),
        "--perms",
        "1777",
        "--tmpfs",
        "/dev/shm",
        "--ro-bind",
        str(HERE / "inside.py"),
        "/inside.py",
    ]
    command += ["--chdir", "/tmp", "--hostname", "sandbox", "--remount-ro", "/", "--remount-ro", "/dev"]
    with _filter("namespaces").open("rb") as rules:
        number = rules.fileno()
        command += [
            "--seccomp",
            str(number),
            *_inside(python, "/inside.py", role, {**limits.of_process(), "NPROC": 64}),
        ]
        yield Start(command, {"PATH": "/usr/bin:/bin"}, (number,))


@contextmanager
def landlock(role: str, limits: Limits) -> Iterator[Start]:
    """Landlock and a stricter seccomp filter, where no namespace can be made; programs can write no file at all."""
    if abi() < LEAST_ABI:
        raise OSError(f"Landlock is at version {abi()}, {LEAST_ABI} is needed (kernel 6.2)")
    python, folders = _python()
    script = str(HERE / "inside.py")
    readable = ["/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", *folders, script]
    launch = [
        python,
        "-I",
        "-S",
        str(HERE / "landlock.py"),
        str(_filter("landlock")),
        json.dumps(limits.of_process()),
    ]
    yield Start([*launch, *readable, "--", *_inside(python, script, role, {})], {"PATH": "/usr/bin:/bin"})


@contextmanager
def none(role: str, limits: Limits) -> Iterator[Start]:
    """Limits of the process only: the program can read, write, connect and start whatever its user can."""
    yield Start(
        _inside(_python()[0], str(HERE / "inside.py"), role, limits.of_process()), {"PATH": "/usr/bin:/bin"}
    )


BACKENDS = {"bubblewrap": bubblewrap, "landlock": landlock, "unsafe-no-sandbox": none}
