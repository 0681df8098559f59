import collections
import functools
import math
import operator
import struct
import subprocess
import sys
import time

import pytest
from conftest import descendants, no_sandbox, processes, quick, wait_for
from hypothesis import given, settings
from hypothesis import strategies as st

from stages import sandbox
from stages.config import SandboxSection
from stages.errors import SandboxError
from stages.sandbox import HOSTILE, Limits, Sandbox, backends, from_settings, inside, pair, selftest

ADD = "def add(a, b):\n    return a + b\n"
TESTS = "def check(f):\n    assert f(1, b=2) == 3\n    assert f([1], [(2, None)]) == [1, (2, None)]\n"


@functools.cache
def problems(name):
    """What the self-test finds on this machine; that a program could do something is never an excuse."""
    found = selftest(backends.BACKENDS[name])
    assert not any(problem.startswith("a program could") for problem in found), found
    return found


@pytest.fixture(params=["bubblewrap", "landlock"])
def each(request):
    """Each back end that works here."""
    if problems(request.param):
        no_sandbox(f"{request.param}: {problems(request.param)[0]}")
    return Sandbox(request.param, Limits(seconds=20))


@pytest.fixture
def safe():
    """One back end: what is said of a program's result does not depend on which."""
    for name in ("landlock", "bubblewrap"):
        if not problems(name):
            return Sandbox(name, Limits(seconds=20))
    no_sandbox("no back end works here")


def test_a_program_that_reads_its_own_answers_ends_nothing_but_itself(each):
    """The pipe seems to have something, and then has nothing."""
    program = (
        "import os\nends = []\nfor fd in range(16):\n    try:\n"
        "        ends.append((os.open(f'/proc/self/fd/{fd}', os.O_RDONLY | os.O_NONBLOCK), fd))\n"
        "    except OSError:\n        pass\n"
        "for _ in range(3000):\n    for reader, writer in ends:\n        try:\n"
        "            os.write(writer, b'x')\n            os.read(reader, 1)\n"
        "        except OSError:\n            pass\n"
    )
    verdict = each.check(program + ADD, TESTS, "add", "")
    assert verdict.status in ("passed", "failed", "broken", "crashed", "timeout", "flooded")


@pytest.mark.parametrize(
    ("program", "status"),
    [
        (ADD, "passed"),
        (f"from dataclasses import dataclass\n@dataclass\nclass N:\n    n: 'N' = None\n{ADD}", "passed"),
        ("def add(a, b):\n    return 3\n", "failed"),
        ("def add(a, b):\n    raise KeyError(a)\n", "failed"),
        ("def add(a, b):\n    return complex(a, 0) + b if a == 1 else iter(())\n", "failed"),
        ("def add(a, b)\n    return a + b\n", "broken"),
        ("def sub(a, b):\n    return a - b\n", "broken"),
        ("import os\ndef add(a, b):\n    os._exit(0)\n", "crashed"),
        ("def add(a, b):\n    print('x' * 2**22)\n    return a + b\n", "flooded"),
        ("from unittest.mock import ANY\ndef add(a, b):\n    return ANY\n", "suspicious"),
        (f"import asyncio\nasync def one(): return 1\n{ADD}asyncio.run(one())", "passed"),
        (f"print('fine')\n{ADD}if __name__ == '__main__':\n    1 / 0\n", "passed"),
    ],
)
def test_verdicts(safe, program, status):
    assert safe.check(program, TESTS, "add").status == status


CHANNEL = (
    "import os\ndef add(a, b):\n    for n in range(3, 30):\n"
    "        try: os.write(n, {0!r})\n        except OSError: pass\n"
)
ODD = {
    "deep": "def add(a, b):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x\n",
    "deep mapping": "def add(a, b):\n    x = {}\n    for _ in range(900): x = {'a': x}\n    return x\n",
    "lone surrogate": "def add(a, b): return '\\ud800'\n",
    "lone surrogate, raised": "def add(a, b): raise ValueError('\\ud800')\n",
    "lone surrogate, on load": "raise ValueError('\\ud800')\n",
    "many digits": "def add(a, b): return 10 ** 5000\n",
    **{f"channel {text[:9]!r}": CHANNEL.format(text) for text in (
        b'{"value": 3}\n', b"[" * 9999 + b"\n", b"1" * 5000 + b"\n", b"\xff\xff\n", b"null\n", b"{}\n",
        b'{"verdict": "passed", "why": ""}\n', b'{"raised": 7}\n', b'{"raised": ["E", "\\ud800"]}\n',
    )},
}  # fmt: skip


