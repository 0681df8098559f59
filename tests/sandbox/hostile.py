"""Programs that try to harm the machine, read what is not theirs, outlive their time or forge a verdict.

Each runs when it is loaded. `$CANARY` is a file of the user that must stay as it is, `$SECRET` one whose
content must not be seen (it is in the environment of the caller too), `$DROP` a folder of the user that must
stay empty, `$PORT` a listening port on 127.0.0.1, `$SOCKET` a listening abstract socket, `$PARENT` the
caller's process. What a program finds it prints; `got` says that it could do what it must not.
"""

import textwrap

PREAMBLE = """
import json, os, sys, time, ctypes, socket, signal, struct, subprocess, threading
import fcntl, gc, glob, io, itertools, mmap, re, resource, shutil, tempfile
libc = ctypes.CDLL(None, use_errno=True)
def show(what):
    sys.stderr.write(repr(what) + "\\n"); sys.stderr.flush()
def got(what=True):
    show(what and "secret-7f3a")
"""

FILES = {
    "open for writing": 'open("$CANARY", "w").write("x")',
    "append": 'open("$CANARY", "a").write("x")',
    "os.open": 'os.write(os.open("$CANARY", os.O_WRONLY | os.O_TRUNC), b"x")',
    "io.open": 'io.open("$CANARY", "wb").write(b"x")',
    "libc open": 'libc.write(libc.open(b"$CANARY", 1), b"x", 1)',
    "libc creat": 'libc.creat(b"$CANARY", 0o644)',
    "openat2": 'libc.syscall(437, -100, b"$CANARY", (ctypes.c_uint64 * 3)(1, 0, 0), 24)',
    "os.remove": 'os.remove("$CANARY")',
    "posix.unlink": 'import posix; posix.unlink("$CANARY")',
    "libc unlink": 'libc.unlink(b"$CANARY")',
    "reloaded os": 'import importlib; importlib.reload(os); os.unlink("$CANARY")',
    "rename away": 'os.rename("$CANARY", "$CANARY.gone")',
    "replace by another": 'open("/tmp/x", "w").write("x"); os.replace("/tmp/x", "$CANARY")',
    "truncate": 'os.truncate("$CANARY", 0)',
    "libc truncate": 'libc.truncate(b"$CANARY", ctypes.c_long(0))',
    "chmod": 'os.chmod("$CANARY", 0o777)',
    "fchmodat2": 'libc.syscall(452, -100, b"$CANARY", 0o777, 0)',
    "fchmod of a read-only file": 'os.fchmod(os.open("$CANARY", os.O_PATH), 0o777)',
    "chown": 'os.chown("$CANARY", 65534, 65534)',
    "touch": 'os.utime("$CANARY", (1, 1))',
    "extended attribute": 'os.setxattr("$CANARY", "user.x", b"1")',
    "hard link": 'os.link("$CANARY", "$DROP/link")',
    "symbolic link": 'os.symlink("/etc/passwd", "$DROP/link")',
    "new file": 'open("$DROP/new", "w").write("x")',
    "new folder": 'os.mkdir("$DROP/new")',
    "device node": 'os.mknod("$DROP/disk", 0o60666, os.makedev(8, 0))',
    "fifo": 'os.mkfifo("$DROP/pipe")',
    "remove the folder": 'shutil.rmtree("$DROP/..")',
    "shell": 'os.system("echo x > $CANARY")',
    "subprocess": 'subprocess.run(["sh", "-c", "echo x > $CANARY"])',
    "posix_spawn": 'os.waitpid(os.posix_spawn("/bin/sh", ["sh", "-c", "rm $CANARY"], {}), 0)',
    "exec": 'os.execv("/bin/sh", ["sh", "-c", "echo x > $CANARY"])',
    "memory map": 'mmap.mmap(os.open("$CANARY", os.O_RDWR), 0)[0] = 88',
    "own root": 'os.chroot("/"); open("$CANARY", "w").write("x")',
    "through /proc/self/root": 'open("/proc/self/root$CANARY", "w").write("x")',
    "through /proc/1/root": 'open("/proc/1/root$CANARY", "w").write("x")',
    "through the parent's folder": 'open("/proc/$PARENT/cwd/../$CANARY", "w").write("x")',
    "inherited descriptors": (
        'for n in range(3, 256):\n    try: os.pwrite(n, b"x", 0)\n    except OSError: pass'
    ),
    "python site": 'open(os.path.join(sys.prefix, "lib", "evil.pth"), "w").write("x")',
    "bytecode cache": 'os.makedirs(os.path.dirname(os.__file__) + "/__pycache__evil")',
}

