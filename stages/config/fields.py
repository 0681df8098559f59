"""The fields of a section: default, documentation, constraints, and whether they are part of an identity."""

import json
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from stages.errors import LoraparError

MOST_SAMPLES = 10_000
"""Of answers to one question: all are asked for, and kept in memory."""


def setting(
    default: Any,
    doc: str,
    in_cache_key: bool = True,
    ignored_by: str | tuple[str, ...] = (),
    **constraints: Any,
) -> Any:
    """A field. `not_for` names what does not read it, though it reads the section: see `identity`."""
    names = ignored_by if isinstance(ignored_by, str) else " ".join(ignored_by)
    marks: dict[str, Any] = {"identity": in_cache_key, "not_for": names}
    return Field(default, description=doc, json_schema_extra=marks, **constraints)


def named(kind: str, also: str = "") -> AfterValidator:
    """Validator: the name is `also`, or in the registry of this kind if there is one (see `known`)."""

    def check(name: str, info: ValidationInfo) -> str:
        registries = registries_from(info)
        if registries and name != also:
            refuse(lambda: registries[kind].check(name))
        return name

    return AfterValidator(check)


def without_false(entries: Any) -> Any:
    """The entries of a mapping that are not `false`, which takes away what the extended file has there."""
    if not isinstance(entries, dict):
        return entries
    return {name: entry for name, entry in entries.items() if entry is not False}


WithoutFalse = BeforeValidator(without_false)


def plain(value: Any) -> Any:
    """ValueError for what JSON cannot hold, such as a date."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected text, numbers, lists and mappings: {error}") from None
    return value


Plain = AfterValidator(plain)


def registries_from(info: ValidationInfo) -> Mapping[str, Any]:
    """The registries by kind: `scorers`, `strategies`, `personas`, `benchmarks`, `engines`, `rewards`.

    There are none where a section is made in code rather than read from YAML.
    """
    return info.context or {}


def refuse(check: Callable[[], Any]) -> None:
    """Run `check`, and turn its LoraparError into a ValueError, which pydantic collects."""
    try:
        check()
    except LoraparError as error:
        raise ValueError(f"{error}; {error.hint}" if error.hint else str(error)) from None


LONGEST = 1e9
"""Seconds, that clocks and sockets take."""
LARGEST = 2**32 - 1
"""Of whole numbers: the largest seed that numpy takes, and more than any count here can be."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _fits_a_machine(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError(f"at most {LARGEST} in size")
        return value


def cache_key_fields(value: Any, *readers: str) -> Any:
    """The part of a section that determines a result, as plain JSON values.

    readers: the names of the stage and of its variant; a section's own strategy is another, for what is below
    it, too. Fields that are `not_for` one of them are left out.
    """
    if isinstance(value, Section):
        readers = (*readers, getattr(value, "strategy", ""))
        kept = {}
        for name, field in type(value).model_fields.items():
            marks = field.json_schema_extra
            if not isinstance(marks, dict) or (
                marks["identity"] and not set(str(marks["not_for"]).split()) & set(readers)
            ):
                kept[name] = cache_key_fields(getattr(value, name), *readers)
        return kept
    if isinstance(value, list | tuple):
        return [cache_key_fields(item, *readers) for item in value]
    return value


def check_url(name: str, url: str) -> None:
    """ValueError unless this is the address of a server."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0
    except ValueError:  # of a port or a host that is none
        good = False
    if not good or not url.isprintable() or " " in url:
        raise ValueError(f"{name} {url!r} is no address: expected http://HOST:PORT/…")


def as_decimal_fraction(value: float) -> Fraction:
    """The decimal as a person has typed it: 0.9 is 9/10, and not the nearest double."""
    return Fraction(str(value))
