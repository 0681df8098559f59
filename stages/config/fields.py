"""What a field of a section is: its default, its documentation, its constraints, and whether it is part of an identity."""

import importlib
from typing import Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from stages.errors import LoraparError


def setting(default: Any, doc: str, identity: bool = True, not_for: str = "", **constraints: Any) -> Any:
    """A field; `not_for` names the one stage that reads its section and not this field."""
    return Field(default, description=doc, json_schema_extra={"identity": identity, "not_for": not_for}, **constraints)


def named(module: str, registry: str) -> AfterValidator:
    """Check a name against a registry, imported only then."""

    def check(name: str) -> str:
        try:
            getattr(importlib.import_module(module), registry).pick(name)
        except LoraparError as error:
            raise ValueError(f"{error}; {error.hint}") from None
        return name

    return AfterValidator(check)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())
