"""Runs in a sandbox, with the standard library only: `inside.py ROLE LIMITS [--die-with-parent]`.

A program and its tests never share a process. The `candidate` loads the program and answers calls of its
function. The `judge` runs the tests against a stand-in for that function, which sends each call over a pipe,
and reports the verdict. Values cross the pipe as plain data of built-in types. So an object that claims to
equal everything never reaches a comparison, and nothing that the program does to its interpreter can change
the verdict. The role `plain` runs both in one process, as the benchmark's own script does.

Messages are JSON values, one per line: the process sends `"ready"`, then receives its job. The functions
below describe the rest.
"""

import base64
import builtins
import collections
import contextlib
import json
import os
import resource
import sys
import types
from typing import Any

MAX_LINE = 4 * 2**20
MAX_ITEMS = 10**6
PR_SET_PDEATHSIG = 1


class Strange(Exception):
    """A value whose type is not plain data."""


_CONTAINERS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_MAPPINGS = (dict, collections.OrderedDict, collections.defaultdict, collections.Counter)
_ITERATORS: tuple[type, ...] = (
    types.GeneratorType,
    map,
    filter,
    zip,
    enumerate,
    reversed,
    type(iter([])),
    type(iter(())),
)


def encode(value: Any, depth: int = 0) -> Any:
    """Plain JSON for a value of built-in types; Strange if it has or contains another type or a subclass."""
    kind = type(value)
    if depth > 100:
        raise Strange("nested too deep")
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        return ["int", format(value, "x")]
    if kind is float:
        return ["float", value.hex()]
    if kind is complex:
        return ["complex", value.real.hex(), value.imag.hex()]
    if kind in (bytes, bytearray):
        return [kind.__name__, base64.b85encode(value).decode()]
    if kind is range:
        return ["range", *map(str, (value.start, value.stop, value.step))]
    if kind in _CONTAINERS.values():
        return [kind.__name__, [encode(item, depth + 1) for item in value]]
    if kind in _MAPPINGS:
        return ["dict", [[encode(k, depth + 1), encode(v, depth + 1)] for k, v in value.items()]]
    if kind in _ITERATORS:
        items = [item for _, item in zip(range(MAX_ITEMS), value, strict=False)]
        return ["iterator", [encode(item, depth + 1) for item in items]]
    raise Strange(kind.__name__)


def decode(value: Any) -> Any:
    """The value that `encode` was given; iterators come back as iterators."""
    if not isinstance(value, list):
        return value
    kind, *rest = value
    if kind == "int":
        return int(rest[0], 16)
    if kind == "float":
        return float.fromhex(rest[0])
    if kind == "complex":
        return complex(*map(float.fromhex, rest))
    if kind in ("bytes", "bytearray"):
        return getattr(builtins, kind)(base64.b85decode(rest[0]))
    if kind == "range":
        return range(*map(int, rest))
    if kind in _CONTAINERS:
        return _CONTAINERS[kind](map(decode, rest[0]))
    if kind == "dict":
        return {decode(k): decode(v) for k, v in rest[0]}
    if kind == "iterator":
        return iter([decode(item) for item in rest[0]])
    raise ValueError(f"no such kind of value: {kind!r:.40}")


class Channel:
    """JSON lines over the original standard input and output.

    The program has an empty standard input instead, and its output goes to the error stream.
    """

    def __init__(self) -> None:
        self._in, self._out = os.fdopen(os.dup(0), "rb"), os.dup(1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)

    def send(self, value: Any) -> None:
        data = json.dumps(value).encode() + b"\n"
        while data:
            data = data[os.write(self._out, data) :]

    def receive(self) -> Any:
        line = self._in.readline(MAX_LINE)
        if not line.endswith(b"\n"):
            raise EOFError
        return json.loads(line)


