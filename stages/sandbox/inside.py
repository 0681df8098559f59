"""Script of the sandboxed processes, standard library only: `inside.py ROLE LIMITS [--die-with-parent]`.

A program and its tests never share a process. The `candidate` loads the program and answers calls of its
function. The `judge` runs the tests against a stand-in for that function, which sends each call over a pipe,
and reports the verdict. Values cross the pipe as plain data of built-in types. So an object that claims to
equal everything never reaches a comparison, and nothing that the program does to its interpreter can change
the verdict. The role `plain` runs both in one process, as the benchmark's own script does.

Messages are JSON values, one per line: the process sends `"ready"`, then receives its job. The docstrings of
`candidate`, `judge` and `plain` describe the further messages.
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
MAX_ARGUMENTS = 10_000
"""Most characters of an exception's arguments, as JSON."""
PR_SET_PDEATHSIG = 1


class NotPlainData(Exception):
    """Raised for a value that has or contains a type other than plain data."""


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
    """Convert a value of built-in types to JSON; NotPlainData for any other type, also for a subclass."""
    kind = type(value)
    if depth > 100:
        raise NotPlainData("nested too deep")
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
    raise NotPlainData(kind.__name__)


def decode(value: Any) -> Any:
    """Invert `encode`; an iterator comes back as an iterator over a list."""
    if not isinstance(value, list):
        return value
    kind, *payload = value
    if kind == "int":
        return int(payload[0], 16)
    if kind == "float":
        return float.fromhex(payload[0])
    if kind == "complex":
        return complex(*map(float.fromhex, payload))
    if kind in ("bytes", "bytearray"):
        return getattr(builtins, kind)(base64.b85decode(payload[0]))
    if kind == "range":
        return range(*map(int, payload))
    if kind in _CONTAINERS:
        return _CONTAINERS[kind](map(decode, payload[0]))
    if kind == "dict":
        return {decode(k): decode(v) for k, v in payload[0]}
    if kind == "iterator":
        return iter([decode(item) for item in payload[0]])
    raise ValueError(f"no such kind of value: {kind!r:.40}")


class ChannelClosed(Exception):
    """Raised where the other end has closed the channel; EOFError may be the program's own."""


class Channel:
    """Sends and receives JSON lines over the original standard input and output.

    The program gets an empty standard input instead, and its standard output goes to standard error.
    """

    def __init__(self) -> None:
        self._in, self._out = os.fdopen(os.dup(0), "rb"), os.dup(1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)

    def send(self, value: Any) -> None:
        unsent = json.dumps(value).encode() + b"\n"
        while unsent:
            unsent = unsent[os.write(self._out, unsent) :]

    def receive(self) -> Any:
        line = self._in.readline(MAX_LINE)
        if not line.endswith(b"\n"):
            raise ChannelClosed
        return json.loads(line)


