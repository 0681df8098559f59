"""Writes the seccomp filters in `stages/sandbox/filters/`. Run it by hand after changing a rule.

It needs libseccomp's Python module (Debian: python3-seccomp), which is installed for the system's Python and
not in the virtual environment: `/usr/bin/python3 .ci/sandbox_filters.py`. Users do not need it, because the
kernel loads the filter files directly.
"""

import errno
import struct
import sys
from pathlib import Path

# New processes and threads (NPROC does not bind root), namespaces and mounts, other processes' memory, kernel
# interfaces, System V memory, semaphores and queues, clocks, and the quotas of asynchronous requests and of
# queued signals.
REFUSED = """
    fork vfork clone unshare setns mount umount2 umount pivot_root chroot ptrace process_vm_readv
    process_vm_writev process_madvise kcmp keyctl add_key request_key bpf perf_event_open userfaultfd
    io_uring_setup io_uring_enter io_uring_register kexec_load kexec_file_load init_module finit_module
    delete_module open_by_handle_at name_to_handle_at open_tree move_mount fsopen fsconfig fsmount fspick
    mount_setattr shmget shmat shmctl semget semop semtimedop semctl msgget msgsnd msgrcv msgctl mq_open
    io_setup pidfd_getfd rt_sigqueueinfo rt_tgsigqueueinfo clock_settime clock_adjtime settimeofday
    adjtimex reboot swapon swapoff acct quotactl syslog sethostname setdomainname personality iopl ioperm
    fanotify_init lookup_dcookie vhangup nfsservctl setuid setgid setreuid setregid setresuid setresgid
    setgroups capset
"""
# Memory that RLIMIT_AS does not count: files in memory, pages that a pipe holds on to, attributes of a tmpfs,
# data in connections that nobody accepts or in sockets sent over sockets, watches, rulesets. And locks on
# files that others read.
REFUSED += """
    memfd_create memfd_secret vmsplice setxattr lsetxattr fsetxattr setxattrat socket connect bind listen
    accept accept4 sendmsg sendmmsg inotify_init inotify_init1 inotify_add_watch landlock_create_ruleset
    landlock_add_rule landlock_restrict_self flock
"""

# Calls that libseccomp does not know yet. They have the same number on every architecture.
ALSO_BY_NUMBER = {"file_setattr": 469}

# Commands that fcntl and ioctl must refuse: set the process that gets signals, lock or lease a file, watch a
# folder, enlarge a pipe, change a terminal or a file's flags.
SETFL, O_ASYNC = 4, 0x2000
REFUSED_FCNTL = {
    "F_SETLK": 6, "F_SETLKW": 7, "F_SETOWN": 8, "F_SETSIG": 10, "F_SETOWN_EX": 15,
    "F_OFD_SETLK": 37, "F_OFD_SETLKW": 38, "F_SETLEASE": 1024, "F_NOTIFY": 1026, "F_SETPIPE_SZ": 1031,
}  # fmt: skip
REFUSED_IOCTL = {
    "FIOASYNC": 0x5452, "FIOSETOWN": 0x8901, "SIOCSPGRP": 0x8902, "TIOCSTI": 0x5412, "TIOCSETD": 0x5423,
    "FS_IOC_SETFLAGS": 0x40086602, "FS_IOC32_SETFLAGS": 0x40046602, "FS_IOC_FSSETXATTR": 0x401C5820,
}  # fmt: skip
PR_SET_PDEATHSIG = 1
"""Option of prctl by which a program could outlive the process that started it."""
MAP_SHARED = 1
"""Flag of mmap, which is also part of MAP_SHARED_VALIDATE. Shared memory stays allocated when all but one of
its pages are unmapped, and RLIMIT_AS does not count it then."""
LOW = 0xFFFFFFFF
"""Mask: the kernel reads only 32 bits of these arguments, so the upper bits may be anything."""