SECRETS = {
    "read the file": 'show(open("$SECRET").read())',
    "os.open to read": 'show(os.read(os.open("$SECRET", 0), 100))',
    "libc read": (
        'b = ctypes.create_string_buffer(99); libc.read(libc.open(b"$SECRET", 0), b, 99); show(b.value)'
    ),
    "shadow": 'show("root:" in open("/etc/shadow").read() and "secret-shadow")',
    "environment": "show(dict(os.environ))",
    "own /proc environment": 'show(open("/proc/self/environ").read())',
    "environment of pid 1": 'show(open("/proc/1/environ").read())',
    "environment of the parent": 'show(open("/proc/$PARENT/environ").read())',
    "environment of all": 'for p in glob.glob("/proc/*/environ"): show(open(p).read())',
    "command lines": 'for p in glob.glob("/proc/[0-9]*/cmdline"): show(open(p).read())',
    "list the folder": 'show(os.listdir("$DROP/.."))',
    "home": 'show(os.listdir(os.path.expanduser("~root")))',
    "garbage hunt": (
        "show([o for o in gc.get_objects() if isinstance(o, dict) and 'SECRET' in str(o.keys())][:3])"
    ),
    "frames": (
        'f = sys._getframe()\nwhile f: show([k for k in f.f_locals if "secret" in k.lower()]); f = f.f_back'
    ),
    "libc getenv": 'libc.getenv.restype = ctypes.c_char_p; show(libc.getenv(b"LORAPAR_SECRET"))',
    "read by a shell": 'os.system("cat $SECRET 1>&2")',
    "keyring": 'show(libc.syscall(250, 0, -3, 0)); show(libc.syscall(248, b"user", b"x", b"y", 1, -3))',
    "file handle": (
        'libc.open_by_handle_at(-100, ctypes.create_string_buffer(64), 0); show(open("$SECRET").read())'
    ),
    "copy to stdout": 'shutil.copyfileobj(open("$SECRET"), sys.stderr)',
    "symlink to it": 'os.symlink("$SECRET", "/tmp/s"); show(open("/tmp/s").read())',
}

NETWORK = {
    "TCP to loopback": 'socket.create_connection(("127.0.0.1", $PORT), 1).sendall(b"x")',
    "TCP by libc": 's = libc.socket(2, 1, 0); a = struct.pack("!BBHI8x", 2, 0, $PORT, 0x7f000001)[:16]\n'
    'a = struct.pack("=H", 2) + struct.pack("!HI", $PORT, 0x7f000001) + bytes(8); libc.connect(s, a, 16)',
    "UDP": 'socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", $PORT))',
    "abstract socket": 'socket.socket(socket.AF_UNIX).connect("\\0$SOCKET")',
    "listen": 's = socket.socket(); s.bind(("0.0.0.0", 0)); s.listen(); show(s.getsockname())',
    "DNS": 'show(socket.gethostbyname("example.org"))',
    "raw": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).bind((0, 1))",
    "http": 'import urllib.request; urllib.request.urlopen("http://127.0.0.1:$PORT/", timeout=1)',
    "asyncio": (
        "import asyncio\n"
        "async def go(): r, w = await asyncio.open_connection('127.0.0.1', $PORT); w.write(b'x')\n"
        "asyncio.run(go())"
    ),
}

