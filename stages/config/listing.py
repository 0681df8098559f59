"""Lists all settings: their names, as YAML with descriptions, and as a JSON schema."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from stages.config import Config, Section
from stages.config.fields import MARKS, marks_of
from stages.config.yaml import on_one_line


def section_type(field: FieldInfo) -> type[Section] | None:
    """Return the section class of a field that is a section, a list or mapping of sections, or optional."""
    types = [field.annotation, *getattr(field.annotation, "__args__", ())]
    return next((t for t in types if isinstance(t, type) and issubclass(t, Section)), None)


def describe(field: FieldInfo) -> str:
    """Return the description of a setting, with its possible values unless the description names them all."""
    text, values = " ".join(str(field.description).split()), list(map(str, _literals(field.annotation)))
    if values and bool in get_args(field.annotation):
        values += ["true", "false"]
    return text if all(value in text for value in values) else f"{text} One of: {', '.join(values)}."


def _literals(annotation: Any) -> Iterator[Any]:
    """Yield the values of all Literal types in an annotation, such as `Literal["a", "b"] | None`."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for part in get_args(annotation):
            yield from _literals(part)


def setting_names(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all settings below a section."""
    for name, field in section.model_fields.items():
        yield prefix + name
        if sub_section := section_type(field):
            yield from setting_names(sub_section, f"{prefix}{name}.")


def annotated(
    section: type[Section] = Config, values: Section | None = None, indent: str = ""
) -> Iterator[str]:
    """Yield the lines of a YAML file with every setting, its default (or value in `values`) and description.

    In each section, a line `# advanced` comes before the settings that few users change.
    """
    fields = sorted(section.model_fields.items(), key=lambda field: marks_of(field[1])["advanced"])
    for is_advanced, group in groupby(fields, key=lambda field: marks_of(field[1])["advanced"]):
        if is_advanced:
            yield f"{indent}# advanced"
        for name, field in group:
            yield from _annotated_setting(name, field, values, indent)


def _annotated_setting(name: str, field: FieldInfo, values: Section | None, indent: str) -> Iterator[str]:
    """Yield the lines of one setting and, if it is a section, those of its settings."""
    sub_section = section_type(field)
    fallback = None if field.is_required() else field.default
    default = getattr(values, name) if values else fallback
    doc = f"  # {describe(field)}"
    if sub_section and (isinstance(default, Section) or field.is_required()):
        yield f"{indent}{name}:{doc}"
        yield from annotated(sub_section, default, indent + "  ")
        return
    if isinstance(default, list) and default and isinstance(default[0], Section):
        default = [item.model_dump(mode="json") for item in default]
    value = "" if field.is_required() else f" {on_one_line(default)}"
    yield f"{indent}{name}:{value}{doc}"
    if sub_section and name != "prompt":  # the settings of each entry of a list or mapping
        yield from (f"{indent}  # {line}" for line in annotated(sub_section))


REMOVABLE = ("benchmarks", "rewards", "rows", "paper")
"""Mappings in which `false` removes the entry of the file that is extended."""


def json_schema(section: type[Section] = Config) -> dict[str, Any]:
    """Return the JSON schema, for editors, of a file of this section.

    It may extend another file and so leave anything out.
    """
    schema = section.model_json_schema()
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "File whose settings this file changes, as a path relative to this file.",
    }
    for definition in (schema, *schema.get("$defs", {}).values()):
        definition.pop("required", None)
        definition.pop("description", None)  # the docstring of the class, which is for developers
        for name, field in definition["properties"].items():
            if "description" in field:
                field["description"] = " ".join(field["description"].split())
            for internal in (*MARKS, "title"):
                field.pop(internal, None)
            if name in REMOVABLE:
                field["additionalProperties"] = {"anyOf": [field["additionalProperties"], {"const": False}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