# Without namespaces the filter must also deny the network, other processes of the user, and the changes of
# files that Landlock does not cover (modes, owners, times, attributes).
ALSO_WITHOUT_NAMESPACES = """
    socketpair sendto kill tkill tgkill pidfd_open pidfd_send_signal setsid setpgid setrlimit setpriority
    sched_setscheduler sched_setparam sched_setattr sched_setaffinity ioprio_set move_pages migrate_pages
    chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat getxattr lgetxattr getxattrat listxattr
    llistxattr removexattr lremovexattr fremovexattr removexattrat utime utimes futimesat utimensat
    truncate mknod mknodat
"""


def _refusal(number: int) -> bytes:
    """Assemble three BPF instructions that fail with EPERM if the number of the call is `number`."""
    load, jump_if_equal, return_, fail = 0x20, 0x15, 0x06, 0x00050000
    # BPF_LD|W|ABS (operand 0: the call's number), BPF_JMP|JEQ|K, BPF_RET|K, and SECCOMP_RET_ERRNO.
    # (operation, jump if true, jump if false, operand); a false comparison jumps over the return
    instructions = ((load, 0, 0, 0), (jump_if_equal, 0, 1, number), (return_, 0, 0, fail | errno.EPERM))
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in instructions)


def write(path: Path, arch: str, strict: bool) -> None:
    """Write the filter of one architecture. strict: also refuse what namespaces would isolate."""
    import seccomp

    rules = seccomp.SyscallFilter(defaction=seccomp.ALLOW)
    rules.set_attr(seccomp.Attr.ACT_BADARCH, seccomp.KILL)
    native = seccomp.Arch()
    target = seccomp.Arch(arch)
    if int(target) != int(native):
        rules.add_arch(target)
        rules.remove_arch(native)
    refuse = seccomp.ERRNO(errno.EPERM)
    refused = []
    for name in (REFUSED + (ALSO_WITHOUT_NAMESPACES if strict else "")).split():
        if seccomp.resolve_syscall(target, name) >= 0:  # negative: the architecture has no such call
            rules.add_rule(refuse, name)
            refused.append(name)
    rules.add_rule(seccomp.ERRNO(errno.ENOSYS), "clone3")  # as if it did not exist: libraries try clone then
    for command in REFUSED_FCNTL.values():
        rules.add_rule(refuse, "fcntl", seccomp.Arg(1, seccomp.MASKED_EQ, LOW, command))
    for command in REFUSED_IOCTL.values():
        rules.add_rule(refuse, "ioctl", seccomp.Arg(1, seccomp.MASKED_EQ, LOW, command))
    rules.add_rule(refuse, "mmap", seccomp.Arg(3, seccomp.MASKED_EQ, MAP_SHARED, MAP_SHARED))
    asynchronous = seccomp.Arg(2, seccomp.MASKED_EQ, O_ASYNC, O_ASYNC)
    rules.add_rule(refuse, "fcntl", seccomp.Arg(1, seccomp.MASKED_EQ, LOW, SETFL), asynchronous)
    rules.add_rule(refuse, "prctl", seccomp.Arg(0, seccomp.MASKED_EQ, LOW, PR_SET_PDEATHSIG))
    if strict:
        rules.add_rule(refuse, "prlimit64", seccomp.Arg(2, seccomp.NE, 0))
    with path.open("wb") as file:
        for number in ALSO_BY_NUMBER.values():
            file.write(_refusal(number))
        file.flush()
        rules.export_bpf(file)
    print(f"{path.name}: {path.stat().st_size} bytes, {len(refused)} calls refused")


if __name__ == "__main__":
    filters = Path(__file__).parent.parent / "stages/sandbox/filters"
    for arch in ("x86_64", "aarch64"):
        for name, strict in (("namespaces", False), ("landlock", True)):
            write(filters / f"{name}-{arch}.bpf", arch, strict)
    sys.exit()
