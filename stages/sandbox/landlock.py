"""Drops rights irrevocably, then executes a command: `landlock.py FILTER LIMITS READABLE… -- COMMAND…`.

For machines where namespaces are not available. Landlock
(https://docs.kernel.org/userspace-api/landlock.html) denies the content of files and TCP, and the seccomp
filter allows no sockets of others, processes, signals or changes of file modes. No path stays writable. It
fails closed: an error here ends the process before the command runs. This file runs as a script and imports
only the standard library.
"""

import ctypes
import json
import os
import resource
import signal
import sys

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
MIN_ABI = 3
"""First version of Landlock that can forbid truncating a file (kernel 6.2)."""

_libc = ctypes.CDLL(None, use_errno=True)


def abi() -> int:
    """Return Landlock's version in the running kernel, 0 if it has none."""
    return max(0, _libc.syscall(CREATE_RULESET, None, 0, 1))  # 1: LANDLOCK_CREATE_RULESET_VERSION


class _Ruleset(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def _check(result: int, call: str) -> int:
    """Return the result of a system call, or raise OSError if it has failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{call}: {os.strerror(ctypes.get_errno())}")
    return result


def restrict_files(readable: list[str]) -> None:
    """Allow reading and executing files below `readable`, and /dev/null and /dev/urandom; no TCP."""
    version = abi()
    if version < MIN_ABI:
        raise OSError(f"Landlock is at version {version}, {MIN_ABI} is needed (kernel 6.2)")
    # Deny every right that this version knows: 15 or 16 on files, bind and connect by TCP from version 4 on,
    # abstract Unix sockets and signals from version 6 on. The kernel refuses a struct with fields that it
    # does not know, so the size depends on the version, too: 8 bytes for each field.
    files = (1 << {3: 15, 4: 15}.get(version, 16)) - 1
    rules = _Ruleset(files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _check(_libc.syscall(CREATE_RULESET, ctypes.byref(rules), size, 0), "landlock_create_ruleset")
    allowed = {path: EXECUTE | READ_FILE | READ_DIR for path in readable}
    allowed |= {"/dev/null": READ_FILE | WRITE_FILE, "/dev/urandom": READ_FILE}
    for path, rights in allowed.items():
        if not os.path.exists(path):
            continue
        if not os.path.isdir(path):
            rights &= ~READ_DIR
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
        beneath = _PathBeneath(rights, parent)
        _check(_libc.syscall(ADD_RULE, ruleset, 1, ctypes.byref(beneath), 0), f"landlock_add_rule {path}")
        os.close(parent)
    _check(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _check(_libc.syscall(RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def drop_capabilities() -> None:
    """Drop all capabilities, so that limits hold for root, too; no_new_privs keeps them from coming back."""
    for capability in range(64):
        _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    no_capabilities = (ctypes.c_uint32 * 6)()
    _check(_libc.capset(header, no_capabilities), "capset")


def main() -> None:
    separator = sys.argv.index("--")
    filter_path, limits, *readable = sys.argv[1:separator]
    command = sys.argv[separator + 1 :]
    parent = os.getppid()
    _check(_libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "pdeathsig")
    if os.getppid() != parent:  # the parent ended before prctl
        sys.exit(1)
    with open(filter_path, "rb") as file:
        instructions = file.read()
    for name, value in json.loads(limits).items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    os.chdir("/usr")  # the caller's folder will not be readable
    drop_capabilities()
    restrict_files(readable)
    program = _Program(len(instructions) // 8, instructions)
    _check(_libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0), "seccomp")
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