def _error_text(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def _arguments_of(error: BaseException) -> Any:
    """Encode what an exception was made of, so that the judge can make the same; else a part of its text."""
    with contextlib.suppress(NotPlainData):
        arguments = encode(tuple(error.args))  # UnicodeDecodeError takes five, and KeyError's text has quotes
        if len(json.dumps(arguments)) <= MAX_ARGUMENTS:
            return arguments
    return encode((str(error)[:300],))


def _module(name: str) -> dict[str, Any]:
    """Return the namespace of a new module, which dataclasses look up by its name."""
    module = sys.modules[name] = types.ModuleType(name)
    return module.__dict__


def candidate(channel: Channel, job: dict[str, str]) -> None:
    """Load the program of a job {program, entry} and answer calls of its function.

    Sends "loaded" or {"broken": why}. Then the reply to each call has `value`, `raised` or `strange` (the
    name of a type that is not plain data), and `changed` with the arguments if the call has changed them.
    """
    namespace = _module("program")  # not `__main__`: no main block runs
    try:
        exec(compile(job["program"], "program", "exec"), namespace)
        function = namespace[job["entry"]]
    except BaseException as error:
        channel.send({"broken": _error_text(error)})
        return
    channel.send("loaded")
    while True:
        call = channel.receive()
        arguments, keywords = map(decode, call)
        reply: dict[str, Any]
        try:
            reply = {"value": encode(function(*arguments, **keywords))}
        except NotPlainData as error:
            reply = {"strange": str(error)}
        except BaseException as error:
            kind = next(k for k in type(error).__mro__ if k.__module__ == "builtins")
            reply = {"raised": [kind.__name__, _arguments_of(error)]}
        with contextlib.suppress(NotPlainData):
            arguments_now = [encode(arguments), encode(keywords)]
            if arguments_now != call:
                reply["changed"] = arguments_now
        channel.send(reply)


def _update_in_place(argument: Any, changed: Any) -> None:
    """Give the caller's list, bytearray, set or dict the content that it has after the call."""
    if isinstance(argument, list | bytearray) and type(argument) is type(changed):
        argument[:] = changed
    elif isinstance(argument, set | dict) and isinstance(changed, set | dict):
        argument.clear()
        argument.update(changed)


def judge(channel: Channel, job: dict[str, str]) -> None:
    """Run the tests of a job {setup, tests, entry} against a stand-in for the program's function.

    Sends each call as [arguments, keywords], and at the end {"verdict", "why"}.
    """
    strange_types: list[str] = []

    def stand_in(*arguments: Any, **keywords: Any) -> Any:
        channel.send([encode(list(arguments)), encode(keywords)])
        reply = channel.receive()
        if "changed" in reply:
            changed, changed_keywords = map(decode, reply["changed"])
            pairs = [*zip(arguments, changed, strict=True)]
            pairs += [(keywords[name], changed_keywords[name]) for name in keywords]
            for argument, argument_now in pairs:
                _update_in_place(argument, argument_now)
        if "value" in reply:
            return decode(reply["value"])
        if "strange" in reply:
            strange_types.append(str(reply["strange"])[:80])
            raise TypeError(f"a result of type {strange_types[-1]}")
        name, error_arguments = reply["raised"]
        kind = getattr(builtins, name, None)
        is_exception = isinstance(kind, type) and issubclass(kind, Exception)
        # A test's `map` or generator would take it for its own end, and skip the rest of the test.
        is_exception &= kind is not StopIteration
        raise (kind if is_exception else RuntimeError)(*decode(error_arguments))

    namespace = _module("tests")
    try:
        exec(compile(job["setup"], "setup", "exec"), namespace)
        namespace[job["entry"]] = stand_in
        exec(compile(job["tests"], "tests", "exec"), namespace)
        if "check" in namespace:
            namespace["check"](stand_in)
        verdict, why = "passed", ""
    except ChannelClosed:
        raise
    except BaseException as error:
        verdict, why = "failed", _error_text(error)
    if strange_types:  # also if the tests caught the TypeError
        verdict, why = "suspicious", f"returned {strange_types[0]}"
    channel.send({"verdict": verdict, "why": why})


def plain(channel: Channel, job: dict[str, str]) -> None:
    """Run program and tests of a job {program, tests, entry} in one process, as HumanEval's script does."""
    namespace = _module("program")
    try:
        exec(compile(f"{job['program']}\n{job['tests']}", "program", "exec"), namespace)
        if "check" in namespace:
            namespace["check"](namespace[job["entry"]])
        verdict, why = "passed", ""
    except BaseException as error:
        verdict, why = "failed", _error_text(error)
    channel.send({"verdict": verdict, "why": why})


def main() -> None:
    if "--die-with-parent" in sys.argv:  # the safe back ends have the kernel do so themselves
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    channel = Channel()
    channel.send("ready")
    for name, value in json.loads(sys.argv[2]).items():  # the parent enforces the limit on wall time
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    role = {"candidate": candidate, "judge": judge, "plain": plain}[sys.argv[1]]
    with contextlib.suppress(ChannelClosed):
        role(channel, channel.receive())


if __name__ == "__main__":
    main()
