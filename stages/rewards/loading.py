"""Finds the functions that `rl.rewards` names: registered ones, TRL's own, and those of a person's file."""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import json
import math
import reprlib
import sys
from collections.abc import Callable, Iterable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from stages.errors import (
    ConfigError,
    DataError,
    LoraparError,
    MeaninglessError,
    MissingInputError,
    SandboxError,
    lacks_memory,
)
from stages.rewards.builtin import rewards
from stages.sandbox.pair import SandboxFailure

Reward = Callable[..., list[float | None]]

TRL = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")
"""TRL's rewards that need no arguments, as `trl.NAME`; others take three lines in a rewards_file."""
PASSED = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "sandbox"}
"""Parameters that a reward may have and that no row has to supply."""
RESPONSES = ("answer", "output", "completion", "solution", "ground_truth", "target")
"""Names that others have for what is called response or gold here."""
TAKEN = PASSED | {"prompt", "completion", "image", "images", "environment", "environments"}
"""Names that mean something else to TRL: a row's field of that name is kept from it."""


def check(name: str, file: str | None) -> None:
    """ConfigError unless there is a reward of that name. Runs nothing: the file is only parsed."""
    own = _defined(file) if file else {}
    if name in own or name in rewards.names() or name in _trl_names():
        return
    raise ConfigError(
        f"unknown reward {name!r}", f"choose from: {', '.join([*rewards.names(), *_trl_names(), *own])}"
    )


def load(name: str, file: str | None) -> Reward:
    """The function called `name`; one in the file takes precedence over a registered one."""
    if file and name in _defined(file):
        return getattr(_module(file), name)  # type: ignore[no-any-return]
    if name in _trl_names():
        return _of_trl(name)
    return rewards.pick(name)


def columns(name: str, function: Reward) -> list[str]:
    """The row fields that a reward needs."""
    if name in _trl_names():
        return ["gold"] if "accuracy" in name else []
    parameters = inspect.signature(function).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [p.name for p in parameters if p.kind in kinds and p.default is p.empty]
    return [name for name in needed if name not in PASSED]


def named(function: Reward) -> set[str]:
    """The fields that a reward has a parameter for, also one with a default."""
    return set(inspect.signature(function).parameters) - TAKEN


def optional(rows: list[dict[str, Any]]) -> set[str]:
    """The fields that all rows have, as a text, number or truth value: rewards get them without asking.

    A field of lists or objects, of several types, or of numbers beyond 64 bits, reaches only a reward that
    has a parameter for it. Whole numbers and fractions are one type.
    """
    kinds = [
        {name: float if type(value) is int else type(value) for name, value in row.items()} for row in rows
    ]
    common = set.intersection(*({*kind.items()} for kind in kinds))
    plain = {name for name, kind in common if kind in (str, float, bool) and name not in TAKEN}
    return plain - beyond(rows, plain)


def encoded(rows: list[dict[str, Any]], names: Iterable[str]) -> frozenset[str]:
    """Those of these fields that a column of one type would change: they go through it as JSON."""
    kinds = {name: {type(row.get(name)) for row in rows} - {type(None)} for name in names}
    large = beyond(rows, kinds)
    return frozenset(n for n, found in kinds.items() if len(found) > 1 or found & {list, dict} or n in large)


def beyond(rows: list[dict[str, Any]], names: Iterable[str]) -> set[str]:
    """Which of these fields hold a whole number of more than 64 bits, which no column takes."""
    return {n for n in names for row in rows if type(row.get(n)) is int and not -(2**63) <= row[n] < 2**63}


def needs_sandbox(name: str, file: str | None) -> bool:
    """Whether a reward has a parameter `sandbox` to be filled. Runs nothing: the file is only parsed."""
    if file and (own := _defined(file).get(name)):
        given = own.args
        return any(a.arg == "sandbox" for a in (*given.posonlyargs, *given.args, *given.kwonlyargs))
    return name not in _trl_names() and "sandbox" in inspect.signature(rewards.pick(name)).parameters


