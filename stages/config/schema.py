"""JSON schemas of configs and tables, by which editors complete and check what is typed."""

from typing import Any

from stages.config import Config
from stages.config.fields import Section

REMOVABLE = ("benchmarks", "rewards", "rows", "paper")
"""Mappings in which `false` removes the entry of the file that is extended."""


def json_schema(section: type[Section] = Config) -> dict[str, Any]:
    """Return the schema of a file of this section; it may extend another file and so leave anything out."""
    schema = section.model_json_schema()
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "File whose settings this file changes, as a path relative to this file.",
    }
    for definition in (schema, *schema.get("$defs", {}).values()):
        definition.pop("required", None)
        definition.pop("description", None)  # the docstring of the class, which is for developers
        for name, field in definition["properties"].items():
            for internal in ("in_cache_key", "ignored_by", "advanced", "title"):
                field.pop(internal, None)
            if name in REMOVABLE:
                field["additionalProperties"] = {"anyOf": [field["additionalProperties"], {"const": False}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