@pytest.mark.parametrize("title", quick(ODD, "deep", "lone surrogate", "channel b'\\xff\\xff\\n'"))
def test_an_odd_result_fails_its_item_alone(safe, title):
    """The verdict can be written into a file. The standard one believes a program, but gives one, too."""
    program = ODD[title]
    verdict = safe.check(program, TESTS, "add")
    assert verdict.status in ("failed", "broken", "suspicious", "crashed")
    assert (verdict.why + verdict.output).encode()
    assert safe.check_in_one_process(program, TESTS, "add") in (True, False)


@pytest.mark.parametrize(
    "line", [b"{", b"[]", b"7", b'{"verdict": 7, "why": ""}', b'{"why": "x"}', b"[" * 9999]
)
def test_an_ending_that_is_none_is_a_failure(line):
    assert pair._parse_verdict(line) == ("failed", "the tests ended without a verdict")


IN_PLACE = """
def check(f):
    x, y, z = [3, [1], 2], {"a": [1]}, {1}
    assert f(x, y, named=z) is None
    assert x == [[1, 7], 2, 3, 9] and y == {"b": [1]} and z == {2}
"""


def test_what_a_function_makes_of_its_arguments_comes_back(safe):
    program = (
        "def f(x, y, named):\n    x[1].append(7)\n    x[:] = [x[1], x[2], x[0], 9]\n"
        "    y['b'] = y.pop('a')\n    named.add(2)\n    named.remove(1)\n"
    )
    assert safe.check(program, IN_PLACE, "f").passed
    assert not safe.check("def f(x, y, named): pass", IN_PLACE, "f").passed
    strange = program + "    x.append(object())\n"  # stays outside
    assert safe.check(strange, IN_PLACE, "f").status == "failed"


CATCHING = "def check(f):\n    try: f({0})\n    except {1} as e: assert {2}\n    else: assert 0"


@pytest.mark.parametrize(
    ("program", "tests", "passes"),
    [
        ("class Own(KeyError): pass\ndef f(): raise Own('no')", ("", "LookupError", "1"), True),
        ("class Own(ValueError): pass\ndef f(): raise Own('no')", ("", "LookupError", "1"), False),
        ("def f(b): return b.decode()", (b"\xff", "UnicodeDecodeError", "e.start == 0"), True),
        ("def f(k): return {}[k]", ("'x'", "KeyError", "e.args == ('x',)"), True),
    ],
)
def test_an_exception_arrives_as_the_built_in_one_that_it_is(safe, program, tests, passes):
    assert safe.check(program, CATCHING.format(*tests), "f").passed is passes


SWALLOWING = "def check(f):\n    try: f()\n    except TypeError: pass"
MAPPING = "def check(f):\n    assert all(a == b for a, b in zip(map(f, [1, 2]), [2, 3]))"
PROMPT = "def two(): return 2"


@pytest.mark.parametrize(
    ("program", "tests", "status", "why"),
    [
        ("def f(): return input()", "def check(f): f()", "failed", "EOFError"),
        ("f = 1", "def check(f): print('x' * 2**22)", "failed", "the tests wrote more than 1 MiB of output"),
        ("def f(): raise ValueError('x' * 2**22)", "def check(f): f()", "failed", "ValueError: xxx"),
        ("def f(): bytearray(700 * 2**20)", "def check(f): f()", "failed", "MemoryError: "),
        ("def f(): return bytearray(100 * 2**20)[:1]", "def check(f): f()", "passed", ""),
        ("def f(): return object()", SWALLOWING, "suspicious", "returned object"),
        ("def f(): return 2", "def check(f): assert f() == two()", "passed", ""),
        ("def f(x): return x + 1", MAPPING, "passed", ""),
        ("def f(x): raise StopIteration", MAPPING, "failed", ""),  # which would end the test's map
    ],
)
def test_the_reason_of_a_verdict(safe, program, tests, status, why):
    verdict = safe.check(program, tests, "f", setup=PROMPT)
    assert verdict.status == status and verdict.why.startswith(why)


def test_the_self_test_finds_what_no_sandbox_lets_through(monkeypatch):
    attempts = ("write a file", "connect to a port", "signal the caller")
    for other in set(HOSTILE) - set(attempts):
        monkeypatch.delitem(HOSTILE, other)
    assert selftest(backends.none) == [f"a program could {attempt}" for attempt in attempts]


def test_a_missing_or_broken_bubblewrap_is_the_sandbox_s_failure_not_the_program_s(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pair.SandboxFailure, match="bwrap is not installed"):
        Sandbox("bubblewrap", Limits()).check(ADD, TESTS, "add")
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(pair.SandboxFailure, match="setting up uid map: Permission denied"):
        Sandbox("bubblewrap", Limits()).check(ADD, TESTS, "add")


