"""Calls of rewards: the fields of a row that they get, and checks of what they return."""

import functools
import inspect
import json
import math
import reprlib
from collections.abc import Callable, Iterable
from typing import Any

from stages.errors import ConfigError, DataError, LoraparError, SandboxError, UnusableResult, is_out_of_memory
from stages.rewards.builtin import rewards
from stages.sandbox import Sandbox, SandboxFailure

Reward = Callable[..., list[float | None]]

FIELDS = "fields"
"""Column of the data set with all fields of a row that rewards read, as JSON.

An Arrow column has one type, which would change lists, objects, mixed types and integers beyond 64 bits.
"""
PASSED = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "sandbox"}
"""Parameters of a reward that do not come from a field of the rows."""
RESPONSES = ("answer", "output", "completion", "solution", "ground_truth", "target")
"""Names that other libraries use for what is called response or gold here."""
TAKEN = PASSED | {"prompt", "completion"}
"""Names with a meaning of their own: fields of the rows with these names are not passed on."""


def required_fields(function: Reward) -> list[str]:
    """Return the fields of the rows that a reward requires: its parameters without a default."""
    parameters = inspect.signature(function).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    required = [p.name for p in parameters if p.kind in kinds and p.default is p.empty]
    return [name for name in required if name not in PASSED]


def check_signature(name: str, function: Reward, columns: Iterable[str]) -> None:
    """Raise ConfigError unless a reward takes all that it is called with. columns: of the rows."""
    signature = inspect.signature(function)
    passed = PASSED | (set(columns) - TAKEN)
    if "sandbox" not in signature.parameters:
        passed.discard("sandbox")
    try:
        signature.bind(**dict.fromkeys(sorted(passed)))
    except TypeError as error:
        raise ConfigError(
            f"reward {name}{signature} cannot be called: {error}",
            f"let it take what it does not read: def {name}(completions, …, **_)",
        ) from None


def passed_fields(rows: list[dict[str, Any]], functions: dict[str, Reward]) -> list[dict[str, Any]]:
    """Return what the rewards get of each row: the same fields of all rows.

    functions: the rewards by name. ConfigError unless each takes all that it is called with.
    """
    required = {field for function in functions.values() for field in required_fields(function)}
    parameters = {
        field for function in functions.values() for field in inspect.signature(function).parameters
    }
    optional = set().union(*rows) & parameters - TAKEN
    names = sorted({"question"} | required | optional | common_fields(rows))
    for name, function in functions.items():
        check_signature(name, function, names)
    return [{name: row.get(name) for name in names} for row in rows]


def common_fields(rows: list[dict[str, Any]]) -> set[str]:
    """Return the fields that every reward gets: those that all rows have as a string, number or boolean.

    A field of lists or objects, or of several types, is passed only to a reward that has a parameter for it.
    Integers and floats count as one type.
    """
    types_of_rows = [
        {(name, float if type(value) is int else type(value)) for name, value in row.items()} for row in rows
    ]
    common = set.intersection(*types_of_rows)
    return {name for name, type_ in common if type_ in (str, float, bool) and name not in TAKEN}


def needs_sandbox(names: Iterable[str], file: str | None) -> bool:
    """True if one of these rewards has a parameter `sandbox`; the file is parsed, not run."""
    in_file = rewards.in_file(file)
    own = [in_file[name].args for name in names if name in in_file]
    parameters = {given.arg for of in own for given in (*of.posonlyargs, *of.args, *of.kwonlyargs)}
    for name in set(names) - set(in_file):
        parameters |= set(inspect.signature(rewards.pick(name)).parameters)
    return "sandbox" in parameters


def with_checks(name: str, function: Reward, sandbox: Sandbox | None = None) -> Reward:
    """Wrap a reward function with checks of its results.

    If it raises, or returns anything but finite numbers and None, the run stops with the reward's name and
    the sample. It gets the columns in FIELDS. sandbox: for one that `needs_sandbox`.
    """
    call = functools.partial(function, sandbox=sandbox) if sandbox else function

    def reward(completions: list[str], **columns: Any) -> list[float | None]:
        rows = [json.loads(text) for text in columns.pop(FIELDS, ())]
        columns |= {key: [row[key] for row in rows] for key in (rows[0] if rows else ())}
        try:
            returned = call(completions=completions, **columns)
            values = list([] if returned is None else returned)
        except SandboxFailure as error:
            raise SandboxError(f"reward {name}: {error}", "see: lorapar doctor") from error
        except Exception as error:
            if isinstance(error, LoraparError) or is_out_of_memory(error):
                raise  # not a mistake in the reward function
            raise _error_with_sample(name, error, completions, columns, call) from error
        if len(values) != len(completions):
            raise UnusableResult(
                f"reward {name} gave {len(values)} values for {len(completions)} completions"
            )
        return [_finite(name, value, text) for value, text in zip(values, completions, strict=True)]

    reward.__name__ = name
    return reward


def _finite(name: str, value: Any, text: str) -> float | None:
    """Return a reward as a float; UnusableResult if it is not a finite number.

    None stays None: in TRL it means that the reward does not apply to the sample.
    """
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several values
        number = math.nan
    if not math.isfinite(number):
        raise UnusableResult(
            f"reward {name} is {reprlib.repr(value)} for {text!r}", "a reward is a finite number, or None"
        )
    return number


def _error_with_sample(
    name: str, error: Exception, completions: list[str], columns: dict[str, Any], call: Reward
) -> LoraparError:
    """Return an error that names the first sample for which the reward raises, called with it alone."""
    number = len(completions)
    lists = {key: value for key, value in columns.items() if isinstance(value, list) and len(value) == number}
    sample = ""
    for index, text in enumerate(completions):
        of_sample = {key: values[index : index + 1] for key, values in lists.items()}
        try:
            call(completions=[text], **{**columns, **of_sample})
        except Exception:
            question = f" to {lists['question'][index]!r}" if "question" in lists else ""
            sample = f"; sample {index + 1} of {number}: {text!r}{question}"
            break
    return UnusableResult(
        f"reward {name} raised {type(error).__name__}: {error}{sample}",
        "mend the reward and run the same command; with another rewards_file RL begins anew",
    )


def check_fields(needed: dict[str, list[str]], rows: list[dict[str, Any]]) -> None:
    """Raise DataError unless every row has the columns that each reward reads."""
    for name, column in missing_fields(needed, rows):
        lacking = [row for row in rows if row.get(column) is None]
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


def missing_fields(needed: dict[str, list[str]], rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return each reward with each column that it reads and some row lacks."""
    return [
        (name, column)
        for name, columns in needed.items()
        for column in columns
        if any(row.get(column) is None for row in rows)
    ]
