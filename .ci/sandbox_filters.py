"""Writes the seccomp filters in `stages/sandbox/filters/`. Run it by hand after changing a rule.

It needs libseccomp's Python module (Debian: python3-seccomp), which is installed for the system's Python and
not in the virtual environment: `/usr/bin/python3 .ci/sandbox_filters.py`. Users do not need it, because the
kernel loads the filter files directly.
"""

import errno
from pathlib import Path

# What Python needs to start, compute, read files, and wait. Everything else seems not to exist, so that a C
# library that tries a newer call falls back to an older one. Landlock or the read-only root refuse to make
# and remove files, with the errors that programs expect. Of what is left out here, some is less obvious:
# - prctl could keep a program alive when its caller dies;
# - memfd_create, setxattr, inotify, vmsplice, timer_create and io_setup take memory that RLIMIT_AS does not
#   count, or a quota that all processes of the user share, and flock holds locks on files that others read;
# - sendmsg could send sockets over sockets, and socket, bind and connect reach others.
ALLOWED = """
    execve exit exit_group wait4 waitid arch_prctl set_tid_address set_robust_list rseq restart_syscall futex
    brk munmap mprotect mremap madvise getrandom
    open openat close close_range read readv pread64 write writev lseek dup dup2 dup3 pipe pipe2
    stat fstat lstat newfstatat statx statfs fstatfs access faccessat faccessat2 readlink readlinkat
    getdents getdents64 getcwd chdir fchdir
    mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2
    poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait
    recvfrom shutdown getsockname getpeername getsockopt
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigsuspend rt_sigtimedwait sigaltstack pause
    alarm setitimer getitimer nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time times
    getpid getppid gettid getpgid getpgrp getsid getuid geteuid getgid getegid getresuid getresgid getgroups
    getrlimit getrusage getpriority sched_yield sched_getaffinity getcpu uname sysinfo
"""
# Commands of fcntl: descriptors and their flags. Commands of ioctl: what isatty asks, the size of a terminal,
# how much can be read, and the same flags.
FCNTL = {"F_DUPFD": 0, "F_GETFD": 1, "F_SETFD": 2, "F_GETFL": 3, "F_DUPFD_CLOEXEC": 1030}
IOCTL = {"TCGETS": 0x5401, "TIOCGWINSZ": 0x5413, "FIONREAD": 0x541B, "FIONBIO": 0x5421}
IOCTL |= {"FIONCLEX": 0x5450, "FIOCLEX": 0x5451}
F_SETFL, O_ASYNC = 4, 0x2000
MAP_SHARED = 1
"""Flag of mmap, which is also part of MAP_SHARED_VALIDATE. Shared memory stays allocated when all but one of
its pages are unmapped, and RLIMIT_AS does not count it then."""
AF_UNIX = 1
LOW = 0xFFFFFFFF
"""Mask: the kernel reads only 32 bits of these arguments, so the upper bits may be anything."""


def write(path: Path, arch: str) -> None:
    """Write the filter of one architecture."""
    import seccomp

    rules = seccomp.SyscallFilter(defaction=seccomp.ERRNO(errno.ENOSYS))
    rules.set_attr(seccomp.Attr.ACT_BADARCH, seccomp.KILL)
    native, target = seccomp.Arch(), seccomp.Arch(arch)
    if int(target) != int(native):
        rules.add_arch(target)
        rules.remove_arch(native)

    def low(argument: int, value: int, mask: int = LOW) -> seccomp.Arg:
        return seccomp.Arg(argument, seccomp.MASKED_EQ, mask, value)

    for name in ALLOWED.split():
        if seccomp.resolve_syscall(target, name) >= 0:  # negative: the architecture has no such call
            rules.add_rule(seccomp.ALLOW, name)
    for call, commands in (("fcntl", FCNTL), ("ioctl", IOCTL)):
        for command in commands.values():
            rules.add_rule(seccomp.ALLOW, call, low(1, command))
    # No signals when a pipe has something; a process's own limits, which can only fall; private memory; pairs
    # of sockets, as asyncio has one, and on them neither addresses nor flags.
    rules.add_rule(seccomp.ALLOW, "fcntl", low(1, F_SETFL), low(2, 0, O_ASYNC))
    rules.add_rule(seccomp.ALLOW, "prlimit64", low(0, 0))
    rules.add_rule(seccomp.ALLOW, "mmap", low(3, 0, MAP_SHARED))
    rules.add_rule(seccomp.ALLOW, "socketpair", low(0, AF_UNIX))
    rules.add_rule(seccomp.ALLOW, "sendto", low(3, 0), seccomp.Arg(4, seccomp.EQ, 0))
    with path.open("wb") as file:
        rules.export_bpf(file)
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    for arch in ("x86_64", "aarch64"):
        write(Path(__file__).parent.parent / f"stages/sandbox/filters/{arch}.bpf", arch)
