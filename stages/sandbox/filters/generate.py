"""Writes the seccomp filters that are shipped beside this file; run it by hand when a rule changes.

It needs libseccomp's Python module (Debian: python3-seccomp), which is installed for the system's Python and
not in the virtual environment: `/usr/bin/python3 generate.py`. Users do not need it: the kernel loads the
filters as they are.
"""

import errno
import struct
import sys
from pathlib import Path

CLONE_THREAD = 0x00010000

# New processes, namespaces and mounts, other processes' memory, kernel interfaces, System V memory, clocks.
REFUSED = [
    "fork",
    "vfork",
    "unshare",
    "setns",
    "mount",
    "umount2",
    "umount",
    "pivot_root",
    "chroot",
    "ptrace",
    "process_vm_readv",
    "process_vm_writev",
    "process_madvise",
    "kcmp",
    "keyctl",
    "add_key",
    "request_key",
    "bpf",
    "perf_event_open",
    "userfaultfd",
    "io_uring_setup",
    "io_uring_enter",
    "io_uring_register",
    "kexec_load",
    "kexec_file_load",
    "init_module",
    "finit_module",
    "delete_module",
    "open_by_handle_at",
    "name_to_handle_at",
    "open_tree",
    "move_mount",
    "fsopen",
    "fsconfig",
    "fsmount",
    "fspick",
    "mount_setattr",
    "shmget",
    "shmat",
    "shmctl",
    "semget",
    "semop",
    "semctl",
    "msgget",
    "msgsnd",
    "msgctl",
    "mq_open",
    "clock_settime",
    "clock_adjtime",
    "settimeofday",
    "adjtimex",
    "reboot",
    "swapon",
    "swapoff",
    "acct",
    "quotactl",
    "syslog",
    "sethostname",
    "setdomainname",
    "personality",
    "iopl",
    "ioperm",
    "fanotify_init",
    "lookup_dcookie",
    "vhangup",
    "nfsservctl",
    "setuid",
    "setgid",
    "setreuid",
    "setregid",
    "setresuid",
    "setresgid",
    "setgroups",
    "capset",
    # Memory that no limit of the address space counts, and locks on files that others read.
    "memfd_create",
    "memfd_secret",
    "flock",
]

# Calls that libseccomp does not know yet; they have one number on every architecture.
ALSO_BY_NUMBER = {"file_setattr": 469}

# What fcntl and ioctl may not do: name the process that signals go to, lock or lease a file, watch a folder,
# change a file's flags.
SETFL, O_ASYNC = 4, 0x2000
REFUSED_FCNTL = {
    "F_SETLK": 6, "F_SETLKW": 7, "F_SETOWN": 8, "F_SETSIG": 10, "F_SETOWN_EX": 15,
    "F_OFD_SETLK": 37, "F_OFD_SETLKW": 38, "F_SETLEASE": 1024, "F_NOTIFY": 1026,
}  # fmt: skip
REFUSED_IOCTL = {
    "FIOASYNC": 0x5452, "FIOSETOWN": 0x8901, "SIOCSPGRP": 0x8902, "TIOCSTI": 0x5412,
    "FS_IOC_SETFLAGS": 0x40086602, "FS_IOC32_SETFLAGS": 0x40046602, "FS_IOC_FSSETXATTR": 0x401C5820,
}  # fmt: skip
LAST_FAMILY = 16
"""Of sockets: local, internet, netlink, which a network namespace holds; above are packets, hosts, …"""
MAP_SHARED = 1
"""A bit of the flags of mmap, also in MAP_SHARED_VALIDATE. What is shared stays in memory when all of its map
but a page is gone, and no limit of the address space counts it."""
LOW = 0xFFFFFFFF
"""The kernel looks at 32 bits of these arguments; the rest may be anything."""

