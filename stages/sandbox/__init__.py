"""Sandbox for programs that a model wrote, so that they cannot harm the machine.

`from_settings` returns one. `inside.py` and `landlock.py` run in the sandboxed processes, `pair.py` runs a
program against its tests, and `backends.py` starts the processes. This package needs only the standard
library and `stages.errors`.
"""

from collections.abc import Callable
from typing import Any

from stages.errors import SandboxError
from stages.sandbox import pair
from stages.sandbox.backends import BACKENDS, Limits
from stages.sandbox.pair import SandboxFailure, Verdict
from stages.sandbox.selftest import selftest

__all__ = ["Limits", "Sandbox", "SandboxFailure", "backend_problems", "from_settings"]

SAFE = ("bubblewrap", "landlock")
HINT = (
    "install bubblewrap (apt install bubblewrap); on Ubuntu 23.10 or later also: sysctl -w "
    "kernel.apparmor_restrict_unprivileged_userns=0; see lorapar doctor. Without one, at your own risk: "
    "--set eval.sandbox.backend=unsafe-no-sandbox, or rl. in place of eval."
)


class Sandbox:
    """Back end with limits. `name` is `bubblewrap`, `landlock` or `unsafe-no-sandbox`."""

    def __init__(self, name: str, limits: Limits) -> None:
        self.name, self.limits = name, limits

    def check(self, program: str, tests: str, entry: str, setup: str = "") -> Verdict:
        """Run `tests` on the function `entry` of `program`; `setup` is trusted code that the tests need too.

        SandboxFailure if the sandbox itself fails twice.
        """
        try:
            return pair.check(BACKENDS[self.name], program, tests, entry, setup, self.limits)
        except SandboxFailure:
            return pair.check(BACKENDS[self.name], program, tests, entry, setup, self.limits)

    def check_in_one_process(self, program: str, tests: str, entry: str) -> bool:
        """True if the tests pass with program and tests in one process, as in HumanEval's own script."""
        return pair.plain(BACKENDS[self.name], program, tests, entry, self.limits)


def backend_problems() -> dict[str, list[str]]:
    """Test each safe back end on this machine. Returns its problems, one line each; an empty list if none."""
    return {name: selftest(BACKENDS[name]) for name in SAFE}


def from_settings(section: Any, say: Callable[[str], None]) -> Sandbox:
    """Return the sandbox that a SandboxSection selects; `auto` takes the first safe one that works here.

    SandboxError if none passes its self-test.
    """
    name, limits = section.backend, Limits(section.seconds, section.memory_mb)
    if name == "refuse":
        raise SandboxError(
            "code that a model wrote would run here, and sandbox.backend is refuse", "choose auto"
        )
    if name == "unsafe-no-sandbox":
        say("warning: code that a model wrote runs WITHOUT a sandbox: it can do whatever you can")
        return Sandbox(name, limits)
    reasons = []
    for candidate in SAFE if name == "auto" else [name]:
        problems = selftest(BACKENDS[candidate])
        if not problems:
            return Sandbox(candidate, limits)
        reasons.append(f"{candidate}: {problems[0]}")
    raise SandboxError(f"no sandbox works here ({'; '.join(reasons)})", HINT)
