"""Reads a Config from YAML and `--set section.key=value` overrides; writes all settings, and their schema."""

import copy
import difflib
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from stages.config import Config, Section
from stages.config.fields import marks_of
from stages.errors import ConfigError, MissingInputError


def load(
    path: Path, overrides: list[str] | None, registries: Mapping[str, Any], kind: type[Config] = Config
) -> Config:
    """Read `path`, which may extend another file, and apply `section.key=value` overrides.

    registries: the names that a config may use (see `fields.registries_from`). kind: the class of the config,
    which may have more sections. One ConfigError lists all
    mistakes.
    """
    settings = read_with_extends(path)
    for override in overrides or []:
        _override(settings, override)
    try:
        return kind.model_validate(settings, context=registries)
    except ValidationError as error:
        mistakes = [_message(e) for e in error.errors()]
        text = mistakes[0]
        if len(mistakes) > 1:
            text = "\n  ".join([f"{len(mistakes)} mistakes in {path}", *mistakes])
        raise ConfigError(text, "every setting with its default: lorapar config") from None


def read_with_extends(
    path: Path,
    adjust: Callable[[Path, dict[str, Any]], dict[str, Any]] = lambda path, settings: settings,
    extended_by: tuple[Path, ...] = (),
) -> dict[str, Any]:
    """Return the settings of a file, merged over those of the file that it `extends`.

    The path after `extends` is relative to the file's folder. adjust: called with each file and its own
    settings before they are merged. extended_by: the files that led here.
    """
    if not path.is_file():
        raise MissingInputError(
            f"no config file {path}", "write one with lorapar init, or print the defaults: lorapar config"
        )
    if path.resolve() in extended_by:
        raise ConfigError(f"{path} extends itself")
    settings = read_yaml(path, str(path)) or {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must hold sections, got {type(settings).__name__}")
    base = settings.pop("extends", None)
    settings = adjust(path, settings)
    for name, field in Config.model_fields.items():
        if settings.get(name, "") is None and not isinstance(field.default, NoneType):
            del settings[name]  # a section of which every setting is commented out
    if base is None:
        return settings
    return _merge(
        read_with_extends(path.parent / str(base), adjust, (*extended_by, path.resolve())), settings
    )


def _merge(base: dict[str, Any], overriding: dict[str, Any]) -> dict[str, Any]:
    """Merge sections setting by setting; a list or a value in `overriding` replaces that in `base`."""
    merged = dict(base)
    for name, value in overriding.items():
        both_sections = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if both_sections else value
    return merged


def _override(tree: dict[str, Any], override: str) -> None:
    """Apply one `section.key=value` to the settings in place."""
    name, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override}: expected section.key=value")
    *path, last = name.strip().split(".")
    for key in path:
        section = tree.get(key, {})
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override}: {key} is a value, not a section")
        tree[key] = dict(section)  # a copy: YAML aliases may share one object between several sections
        tree = tree[key]
    tree[last] = _parsed(text, f"--set {override[:200]}")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses duplicate keys (PyYAML would silently take the last one).

    And texts with half of a surrogate pair, which no file can hold.
    """

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)  # type: ignore[no-untyped-call]
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{ascii(value)} has half of a surrogate pair")
        return value

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)  # type: ignore[no-untyped-call]
        assert isinstance(node, yaml.MappingNode)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                if first := lines.get((key.tag, key.value)):
                    raise ValueError(f"{key.value!r} appears twice, in lines {first} and {line}")
                lines[key.tag, key.value] = line
        return node


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which also puts quotes around texts that _Loader would take for numbers."""


for reader_or_writer in (_Loader, _Dumper):  # `1e3` and `9e-1`: YAML 1.1, as PyYAML has it, wants `1.0e+3`
    reader_or_writer.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def on_one_line(value: Any) -> str:
    """Format a value, or a name, so that it is read back as it is; a name like `2024` needs quotes."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**9)
    return text.removesuffix("...\n").strip()


def read_yaml(path: Path, where: str) -> Any:
    """Parse a YAML file; ConfigError, which calls the file `where`, if it is not valid."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not YAML: {error}") from None
    return _parsed(text, where)


def _parsed(text: str, where: str) -> Any:
    """Parse YAML text; ConfigError, which calls it `where`, if it is invalid or too deep."""
    try:
        return copy.deepcopy(_tree(text))
    except RecursionError:
        raise ConfigError(f"{where} is nested too deeply") from None
    # LookupError, AttributeError and TypeError: PyYAML on tags with the wrong kind of value (`!!bool maybe`)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())[:300]}") from None


@functools.lru_cache(maxsize=64)
def _tree(text: str) -> Any:
    """The values in YAML text, not to be changed; the cells of a table read one base and few values."""
    return yaml.load(text, _Loader)


def _message(error: Any) -> str:
    """Describe one pydantic error in a sentence that names the setting."""
    # pydantic's location also holds the alternatives of a union and the names of validators
    internal = ("literal[", "function-", "constrained-")
    location = [str(key) for key in error["loc"] if not (key == "bool" or str(key).startswith(internal))]
    name = ".".join(location)
    if error["type"] == "extra_forbidden":
        return _unknown_setting(location)
    if error["type"] == "missing":
        return f"{name} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if not name:
        return str(message)
    if error["type"] == "model_type":
        return f"{name}: expected settings below it, got {error['input']!r}"
    if error["type"] == "value_error":
        return f"{name}: {message}"
    return f"{name}: {message[0].lower()}{message[1:]}, got {error['input']!r}"


def _unknown_setting(location: list[str]) -> str:
    """Name an unknown setting with the most similar one."""
    name = ".".join(location)
    path = _setting_path(location)
    suggestions = difflib.get_close_matches(path, list(setting_names(Config)), n=1, cutoff=0.6)
    if not suggestions:
        return f"unknown setting {name}"
    section, _, last = suggestions[0].rpartition(".")
    # A suggestion in the same section is shown with the user's own names of entries (eval.benchmarks.gsm8k).
    same_section = section == path.rpartition(".")[0]
    suggestion = ".".join([*location[:-1], last]) if same_section else suggestions[0]
    return f"unknown setting {name} (did you mean {suggestion}?)"


def section_type(field: FieldInfo) -> type[Section] | None:
    """Return the section class of a field that is a section, a list or mapping of sections, or optional."""
    types = [field.annotation, *getattr(field.annotation, "__args__", ())]
    return next((t for t in types if isinstance(t, type) and issubclass(t, Section)), None)


def describe(field: FieldInfo) -> str:
    """Return the description of a setting, with its possible values unless the description names them all."""
    text, values = str(field.description), list(map(str, _literals(field.annotation)))
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


def _setting_path(location: list[str]) -> str:
    """Return a setting's path without names and numbers of entries.

    For example, eval.benchmarks.gsm8k.limit becomes eval.benchmarks.limit.
    """
    section: type[Section] | None = Config
    path = []
    for i, key in enumerate(location):
        field = section.model_fields.get(key) if section else None
        if field or i == len(location) - 1:
            path.append(key)
        section = section_type(field) if field else section
    return ".".join(path)


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
    value = ""
    if not field.is_required():
        value = f" {on_one_line(default)}"
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
            for internal in ("in_cache_key", "ignored_by", "advanced", "title"):
                field.pop(internal, None)
            if name in REMOVABLE:
                field["additionalProperties"] = {"anyOf": [field["additionalProperties"], {"const": False}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
