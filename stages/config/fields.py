"""What a field of a section is: its default, its documentation, its constraints, and whether it is part of an identity."""

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

from stages.errors import LoraparError


def setting(default: Any, doc: str, identity: bool = True, not_for: str = "", **constraints: Any) -> Any:
    """A field; `not_for` names the one stage, or variant of one, that reads its section and not this field."""
    return Field(
        default, description=doc, json_schema_extra={"identity": identity, "not_for": not_for}, **constraints
    )


def named(kind: str) -> AfterValidator:
    """A name that the registry of this kind must know; the registries come with the validation, by `known`."""

    def check(name: str, info: ValidationInfo) -> str:
        if registries := known(info):
            refuse(lambda: registries[kind].check(name))
        return name

    return AfterValidator(check)


def known(info: ValidationInfo) -> Mapping[str, Any]:
    """Registries by kind: `scorers`, `strategies`, `personas`, `benchmarks`, `rewards`. Empty where a section is made in code."""
    return info.context or {}


def refuse(check: Callable[[], Any]) -> None:
    """Turn what `check` raises for a person into what pydantic collects."""
    try:
        check()
    except LoraparError as error:
        raise ValueError(f"{error}; {error.hint}" if error.hint else str(error)) from None


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


def identity(value: Any, *readers: str) -> Any:
    """The part of a section that determines a result, as plain JSON values.

    readers: names of the stage and of its variant, for fields that are `not_for` them.
    """
    if isinstance(value, Section):
        marks = {name: field.json_schema_extra for name, field in type(value).model_fields.items()}
        kept = [
            n
            for n, m in marks.items()
            if not isinstance(m, dict) or (m["identity"] and m["not_for"] not in readers)
        ]
        return {name: identity(getattr(value, name), *readers) for name in kept}
    if isinstance(value, list):
        return [identity(item, *readers) for item in value]
    return value