def limit(limits: dict[str, int]) -> None:
    """Lower the limits of this process for good. They hold whatever it does; the parent limits wall time."""
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def candidate(channel: Channel, job: dict[str, str]) -> None:
    """Job {program, entry}. Sends "loaded" or {"broken": why}, then value, raised or strange per call.

    Arguments that the call has changed are sent, too, as `changed`.
    """
    space: dict[str, Any] = {"__name__": "program"}  # a `__main__` part does not run
    try:
        exec(compile(job["program"], "program", "exec"), space)
        function = space[job["entry"]]
    except BaseException as error:
        channel.send({"broken": _said(error)})
        return
    channel.send("loaded")
    while True:
        sent = channel.receive()
        arguments, named = map(decode, sent)
        answer: dict[str, Any]
        try:
            answer = {"value": encode(function(*arguments, **named))}
        except Strange as error:
            answer = {"strange": str(error)}
        except BaseException as error:
            kind = next(k for k in type(error).__mro__ if k.__module__ == "builtins")
            answer = {"raised": [kind.__name__, str(error)[:300]]}
        with contextlib.suppress(Strange):
            now = [encode(arguments), encode(named)]
            if now != sent:
                answer["changed"] = now
        channel.send(answer)


def _change(kept: Any, now: Any) -> None:
    """Make a caller's list, dict or set what the call has made of it."""
    if isinstance(kept, list | bytearray) and type(kept) is type(now):
        kept[:] = now
    elif isinstance(kept, set | dict) and isinstance(now, set | dict):
        kept.clear()
        kept.update(now)


def judge(channel: Channel, job: dict[str, str]) -> None:
    """Job {setup, tests, entry}. Sends calls as [arguments, named], and at the end {"verdict", "why"}."""
    strange: list[str] = []

    def stand_in(*arguments: Any, **named: Any) -> Any:
        channel.send([encode(list(arguments)), encode(named)])
        answer = channel.receive()
        if "changed" in answer:
            listed, by_name = map(decode, answer["changed"])
            for mine, its in [*zip(arguments, listed, strict=True), *((named[n], by_name[n]) for n in named)]:
                _change(mine, its)
        if "value" in answer:
            return decode(answer["value"])
        if "strange" in answer:
            strange.append(str(answer["strange"])[:80])
            raise TypeError(f"a result of type {strange[-1]}")
        name, text = answer["raised"]
        kind = getattr(builtins, name, None)
        known = isinstance(kind, type) and issubclass(kind, Exception)
        raise (kind if known else RuntimeError)(text)

    space: dict[str, Any] = {"__name__": "tests"}
    try:
        exec(compile(job["setup"], "setup", "exec"), space)
        space[job["entry"]] = stand_in
        exec(compile(job["tests"], "tests", "exec"), space)
        if "check" in space:
            space["check"](stand_in)
        verdict, why = "passed", ""
    except EOFError:
        raise
    except BaseException as error:
        verdict, why = "failed", _said(error)
    if strange:  # also where the tests caught the error
        verdict, why = "suspicious", f"returned {strange[0]}"
    channel.send({"verdict": verdict, "why": why})


def plain(channel: Channel, job: dict[str, str]) -> None:
    """Job {program, tests, entry}. Runs program and tests in one process, as HumanEval's script does."""
    space: dict[str, Any] = {"__name__": "program"}
    try:
        exec(compile(f"{job['program']}\n{job['tests']}", "program", "exec"), space)
        if "check" in space:
            space["check"](space[job["entry"]])
        verdict, why = "passed", ""
    except BaseException as error:
        verdict, why = "failed", _said(error)
    channel.send({"verdict": verdict, "why": why})


def _die_with_parent() -> None:
    """As the sandboxes see to it themselves."""
    import ctypes
    import signal

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def main() -> None:
    if "--die-with-parent" in sys.argv:
        _die_with_parent()
    channel = Channel()
    channel.send("ready")
    limit(json.loads(sys.argv[2]))
    role = {"candidate": candidate, "judge": judge, "plain": plain}[sys.argv[1]]
    with contextlib.suppress(EOFError):
        role(channel, channel.receive())


if __name__ == "__main__":
    main()
