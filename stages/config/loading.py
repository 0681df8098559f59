"""Loads a config: a YAML file, the files that it extends, and `--set section.key=value` overrides."""

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from pydantic import ValidationError

from stages.config import Config, Section
from stages.config.listing import section_type, setting_names
from stages.config.yaml import parse_yaml, read_yaml
from stages.errors import ConfigError, MissingInputError


def load(
    path: Path, overrides: list[str] | None, registries: Mapping[str, Any], kind: type[Config] = Config
) -> Config:
    """Read `path`, which may extend another file, and apply `section.key=value` overrides.

    registries: the names that a config may use (see `fields.registries_from`). kind: the class of the config,
    which may have more sections. One ConfigError lists all mistakes.
    """
    settings = read_with_extends(path)
    if {"base", "rows"} <= settings.keys():
        raise ConfigError(f"{path} is a table, not a config", f"lorapar sweep {path}")
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
        hint = "a config names its rows in data.path; to write one: lorapar init ROWS --model NAME"
        raise ConfigError(f"{path} must hold sections, got {type(settings).__name__}", hint)
    base = settings.pop("extends", None)
    settings = adjust(path, settings)
    for name, field in Config.model_fields.items():
        if settings.get(name, "") is None and not isinstance(field.default, NoneType):
            del settings[name]  # a section of which every setting is commented out
    if base is None:
        return settings
    extended = read_with_extends(path.parent / str(base), adjust, (*extended_by, path.resolve()))
    return _merge(extended, settings)


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
    tree[last] = parse_yaml(text, f"--set {override[:200]}")


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
    section, _, own_name = path.rpartition(".")
    meant = [
        setting
        for setting in setting_names(Config)
        if setting.endswith(f".{path}") or (setting.startswith(section) and _initials(setting) == own_name)
    ]
    if meant:
        return f"unknown setting {name} (did you mean {' or '.join(meant[:3])}?)"
    suggestions = difflib.get_close_matches(path, list(setting_names(Config)), n=1, cutoff=0.6)
    if not suggestions:
        return f"unknown setting {name}"
    suggested_section, _, last = suggestions[0].rpartition(".")
    # A suggestion in the same section is shown with the user's own names of entries (eval.benchmarks.gsm8k).
    same_section = suggested_section == section
    suggestion = ".".join([*location[:-1], last]) if same_section else suggestions[0]
    return f"unknown setting {name} (did you mean {suggestion}?)"


def _initials(setting: str) -> str:
    """Return the initials of a setting's own name: lr of sft.learning_rate."""
    return "".join(word[0] for word in setting.rpartition(".")[2].split("_"))


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