_SIGNALS = {
    "by fcntl": "fcntl.fcntl(r, 8, $PARENT)\nfcntl.fcntl(r, 10, 9)\nfcntl.fcntl(r, 4, 0x2000 | 0x800)",
    "with high bits": "for n, value in ((8, $PARENT), (10, 9), (4, 0x2800)):\n"
    "    libc.syscall(72, r, ctypes.c_long(1 << 32 | n), value)",
    "owner by structure": "fcntl.fcntl(r, 15, struct.pack('ii', 1, $PARENT))\nfcntl.fcntl(r, 10, 9)\n"
    "fcntl.fcntl(r, 4, 0x2800)",
    "by ioctl": "for c in (0x8901, 0x8902):\n    try: fcntl.ioctl(r, c, struct.pack('i', $PARENT))\n"
    "    except OSError: pass\nfcntl.ioctl(r, 0x5452, struct.pack('i', 1))",
}
"""Ways to have the caller signalled where a pipe `r` can be read."""
PROCESSES = {
    "fork bomb": "while True: os.fork()",
    "fork bomb by libc": "while True: libc.fork()",
    "raw fork": "while True: libc.syscall(57)",
    "raw clone": "while True: libc.syscall(56, 17, 0, 0, 0, 0)",
    "raw clone3": "while True: libc.syscall(435, (ctypes.c_uint64 * 11)(0, 0, 0, 0, 17), 88)",
    "vfork": "libc.vfork()",
    "forkpty": "import pty; pty.fork()",
    "multiprocessing": (
        "import multiprocessing as m; [m.Process(target=time.sleep, args=(60,)).start() for _ in range(9)]"
    ),
    "daemon": (
        "if not os.fork():\n"
        "    os.setsid()\n"
        "    if not os.fork():\n"
        '        time.sleep(2); open("$DROP/late", "w")'
    ),
    "late write by a thread": 'threading.Timer(1.5, lambda: open("$DROP/late", "w")).start()',
    "kill the parent": "os.kill($PARENT, 9)",
    "kill the parent by libc": "libc.kill($PARENT, 9)",
    "kill os.getppid": "os.kill(os.getppid(), 9)",
    "kill all": "os.kill(-1, 9)",
    "kill the group": "os.killpg(0, 9)",
    "tgkill": "libc.syscall(234, $PARENT, $PARENT, 9)",
    "pidfd": "libc.syscall(424, libc.syscall(434, $PARENT, 0), 9, 0, 0)",
    "stop oneself": "os.kill(os.getpid(), signal.SIGSTOP)",
    "ignore signals": (
        "for n in range(1, 64):\n"
        "    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except Exception: pass\n"
        "while True: pass"
    ),
    "trace the parent": "show(libc.ptrace(16, $PARENT, 0, 0))",
    "trace pid 1": "show(libc.ptrace(16, 1, 0, 0))",
    "descriptors of others": (
        "for path in (f'/proc/{p}/fd/{n}' for p in range(1, 2**15) for n in range(5)):\n"
        "    if int(path.split('/')[2]) != os.getpid():\n"
        "        try: os.open(path, os.O_RDWR | os.O_NONBLOCK); got()\n"
        "        except OSError: pass"
    ),
    "memory of pid 1": 'open("/proc/1/mem", "r+b").write(b"x")',
    "memory of the parent": 'open("/proc/$PARENT/mem", "r+b").write(b"x")',
    "process_vm_writev": "libc.process_vm_writev($PARENT, 0, 0, 0, 0, 0)",
    "raise limits": (
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); resource.setrlimit(resource.RLIMIT_CPU, (-1, -1))"
    ),
    "limits of the parent": "resource.prlimit($PARENT, resource.RLIMIT_CPU, (1, 1))",
    "slow the user's processes": "os.setpriority(os.PRIO_USER, 0, 19)",
    "pin the parent": "os.sched_setaffinity($PARENT, {0})",
    "type into the terminal": 'import termios\nfor n in range(3): fcntl.ioctl(n, termios.TIOCSTI, b"x")',
    **{
        f"signals by a pipe, {how}": f"r, w = os.pipe()\n{code}\nos.write(w, b'x')\ntime.sleep(0.2)"
        for how, code in _SIGNALS.items()
    },
    "setuid program": 'subprocess.run(["su", "-c", "id"])',
    "become root": "os.setuid(0); os.setgid(0)",
}