def test_the_choice_of_a_sandbox(monkeypatch):
    with pytest.raises(SandboxError, match="backend is refuse") as refused:
        from_settings(SandboxSection(backend="refuse"), print)
    assert refused.value.exit_code == 77
    said = []
    bare = from_settings(SandboxSection(backend="unsafe-no-sandbox"), said.append)
    assert "WITHOUT a sandbox" in said[0]
    # As in one process: it believes an object that equals everything.
    assert bare.check_in_one_process("from unittest.mock import ANY\ndef add(a, b): return ANY", TESTS, "add")
    assert not bare.check_in_one_process("def add(a, b): return 4", TESTS, "add")
    monkeypatch.setattr(sandbox, "selftest", lambda backend: ["no"] if backend is backends.bubblewrap else [])
    assert from_settings(SandboxSection(), print).name == "landlock"
    monkeypatch.setattr(sandbox, "selftest", lambda backend: ["no"])
    with pytest.raises(SandboxError, match=r"no sandbox works here \(bubblewrap: no; landlock: no\)"):
        from_settings(SandboxSection(), print)


keys = st.none() | st.booleans() | st.integers() | st.text() | st.tuples(st.integers(), st.text())
numbers = st.floats(allow_nan=False) | st.complex_numbers(allow_nan=False)
simple = keys | numbers | st.binary() | st.sets(keys) | st.frozensets(keys)
below = lambda some: st.lists(some) | st.tuples(some, some) | st.dictionaries(keys, some)  # noqa: E731


@settings(max_examples=15)
@given(st.recursive(simple, below, max_leaves=8))
def test_plain_data_crosses_unchanged(value):
    back = inside.decode(inside.json.loads(inside.json.dumps(inside.encode(value))))
    assert back == value and type(back) is type(value)
    assert math.isnan(inside.decode(inside.encode(math.nan)))
    for special in (10**5000, range(3, 9, 2), collections.Counter("aab")):
        assert inside.decode(inside.encode(special)) == special
    assert list(inside.decode(inside.encode(map(str, [1, 2])))) == ["1", "2"]


@pytest.mark.parametrize(
    "value", [object(), type("I", (int,), {})(3), [type("L", (list,), {})()], {"a": {1: object}}, print]
)
def test_other_types_do_not_cross(value):
    with pytest.raises(inside.NotPlainData):
        inside.encode(value)


def _action(program, arch, call, arguments=()):
    """What a classic BPF seccomp program answers to a system call (linux/seccomp.h)."""
    arguments = list(arguments) + [0] * 6
    data = struct.pack("<iIQ6Q", call, arch, 0, *arguments[:6])
    accumulator, at = 0, 0
    while True:
        code, yes, no, k = struct.unpack_from("<HBBI", program, 8 * at)
        at += 1
        if code == 0x20:  # load a word
            (accumulator,) = struct.unpack_from("<I", data, k)
        elif code == 0x54:  # and
            accumulator &= k
        elif code == 0x05:  # jump
            at += k
        elif code in (0x15, 0x25, 0x35, 0x45):  # jump if ==, >, >=, &
            compare = {0x15: operator.eq, 0x25: operator.gt, 0x35: operator.ge, 0x45: operator.and_}[code]
            at += yes if compare(accumulator, k) else no
        elif code == 0x06:  # return
            return {0x7FFF0000: "allow", 0x00050026: "ENOSYS"}.get(k, "kill" if k < 0x30000 else hex(k))
        else:
            pytest.fail(f"instruction {code:#x}")