def checked(name: str, function: Reward, decoded: Iterable[str] = (), **fixed: Any) -> Reward:
    """`function` with the arguments `fixed`, the columns `decoded` from JSON, and with checks.

    If it raises, or returns anything but finite numbers and None, the run stops with the reward's name and
    the sample.
    """

    def reward(completions: list[str], **given: Any) -> list[float | None]:
        call = functools.partial(function, **fixed)
        given |= {key: [json.loads(text) for text in given[key]] for key in decoded if key in given}
        try:
            values = list(call(completions=completions, **given))
        except SandboxFailure as error:
            raise SandboxError(f"reward {name}: {error}", "see: lorapar doctor") from error
        except Exception as error:
            if isinstance(error, LoraparError) or lacks_memory(error):
                raise  # nothing of the reward's
            raise _raised(name, error, completions, given, call) from error
        if len(values) != len(completions):
            raise MeaninglessError(
                f"reward {name} gave {len(values)} values for {len(completions)} completions"
            )
        return [_finite(name, value, text) for value, text in zip(values, completions, strict=True)]

    reward.__name__ = name
    return reward


def _finite(name: str, value: Any, text: str) -> float | None:
    """The value as a float; None is TRL's way to say that a reward does not apply to a sample."""
    if value is None:
        return None
    try:
        found = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last is that of a tensor of many
        found = math.nan
    if not math.isfinite(found):
        raise MeaninglessError(
            f"reward {name} is {reprlib.repr(value)} for {text!r}", "a reward is a finite number, or None"
        )
    return found


def _raised(
    name: str, error: Exception, completions: list[str], given: dict[str, Any], call: Reward
) -> LoraparError:
    """The error to raise, with the first sample for which the reward also raises on its own."""
    number = len(completions)
    lists = {key: value for key, value in given.items() if isinstance(value, list) and len(value) == number}
    at = next((i for i in range(number) if _raises(call, completions, given, lists, i)), 0)
    asked = f" to {lists['question'][at]!r}" if "question" in lists else ""
    return MeaninglessError(
        f"reward {name} raised {type(error).__name__}: {error}; "
        f"sample {at + 1} of {number}: {completions[at]!r}{asked}",
        "mend the reward and run the same command; with another rewards_file RL begins anew",
    )


def _raises(
    call: Reward, completions: list[str], given: dict[str, Any], lists: dict[str, list[Any]], at: int
) -> bool:
    try:
        call(completions=[completions[at]], **{**given, **{key: [value[at]] for key, value in lists.items()}})
    except Exception:
        return True
    return False


def require(needed: dict[str, list[str]], rows: list[dict[str, Any]]) -> None:
    """DataError unless every row has the columns that each reward reads."""
    for name, wanted in needed.items():
        for column in wanted:
            lacking = [row for row in rows if row.get(column) is None]
            if not lacking:
                continue
            hint = f"add the field {column} to the rows, or leave the reward out of rl.rewards"
            if column == "gold":
                hint = "rows need `gold`, or a response that ends in `#### answer`"
            elif column in RESPONSES:
                hint = "lorapar calls a row's answer `response`, and what can be verified of it `gold`"
            raise DataError(
                f"reward {name} reads {column}, and {len(lacking)} of {len(rows)} RL rows have none "
                f"(first: {lacking[0]['id']})",
                hint,
            )


def _trl_names() -> list[str]:
    return [f"trl.{name}" for name in TRL]


def _of_trl(name: str) -> Reward:
    """TRL's function for plain texts: itself it takes conversations, with gold answers as `solution`."""
    from trl import rewards as module

    function = getattr(module, name.removeprefix("trl."))
    if "accuracy" in name and importlib.util.find_spec("math_verify") is None:
        raise ConfigError(f"reward {name} needs the package math-verify", "pip install math-verify")

    def reward(completions: list[str], gold: list[str] | None = None, **given: Any) -> list[float | None]:
        said = [[{"role": "assistant", "content": text}] for text in completions]
        solution = {"solution": gold} if gold else {}
        return function(completions=said, **given | solution)  # type: ignore[no-any-return]

    return reward


def _defined(file: str) -> dict[str, ast.FunctionDef]:
    """The public functions at the top level of a person's file, by name."""
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise MissingInputError(f"rl.rewards_file {file}: {error.strerror}") from None
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"rl.rewards_file {file} is not Python: {error}") from None
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {function.name: function for function in functions if not function.name.startswith("_")}


@functools.cache
def _module(file: str) -> Any:
    loader = SourceFileLoader("lorapar_rewards_file", file)  # whatever the file is called
    module = ModuleType(loader.name)
    module.__file__ = file
    sys.modules[loader.name] = module  # dataclasses and pickle look for it there
    try:
        loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"rl.rewards_file {file} does not load: {type(error).__name__}: {error}") from error
    return module