KERNEL = {
    "new user namespace": (
        "os.unshare(0x10000000) if hasattr(os, 'unshare') else libc.unshare(0x10000000); show(1)"
    ),
    "mount": 'show(libc.mount(b"none", b"/tmp", b"tmpfs", 0, 0))',
    "remount writable": 'libc.mount(0, b"/", 0, 32, 0); open("/x", "w")',
    "pivot_root": 'libc.syscall(155, b"/tmp", b"/tmp")',
    "setns": 'libc.setns(os.open("/proc/1/ns/mnt", 0), 0)',
    "System V memory": "show(libc.shmget(1234, 2**28, 0o1666))",
    "System V messages": "show(libc.msgget(1234, 0o1666))",
    "System V messages of others": (
        "libc.msgrcv(0, ctypes.create_string_buffer(64), ctypes.c_size_t(8), ctypes.c_long(0), 0o4000)\n"
        "got(ctypes.get_errno() != 38)"
    ),
    "System V semaphores of others": (
        "libc.semtimedop(0, struct.pack('Hhh', 0, 1, 0o4000), ctypes.c_size_t(1), 0)\n"
        "got(ctypes.get_errno() != 38)"
    ),
    "quota of asynchronous requests": "got(libc.syscall(206, 60000, ctypes.byref(ctypes.c_ulong(0))) == 0)",
    "queued signals": (
        "signal.pthread_sigmask(signal.SIG_BLOCK, [40])\ngot(libc.sigqueue(os.getpid(), 40, None) == 0)"
    ),
    "quota of timers": "got(libc.timer_create(0, 0, ctypes.byref(ctypes.c_void_p())) == 0)",
    "pseudo-terminal": "os.open('/dev/ptmx', os.O_RDWR); got()",
    "disks flushed": "got(libc.syscall(162) == 0)",
    "page cache of others": "os.posix_fadvise(os.open(os.__file__, 0), 0, 0, 4); got()",
    "urgent data": "socket.socketpair()[0].send(b'x', socket.MSG_OOB); got()",
    "POSIX queue": 'libc.mq_open(b"/evil", 0o102, 0o666, 0)',
    "bpf": "libc.syscall(321, 0, 0, 0)",
    "io_uring": "libc.syscall(425, 8, ctypes.create_string_buffer(120))",
    "userfaultfd": "libc.syscall(323, 0)",
    "host name": 'socket.sethostname("evil")',
    "clock": "time.clock_settime(time.CLOCK_REALTIME, 0)",
    "sysrq": 'open("/proc/sysrq-trigger", "w").write("b")',
    "core pattern": 'open("/proc/sys/kernel/core_pattern", "w").write("|/bin/sh")',
    "kernel log": 'open("/dev/kmsg", "w").write("x")',
    "sysfs": 'open("/sys/power/state", "w").write("mem")',
    "disk": 'open("/dev/sda", "r+b").write(b"x")',
    "module": 'libc.syscall(175, b"x", 1, b"")',
    "vsock": "s = socket.socket(40, 1); s.bind((0xFFFFFFFF, 9999)); got()",
    "packets": "got(libc.socket(17, 3, 0) >= 0)",
    "kernel's ciphers": "got(libc.socket(38, 5, 0) >= 0)",
    "lease": "fcntl.fcntl(os.open(os.__file__, 0), 1024, 0); got()",
    "lock of a file": "fcntl.flock(os.open(os.__file__, 0), 1); got()",
    "record lock": "fcntl.lockf(os.open(os.__file__, 0), 1); got()",
    "flags of a file": "fcntl.ioctl(os.open(os.__file__, 0), 0x40086602, struct.pack('l', 0x10)); got()",
    "attributes of a file": (
        "r = libc.syscall(469, -100, os.__file__.encode(), ctypes.create_string_buffer(24), 24, 0)\n"
        "got(r == 0 or ctypes.get_errno() != 38)"
    ),
    "reboot": "libc.reboot(0x1234567)",
}