X86, ARM = 0xC000003E, 0xC00000B7
CALLS = {  # numbers on x86_64 and aarch64, arguments, and whether the filter allows the call
    "read": (0, 63, [], True),
    "sendto": (44, 206, [3, 4096, 1, 0, 0, 0], True),
    "sendto with a flag": (44, 206, [3, 4096, 1, 1, 0, 0], False),
    "sendto an address": (44, 206, [3, 4096, 1, 0, 4096 << 32, 110], False),
    "socketpair": (53, 199, [1, 2], True),
    "socketpair of TIPC": (53, 199, [30, 1], False),
    "prlimit64 of itself": (302, 261, [0, 7, 4096], True),
    "prlimit64 of another": (302, 261, [77, 7], False),
    **{call: (x86, arm, [17], False) for call, x86, arm in (
        ("clone", 56, 220), ("clone3", 435, 435), ("ptrace", 101, 117), ("memfd_create", 319, 279),
        ("flock", 73, 32), ("vmsplice", 278, 75), ("setxattr", 188, 5), ("getxattr", 191, 8),
        ("socket", 41, 198), ("listen", 50, 201), ("sendmsg", 46, 211), ("file_setattr", 469, 469),
        ("msgrcv", 70, 188), ("semtimedop", 220, 192), ("io_setup", 206, 0), ("pidfd_getfd", 438, 438),
        ("rt_sigqueueinfo", 129, 138), ("rt_tgsigqueueinfo", 297, 240), ("timer_create", 222, 107),
        ("kill", 62, 129), ("fchmod", 91, 52), ("prctl", 157, 167), ("sync", 162, 81), ("new", 999, 999))},
    **{f"mmap {flags:#x}": (9, 222, [0, 4096, 3, flags], not flags & 1)
       for flags in (0x02, 0x22, 0x01, 0x21, 0x03, 0x23)},
    **{f"fcntl {command} {value:#x}": (72, 25, [3, command, value], allowed)
       for command, value, allowed in (
        (1, 0, True), (4, 0x800, True), (4, 0x2000, False), (8 | 1 << 40, 0, False),
        *((command, 0, False) for command in (6, 8, 10, 15, 1024, 1031)))},
    **{f"ioctl {command:#x}": (16, 29, [3, command], command == 0x5401)
       for command in (0x5401, 0x5423, 0x8901, 0x5452, 0x40086602, 0x401C5820)},
}  # fmt: skip
"""The kernel looks at 32 bits of commands, flags and process ids, and at 64 of an address."""


@pytest.mark.parametrize(("arch", "machine"), [(X86, "x86_64"), (ARM, "aarch64")])
def test_filters(arch, machine):
    program = (backends.HERE / "filters" / f"{machine}.bpf").read_bytes()
    for title, (x86, arm, arguments, allowed) in CALLS.items():
        answer = _action(program, arch, x86 if arch == X86 else arm, arguments)
        assert answer == ("allow" if allowed else "ENOSYS"), title
    # Calls of another processor, and 32-bit and x32 ones of the same.
    assert _action(program, ARM if arch == X86 else X86, 0) == _action(program, 0x40000003, 0) == "kill"
    if arch == X86:
        assert _action(program, arch, 57) == "ENOSYS"  # fork
        assert _action(program, arch, 0x40000000) == "kill"


LEFT_BEHIND = {
    "sleeping": "pass",
    "without a parent-death signal": "libc.prctl(1, 0, 0, 0, 0)",
    "ignoring signals": "for n in {*range(1, 65)} - {9, 19, 32, 33}: signal.signal(n, signal.SIG_IGN)",
    "in a session of its own": "os.setsid()",
    "in a child": "os.fork() and os._exit(0)",
    "in a thread": "threading.Thread(target=time.sleep, args=(600,)).start()\nlibc.syscall(60, 0)",
    "as another program": "os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(600)'])",
    "with closed channels": "os.closerange(0, 64)",
}
"""Ways of a program to go on when the process that started it is killed; each then sleeps."""


@pytest.mark.parametrize("way", quick(LEFT_BEHIND, "without a parent-death signal"))
def test_nothing_of_the_sandbox_outlives_a_killed_caller(each, way):
    """It is killed when the program has had time to go its way, or has ended."""
    indented = "\n".join(f"    {line}" for line in LEFT_BEHIND[way].splitlines())
    program = (
        "import ctypes, os, signal, sys, threading, time\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"try:\n{indented}\nexcept BaseException: pass\ntime.sleep(600)\n"
    )
    for name in (each.name, *(["unsafe-no-sandbox"] if way == "sleeping" else [])):
        given = f"Sandbox({name!r}, Limits(seconds=600)).check({program!r}, '', 'f')"
        with descendants() as living:
            before = living()
            caller = subprocess.Popen([sys.executable, "-c", f"from stages.sandbox import *; {given}"])
            begun = lambda: (living() - before) & set(processes("inside.py\0candidate"))  # noqa: B023, E731
            assert wait_for(lambda: begun() or caller.poll() is not None)  # noqa: B023
            time.sleep(1)  # the program begins to run only after it was loaded
            caller.kill()
            caller.wait()
            assert wait_for(lambda: not living() - before)  # noqa: B023


def test_each_back_end_lets_a_good_program_through_and_ends_an_endless_one(each):
    assert each.check(ADD, TESTS, "add").passed
    brief = Sandbox(each.name, Limits(seconds=1))
    assert brief.check("def add(a, b):\n    while True: pass\n", TESTS, "add").status == "timeout"
