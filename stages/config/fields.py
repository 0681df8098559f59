"""Declares and validates settings: defaults, descriptions, constraints and their part in cache keys."""

import json
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from functools import partial
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from stages.errors import LoraparError

MARKS = ("in_cache_key", "ignored_by", "advanced")
"""What `setting` says of a field for lorapar itself, beside what pydantic knows."""


def setting(
    default: Any,
    doc: str | None = None,
    in_cache_key: bool = True,
    ignored_by: str | tuple[str, ...] = (),
    advanced: bool = False,
    **constraints: Any,
) -> Any:
    """Declare a setting with its default, its description and constraints such as `gt=0`.

    doc: a short description; longer ones stand below the setting.
    in_cache_key: False if the setting changes no result, or if a digest of what it names is in the key.
    ignored_by: readers of the section that do not use this setting (see `cache_key_fields`).
    advanced: `lorapar config` prints the setting after those that most users set.
    """
    ignoring = [ignored_by] if isinstance(ignored_by, str) else list(ignored_by)
    marks: Any = dict(zip(MARKS, (in_cache_key, ignoring, advanced), strict=True))
    return Field(default, description=doc, json_schema_extra=marks, **constraints)


advanced = partial(setting, advanced=True)
unkeyed = partial(setting, in_cache_key=False)
advanced_unkeyed = partial(advanced, in_cache_key=False)
"""A setting that few users change, one that is `in_cache_key=False`, and one that is both."""
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
Seconds = Annotated[float, Field(gt=0, le=1e9)]
"""Time limit; clocks and sockets accept no longer one."""
Samples = Annotated[int, Field(gt=0, le=10_000)]
"""Number of answers to one question; all of them are requested and kept in memory."""


def marks_of(field: FieldInfo) -> dict[str, Any]:
    """Return the MARKS of a field that was declared with `setting`."""
    assert isinstance(field.json_schema_extra, dict)
    return field.json_schema_extra


def registry_name(kind: str, also: str = "") -> AfterValidator:
    """Return a validator that accepts `also` and the names in the registry of this kind.

    Any name is valid if the validation context has no registries (see `registries_from`).
    """

    def check(name: str, info: ValidationInfo) -> str:
        registries = registries_from(info)
        if registries and name != also:
            as_value_error(lambda: registries[kind].check(name))
        return name

    return AfterValidator(check)


def without_false(entries: Any) -> Any:
    """Drop entries that are `false`, by which a config removes entries of the file that it extends."""
    if not isinstance(entries, dict):
        return entries
    return {name: entry for name, entry in entries.items() if entry is not False}


def json_value(value: Any) -> Any:
    """Return `value`; ValueError if JSON cannot represent it, such as a date."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected text, numbers, lists and mappings: {error}") from None
    return value


WithoutFalse, JsonValue = BeforeValidator(without_false), AfterValidator(json_value)


def registries_from(info: ValidationInfo) -> Mapping[str, Any]:
    """Return the registries by kind: `scorers`, `strategies`, `personas`, `benchmarks`, `engines`, `rewards`.

    The mapping is empty if the section is built in code and not read from YAML.
    """
    return info.context or {}


def as_value_error(check: Callable[[], Any]) -> None:
    """Run `check` and turn its LoraparError into a ValueError, which pydantic collects."""
    try:
        check()
    except LoraparError as error:
        raise ValueError(f"{error}; {error.hint}" if error.hint else str(error)) from None


MAX_INT = 2**32 - 1
"""Largest integer setting: numpy accepts no larger seed, and no count here is larger."""


class Section(BaseModel):
    """Base class of all sections: immutable, without unknown settings, infinities or huge integers."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @field_validator("*")
    @classmethod
    def _limit_integers(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) > MAX_INT:
            raise ValueError(f"at most {MAX_INT} in size")
        return value

    def conflicts(self, registries: Mapping[str, Any]) -> Iterable[str]:
        """Return what is wrong with values that are valid each by itself; the first of it is told.

        registries: see `registries_from`.
        """
        return ()

    @model_validator(mode="after")
    def _refuse_conflict(self, info: ValidationInfo) -> Self:
        for conflict in self.conflicts(registries_from(info)):
            raise ValueError(conflict)
        return self


def cache_key_fields(value: Any, *readers: str) -> Any:
    """Return the settings of a section that determine a result, as plain JSON values.

    readers: names that a setting's `ignored_by` may list. They share one namespace: the stage (`classify`),
    its variant (`partition:rl`) and, for a section with a `strategy` and all sections below it, the name of
    the strategy, which is added here. A setting that any of the readers ignores is left out.
    """
    if isinstance(value, Section):
        readers = (*readers, getattr(value, "strategy", ""))
        keyed = {}
        for name, field in type(value).model_fields.items():
            marks = marks_of(field)
            if marks["in_cache_key"] and not set(marks["ignored_by"]) & set(readers):
                keyed[name] = cache_key_fields(getattr(value, name), *readers)
        return keyed
    if isinstance(value, list | tuple):
        return [cache_key_fields(item, *readers) for item in value]
    return value


def check_url(name: str, url: str) -> None:
    """Raise ValueError, which calls the setting `name`, unless `url` is the http(s) address of a server."""
    try:
        address = urlsplit(url)
        valid = address.scheme in ("http", "https") and address.hostname and (address.port or 1) > 0
    except ValueError:  # malformed port or host
        valid = False
    if not valid or not url.isprintable() or " " in url:
        raise ValueError(f"{name} {url!r} is not a URL: expected http://HOST:PORT/…")
    if address.username or address.password:
        raise ValueError(
            f"{name} has a password in it, which artifacts and pages would show: use api_key_env"
        )


def as_decimal_fraction(value: float) -> Fraction:
    """Return the decimal as it was typed: 0.9 is exactly 9/10, not the nearest double."""
    return Fraction(str(value))