RESOURCES = {
    "busy loop": "while True: pass",
    "sleep": "time.sleep(10**6)",
    "one long C call": "10 ** (10 ** 8)",
    "product": "for _ in itertools.product(range(50), repeat=50): pass",
    "regular expression": 're.match(r"(a+)+$", "a" * 60 + "b")',
    "big list": "x = [0] * 10**11",
    "growing list": "x = []\nwhile True: x.append(bytearray(2**20))",
    "big string": '"x" * 10**12',
    "anonymous map": "x = mmap.mmap(-1, 2**33); x[::4096] = b'x' * 2**21",
    "memory in a memfd": "f = os.memfd_create('x')\nfor n in range(900): os.write(f, bytes(2**20))\ngot()",
    "memory in a shared map": "mmap.mmap(-1, 2**20)[0] = 1; got()",
    "memory in a shared map, raw": "got(libc.syscall(9, 0, 2**20, 3, 0x23, -1, 0) > 0)",
    "memory in a shared map of zeros": "mmap.mmap(os.open('/dev/zero', os.O_RDWR), 2**20)[0] = 1; got()",
    "memory in a memfd, raw": "got(libc.syscall(319, b'x', 0) >= 0)",
    "memfd": "f = os.memfd_create('x'); os.posix_fallocate(f, 0, 2**34)",
    "memory in a pipe's pages": (
        "m = mmap.mmap(-1, 2**22, flags=0x22)\nm.madvise(14)\nm[0] = 1\nr, w = os.pipe()\n"
        "at = ctypes.addressof(ctypes.c_char.from_buffer(m))\nio = (ctypes.c_uint64 * 2)(at, 1)\n"
        "got(libc.vmsplice(w, io, 1, 0) > 0)"
    ),
    "memory in a larger pipe": "fcntl.fcntl(os.pipe()[0], 1031, 2**20); got()",
    "memory in attributes": (
        "for at in ('/tmp', '/dev/shm', '/'):\n"
        "    try: open(at + '/x', 'w')\n    except OSError: pass\n"
        "    for path in (at, at + '/x'):\n"
        "        got(libc.setxattr(path.encode(), b'user.x', b'1', 1, 0) == 0)"
    ),
    "memory in attributes, by number": (
        "f = os.open('/tmp', 0)\nfor call in (188, 189, 463):\n"
        "    r = libc.syscall(call, b'/tmp', b'user.x', b'1', 1, 0)\n"
        "    got(r == 0 or ctypes.get_errno() != 38)"
    ),
    "memory in connections": "s = socket.socket(socket.AF_UNIX); s.bind('\\0x'); s.listen(4096); got()",
    "memory in sockets in flight": (
        "a, b = socket.socketpair(); socket.send_fds(a, [b'x'], [b.fileno()]); got()"
    ),
    "memory in watches": "got(libc.inotify_init() >= 0)",
    "memory in rulesets": "got(libc.syscall(444, (ctypes.c_uint64 * 3)(1, 0, 0), 8, 0) >= 0)",
    "memory in empty files": (
        "for at in ('/tmp', '/dev/shm', '/dev', '/'):\n"
        "    try: open(at + '/x', 'w'); got()\n    except OSError: pass"
    ),
    "one thread": "t = threading.Thread(target=show, args=('secret-7f3a',)); t.start(); t.join()",
    "threads by raw clone": (
        "stack = ctypes.create_string_buffer(2**16)\n"
        "top = ctypes.c_void_p(ctypes.addressof(stack) + 2**15)\n"
        "r = libc.syscall(56, 0x50f00, top, 0, 0, 0)\n"
        "got(r > 0 or ctypes.get_errno() != 38)"
    ),
    "parent-death signal": "got(libc.prctl(1, 0, 0, 0, 0) == 0)",
    "threads": "while True: threading.Thread(target=time.sleep, args=(60,)).start()",
    "descriptors": "x = []\nwhile True: x.append(os.open('/dev/null', 0))",
    "fill /tmp": "f = open('/tmp/fill', 'wb')\nwhile True: f.write(bytes(2**20))",
    "many files in /tmp": "for n in itertools.count(): open(f'/tmp/{n}', 'wb').write(bytes(10**6))",
    "empty files in /tmp": "for n in itertools.count(): open(f'/tmp/{n}', 'w').close()",
    "fill /dev/shm": "f = open('/dev/shm/fill', 'wb')\nwhile True: f.write(bytes(2**20))",
    "fill /dev": "f = open('/dev/fill', 'wb')\nwhile True: f.write(bytes(2**20))",
    "fill the root": "f = open('/fill', 'wb')\nwhile True: f.write(bytes(2**20))",
    "endless output": "while True: sys.stdout.write('x' * 65536)",
    "endless errors": "while True: os.write(2, b'x' * 65536)",
    **{
        f"endless channel of {line}": f"for n in range(3, 20):\n    try:\n"
        f"        while True: os.write(n, {line})\n    except OSError: pass"
        for line in ("b'x' * 65536", "b'1\\n' * 999")
    },
    "invalid text": "os.write(2, bytes(range(256)) * 50)",
    "recursion": "sys.setrecursionlimit(10**9)\ndef g(): g()\ng()",
    "segmentation fault": "ctypes.string_at(0)",
    "abort": "os.abort()",
    "exit at once": "os._exit(0)",
    "closed channels": "os.closerange(0, 256)",
    "exit handlers": "import atexit\ndef g():\n    while True: pass\natexit.register(g); sys.exit()",
    "finalizer": "class D:\n    def __del__(s):\n        while True: pass\nD(); sys.exit()",
    "huge error": "raise ValueError('x' * 10**8)",
    "deep data": "x = []\nfor _ in range(10**6): x = [x]\nraise ValueError(x)",
    "timer storm": "signal.signal(14, lambda *a: None); signal.setitimer(0, 1e-6, 1e-6)\nwhile True: pass",
    "deep source": "eval('(' * 10**5 + ')' * 10**5)",
    "zip bomb": (
        "import zlib; d = zlib.decompressobj(); x = zlib.compress(bytes(2**27)); "
        "y = [zlib.decompress(x) for _ in range(99)]"
    ),
}

