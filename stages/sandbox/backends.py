"""Back ends that start `inside.py`: one function each gives the command and the open files.

- bubblewrap: a separate root of read-only system folders, no network, no other processes.
- landlock: the user's file system and processes, but without any rights to them.
- none: resource limits only, for users who chose `unsafe-no-sandbox`.

With the first two, a seccomp filter allows only the system calls that a program needs to compute.
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

from stages.sandbox.landlock import MIN_ABI, abi

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Limits:
    """Resource limits of one program."""

    seconds: float = 5.0
    """Wall time for all tests of the program."""
    memory_mb: int = 512
    """Address space, in MiB."""

    def rlimits(self) -> dict[str, int]:
        """Limits of one process, by the name of setrlimit(2) without `RLIMIT_`."""
        mb = 2**20
        space = {"AS": self.memory_mb * mb, "FSIZE": 8 * mb, "STACK": 8 * mb}
        return {"CPU": int(self.seconds) + 1, **space, "NOFILE": 64, "CORE": 0}


@dataclass(frozen=True)
class ChildProcess:
    """Arguments for `subprocess.Popen`; the file descriptors in `files` stay open in the child."""

    command: list[str]
    files: tuple[int, ...] = ()


def _python() -> tuple[str, list[str]]:
    """Return the interpreter outside any virtual environment, and the non-system folders that it needs."""
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    prefix = os.path.realpath(sys.base_prefix)
    return python, [] if prefix.startswith("/usr") else [prefix]


def _seccomp_filter() -> Path:
    machine = {"arm64": "aarch64", "amd64": "x86_64"}.get(platform.machine().lower(), platform.machine())
    path = HERE / "filters" / f"{machine}.bpf"
    if not path.is_file():
        raise OSError(f"no seccomp filter for {machine}")
    return path


def _inside_command(python: str, script: str, role: str, limits: dict[str, int]) -> list[str]:
    return [python, "-I", "-S", "-X", "utf8", script, role, json.dumps(limits)]


ISOLATION = (
    *("--unshare-user", "--unshare-all", "--disable-userns", "--cap-drop", "ALL"),
    *("--die-with-parent", "--new-session"),
)
ENVIRONMENT = {"PATH": "/usr/bin", "LANG": "C.UTF-8", "HOME": "/tmp"}
"""The whole environment of each child: none of the caller's variables."""


@contextmanager
def bubblewrap(role: str, limits: Limits) -> Iterator[ChildProcess]:
    """Run in hardened namespaces of bubblewrap (package `bubblewrap` in Debian and other distributions)."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise OSError("bwrap is not installed (package bubblewrap)")
    python, folders = _python()
    with _seccomp_filter().open("rb") as rules:
        descriptor = rules.fileno()
        command = [bwrap, *ISOLATION, *_root_mounts(folders), "--seccomp", str(descriptor)]
        command += _inside_command(python, "/inside.py", role, limits.rlimits())
        yield ChildProcess(command, (descriptor,))


def _root_mounts(folders: list[str]) -> list[str]:
    """Build bwrap's mounts: the system folders, `folders`, `inside.py` and an empty /tmp, all read-only.

    There is no /proc: it would show the environment and memory of bwrap's first process. Nothing can be
    written, as under Landlock: files in memory, and even empty ones, would count against no limit.
    """
    arguments = ["--ro-bind", "/usr", "/usr"]
    for path in ("/lib", "/lib64", "/bin"):
        if os.path.islink(path):
            arguments += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            arguments += ["--ro-bind", path, path]
    for folder in folders:
        arguments += ["--ro-bind", folder, folder]
    for device in ("/dev/null", "/dev/urandom"):
        arguments += ["--dev-bind", device, device]
    arguments += ["--ro-bind", str(HERE / "inside.py"), "/inside.py"]
    arguments += ["--dir", "/tmp", "--chdir", "/tmp", "--hostname", "sandbox"]
    return [*arguments, "--remount-ro", "/"]


@contextmanager
def landlock(role: str, limits: Limits) -> Iterator[ChildProcess]:
    """Run under Landlock and the seccomp filter, without namespaces. Programs cannot write files."""
    if abi() < MIN_ABI:
        raise OSError(f"Landlock is at version {abi()}, {MIN_ABI} is needed (kernel 6.2)")
    python, folders = _python()
    script = str(HERE / "inside.py")
    readable = ["/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", *folders, script]
    rlimits = json.dumps(limits.rlimits())
    launch = [python, "-I", "-S", str(HERE / "landlock.py"), str(_seccomp_filter()), rlimits]
    command = [*launch, *readable, "--", *_inside_command(python, script, role, {})]
    yield ChildProcess(command)


@contextmanager
def none(role: str, limits: Limits) -> Iterator[ChildProcess]:
    """Run with resource limits only: the program can read, write, connect and start what its user can."""
    command = _inside_command(_python()[0], str(HERE / "inside.py"), role, limits.rlimits())
    yield ChildProcess([*command, "--die-with-parent"])


BACKENDS = {"bubblewrap": bubblewrap, "landlock": landlock, "unsafe-no-sandbox": none}