# Without namespaces the filter must also deny the network, other processes of the user, and the changes of
# files that Landlock does not cover (modes, owners, times, attributes).
ALSO_WITHOUT_NAMESPACES = [
    "socket",
    "socketpair",
    "connect",
    "bind",
    "listen",
    "accept",
    "accept4",
    "sendto",
    "sendmsg",
    "sendmmsg",
    "kill",
    "tkill",
    "tgkill",
    "rt_sigqueueinfo",
    "rt_tgsigqueueinfo",
    "pidfd_open",
    "pidfd_getfd",
    "pidfd_send_signal",
    "setsid",
    "setpgid",
    "setrlimit",
    "setpriority",
    "sched_setscheduler",
    "sched_setparam",
    "sched_setattr",
    "sched_setaffinity",
    "ioprio_set",
    "move_pages",
    "migrate_pages",
    "chmod",
    "fchmod",
    "fchmodat",
    "fchmodat2",
    "chown",
    "fchown",
    "lchown",
    "fchownat",
    "setxattr",
    "lsetxattr",
    "fsetxattr",
    "setxattrat",
    "removexattr",
    "lremovexattr",
    "fremovexattr",
    "removexattrat",
    "utime",
    "utimes",
    "futimesat",
    "utimensat",
    "truncate",
    "mknod",
    "mknodat",
    "inotify_init",
    "inotify_init1",
    "inotify_add_watch",
]


def _refusal(number: int) -> bytes:
    """Three instructions: load the number of the call; if it is this one, fail with EPERM; else go on."""
    load, jump_if_equal, give, failing = 0x20, 0x15, 0x06, 0x00050000
    steps = ((load, 0, 0, 0), (jump_if_equal, 0, 1, number), (give, 0, 0, failing | errno.EPERM))
    return b"".join(struct.pack("<HBBI", *step) for step in steps)


def write(path: Path, arch: str, strict: bool) -> None:
    import seccomp

    rules = seccomp.SyscallFilter(defaction=seccomp.ALLOW)
    rules.set_attr(seccomp.Attr.ACT_BADARCH, seccomp.KILL)
    native = seccomp.Arch()
    wanted = seccomp.Arch(arch)
    if int(wanted) != int(native):
        rules.add_arch(wanted)
        rules.remove_arch(native)
    refuse = seccomp.ERRNO(errno.EPERM)
    known = []
    for name in REFUSED + (ALSO_WITHOUT_NAMESPACES if strict else []):
        if seccomp.resolve_syscall(wanted, name) >= 0:  # negative: the architecture has no such call
            rules.add_rule(refuse, name)
            known.append(name)
    # Threads are made by clone too, so clone is allowed with CLONE_THREAD. The flags of clone3 are in memory,
    # which a filter cannot read; told that clone3 does not exist, libraries use clone.
    rules.add_rule(refuse, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, CLONE_THREAD, 0))
    rules.add_rule(seccomp.ERRNO(errno.ENOSYS), "clone3")
    for command in REFUSED_FCNTL.values():
        rules.add_rule(refuse, "fcntl", seccomp.Arg(1, seccomp.MASKED_EQ, LOW, command))
    for command in REFUSED_IOCTL.values():
        rules.add_rule(refuse, "ioctl", seccomp.Arg(1, seccomp.MASKED_EQ, LOW, command))
    rules.add_rule(refuse, "mmap", seccomp.Arg(3, seccomp.MASKED_EQ, MAP_SHARED, MAP_SHARED))
    asynchronous = seccomp.Arg(2, seccomp.MASKED_EQ, O_ASYNC, O_ASYNC)
    rules.add_rule(refuse, "fcntl", seccomp.Arg(1, seccomp.MASKED_EQ, LOW, SETFL), asynchronous)
    if strict:
        rules.add_rule(refuse, "prlimit64", seccomp.Arg(2, seccomp.NE, 0))
    else:
        rules.add_rule(refuse, "socket", seccomp.Arg(0, seccomp.GT, LAST_FAMILY))
    with path.open("wb") as file:
        for number in ALSO_BY_NUMBER.values():
            file.write(_refusal(number))
        file.flush()
        rules.export_bpf(file)
    print(f"{path.name}: {path.stat().st_size} bytes, {len(known)} calls refused")


if __name__ == "__main__":
    here = Path(__file__).parent
    for arch in ("x86_64", "aarch64"):
        for name, strict in (("namespaces", False), ("landlock", True)):
            write(here / f"{name}-{arch}.bpf", arch, strict)
    sys.exit()