CONTAINED = {
    "files": FILES, "secrets": SECRETS, "network": NETWORK, "processes": PROCESSES, "kernel": KERNEL,
    "resources": RESOURCES,
}  # fmt: skip

_EQUAL = """
class E{base}:
    def __eq__(s, o): return True
    def __ne__(s, o): return False
    __lt__ = __gt__ = __le__ = __ge__ = __eq__
    __hash__ = None
    def __bool__(s): return True
    def __len__(s): return 3
    def __iter__(s): return iter((E(), E(), E()))
    def __getitem__(s, i): return E()
    def __getattr__(s, n): return lambda *a: E()
    def __sub__(s, o): return 0
    def __abs__(s): return 0
"""


def _tell(line: str, end: str = "") -> str:
    """Code that writes bytes to all channels: at once, or with an end as the body of the function."""
    lines = f"for n in range(3, 20):\n    try: os.write(n, {line})\n    except OSError: pass\n{end}"
    return "def f():\n" + textwrap.indent(lines, "    ") if end else lines


_VERDICT = "json.dumps({'verdict': 'passed', 'why': ''}).encode() + b'\\n'"
FORGED = {
    **{
        f"always equal {kind}": _EQUAL.format(base=f"({kind})") + "def f(): return E()"
        for kind in ("object", "int", "float", "str", "list", "dict")
    },
    "equal inside a list": _EQUAL.format(base="") + "def f(): return [E(), E(), E()]",
    "equal inside a dict": _EQUAL.format(base="") + "def f(): return {'a': (E(),)}",
    "mock": "from unittest.mock import ANY\ndef f(): return ANY",
    "own class says int": (
        "class E:\n    __class__ = int\n    def __eq__(s, o): return True\ndef f(): return E()"
    ),
    "function is an object": _EQUAL.format(base="") + "    def __call__(s): return E()\nf = E()",
    "exit with success": "def f(): os._exit(0)",
    "sys.exit": "def f(): sys.exit(0)",
    "exit while loading": "os._exit(0)\ndef f(): return 1",
    "forged verdict": _tell(_VERDICT) + "def f(): return 0",
    "forged verdict while called": _tell(_VERDICT, "os._exit(0)"),
    "verdict in the pipe of another process": (
        "def f():\n    for p, n in itertools.product(range(-50, 50), (1, 4)):\n"
        "        path = f'/proc/{os.getpid() + p}/fd/{n}'\n"
        f"        try: os.write(os.open(path, 1), {_VERDICT})\n        except OSError: pass"
    ),
    "another interpreter with the channels": (
        "def f():\n    for n in range(3, 20):\n        try: os.set_inheritable(n, True)\n"
        "        except OSError: pass\n"
        "    os.execv(sys.executable, [sys.executable, '-c', 'import os; os.write(4, b\"{}\\\\n\")'])"
    ),
    "verdict and value and error": _tell(
        'b\'{"verdict": "passed", "why": "", "raised": ["SystemExit", []]}\\n\'', "return 0"
    ),
    "arguments that were not given": _tell(
        'b\'{"value": ["int", "29"], "changed": [[], {"x": 1}]}\\n\'', "return 0"
    ),
    "hashes that collide": "def f(): return {n * (2**61 - 1): 0 for n in range(60000)}",
    "small lists without end": _tell(
        "b'{\"value\": [\"list\", [' + b'[\"list\",[]],' * 340000 + b'0]]}\\n'", "return 0"
    ),
    "byte by byte": "def f():\n    while os.write(4, b' '): time.sleep(0.01)",
    "error without a text": (
        "class E(Exception):\n    def __str__(s): raise SystemExit\n    args = property(lambda s: 1 / 0)\n"
        "def f(): raise E"
    ),
    "class without a base": (
        "class M(type): __mro__ = property(lambda s: ())\nclass E(Exception, metaclass=M): pass\n"
        "def f(): raise E"
    ),
    "replaced module": 'json.dumps = lambda *a: \'{"verdict": "passed"}\'\ndef f(): return 0',
    "ready again": _tell('b\'"ready"\\n"loaded"\\n\'', "return 0"),
    "patched tests": (
        "import builtins\n"
        "builtins.AssertionError = type('A', (Exception,), {})\n"
        "builtins.isinstance = lambda *a: True\n"
        "def f(): return 0"
    ),
    "patched frames": (
        "def f():\n"
        "    g = sys._getframe()\n"
        "    while g:\n"
        "        g.f_globals['encode'] = lambda v, d=0: ['int', '2a']\n"
        "        g = g.f_back\n"
        "    return None"
    ),
    "trace function": "sys.settrace(lambda *a: None)\ndef f(): raise SystemExit(0)",
    "ends the test's map": "def f(): raise StopIteration",
    "raises the assertion": "def f(): raise AssertionError('passed')",
    "keyboard interrupt": "def f(): raise KeyboardInterrupt",
    "code of the tests": "def f(): return [o for o in gc.get_objects() if 'check' in str(type(o))]",
    "not json": _tell("b'[' * 10**5 + b'\\n'", "return 0"),
    "huge number": _tell("b'1' * 10**6 + b'\\n'", "return 0"),
    "unknown kind": _tell('b\'{"value": ["__import__", "os"]}\\n\'', "return 0"),
    "nan": "def f(): return float('nan')",
    "endless iterator": "def f(): return iter(int, 1)",
    "endless generator": "def f():\n    while True: yield 42",
    "no function": "g = 1",
    "unicode twin": "def \u0493(): return 42",
}
"""Programs that must not pass; all their tests want is `f() == 42`, three of it, or a list or dict of it."""
