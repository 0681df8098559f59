"""Reads a Config from YAML and `--set section.key=value`, which takes precedence, and writes one as YAML."""

import difflib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from stages.config import Config, Section
from stages.errors import ConfigError, MissingInputError

DEEPEST = 64
"""Levels of a config, and files that extend each other."""
MOST = 100_000
"""Values in one file."""


def load(path: Path, overrides: list[str] | None, registries: Mapping[str, Any]) -> Config:
    """Read `path`, which may extend another file, and apply `section.key=value` overrides.

    registries: the names that a config may use, as in `fields.known`. One ConfigError lists all mistakes.
    """
    settings = tree(path)
    for override in overrides or []:
        _override(settings, override)
    try:
        return Config.model_validate(settings, context=registries)
    except ValidationError as error:
        mistakes = [_mistake(e) for e in error.errors()]
        text = mistakes[0]
        if len(mistakes) > 1:
            text = "\n  ".join([f"{len(mistakes)} mistakes in {path}", *mistakes])
        raise ConfigError(text, "every setting with its default: lorapar config") from None


def tree(
    path: Path,
    adjust: Callable[[Path, dict[str, Any]], dict[str, Any]] = lambda path, own: own,
    below: tuple[Path, ...] = (),
) -> dict[str, Any]:
    """The tree of a file, merged into that of the file which it `extends` (a path relative to its folder).

    adjust: called with each file and its own tree. below: the files that extend it.
    """
    if not path.is_file():
        raise MissingInputError(
            f"no config file {path}", "see configs/, or print the defaults: lorapar config"
        )
    if path.resolve() in below:
        raise ConfigError(f"{path} extends itself")
    if len(below) == DEEPEST:
        raise ConfigError(f"{path} is extended over more than {DEEPEST} files")
    own = values(path, str(path)) or {}
    if not isinstance(own, dict):
        raise ConfigError(f"{path} must hold sections, got {type(own).__name__}")
    extended, own = own.pop("extends", None), adjust(path, own)
    if extended is None:
        return own
    return _over(tree(path.parent / str(extended), adjust, (*below, path.resolve())), own)


def _over(under: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`under` with the settings of `own`: sections merge setting by setting, lists and values do not."""
    merged = dict(under)
    for name, value in own.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _over(merged[name], value) if both else value
    return merged


def _override(tree: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override}: expected section.key=value")
    *path, last = name.strip().split(".")
    for part in path:
        below = tree.get(part, {})
        if not isinstance(below, dict):
            raise ConfigError(f"--set {override}: {part} is a value, not a section")
        tree[part] = dict(below)  # an alias in the file is one object in two places
        tree = tree[part]
    tree[last] = _parsed(text, f"--set {override[:200]}")


class _Loader(yaml.SafeLoader):
    """PyYAML's, which of two equal keys would take the last without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)  # type: ignore[no-untyped-call]
        assert isinstance(node, yaml.MappingNode)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                if first := lines.get((key.tag, key.value)):
                    raise ValueError(f"{key.value!r} is there twice, in lines {first} and {line}")
                lines[key.tag, key.value] = line
        return node


def values(path: Path, where: str) -> Any:
    """What a YAML file holds; ConfigError, which calls it `where`, for what is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not YAML: {error}") from None
    return _parsed(text, where)


def _parsed(text: str, where: str) -> Any:
    """The value of a YAML text; ConfigError for what is none, or none that a machine can work with."""
    try:
        value = yaml.load(text, _Loader)
        _check(value, {}, 0)
    except RecursionError:
        raise ConfigError(f"{where} is nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:  # of odd tags
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())[:300]}") from None
    return value


def _check(value: Any, sizes: dict[int, int], depth: int) -> int:
    """The number of values in a tree, as if no alias were shared; ValueError for too many or an odd text.

    sizes: of the collections that are counted already, by their identity.
    """
    if depth > DEEPEST:
        raise ValueError(f"it is nested more than {DEEPEST} deep")
    if isinstance(value, str):
        value.encode()  # a lone surrogate can be written into no file
        if "\0" in value:
            raise ValueError("it has a character 0, which no name can have")
        return 1
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in sizes:
        inside = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        sizes[id(value)] = 0
        sizes[id(value)] = 1 + sum(_check(part, sizes, depth + 1) for part in inside)
        if sizes[id(value)] > MOST:
            raise ValueError(f"its aliases stand for more than {MOST} values")
    return sizes[id(value)]


_TRAIN = {
    "lr": "learning_rate",
    "optimizer": "optim",
    "scheduler": "lr_scheduler_type",
    "epochs": "num_train_epochs",
    "warmup": "warmup_ratio",
    "loraplus_ratio": "loraplus_lr_ratio",
    "loss": "loss_type",
    "micro_batch": "per_device_train_batch_size",
    "dropout": "lora_dropout",
}
RENAMED = {
    "lora": {"alpha": "lora_alpha", "rslora": "use_rslora"},
    "sft": _TRAIN,
    "rl": {
        **_TRAIN,
        "group": "num_generations",
        "iterations": "num_iterations",
        "max_prompt": "max_prompt_length",
        "max_completion": "max_completion_length",
        "kl_beta": "beta",
        "kl_bias_correction": "use_bias_correction_kl",
        "importance_sampling": "importance_sampling_level",
        "resample": "dynamic_sampling",
        "shared_prompts": "prefix_sharing",
        "drift_prompts": "kl_probe_prompts",
        "drift_steps": "kl_probe_steps",
        "max_equal_steps": "max_zero_signal_steps",
    },
    "rl.rollouts": {
        "gpu_memory": "gpu_memory_utilization",
        "tensor_parallel": "tensor_parallel_size",
        "sleep": "enable_sleep_mode",
    },
}
"""Section → old name of a setting → the name that it has now, which is TRL's, PEFT's or vLLM's."""


def _mistake(error: Any) -> str:
    location = [
        str(part) for part in error["loc"] if not str(part).startswith(("literal[", "bool", "function-"))
    ]
    name = ".".join(location)
    if error["type"] == "extra_forbidden":
        if renamed := RENAMED.get(".".join(location[:-1]), {}).get(location[-1]):
            return f"{name} is called {'.'.join([*location[:-1], renamed])} now"
        near = difflib.get_close_matches(_without_keys(location), list(_names(Config)), n=1, cutoff=0.6)
        path, _, last = near[0].rpartition(".") if near else ("", "", "")
        # In the same section, show the path with the names of entries that the person typed.
        if near and path == _without_keys(location).rpartition(".")[0]:
            near = [".".join([*location[:-1], last])]
        return f"unknown setting {name}" + (f" (did you mean {near[0]}?)" if near else "")
    if error["type"] == "missing":
        return f"{name} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if not name:
        return str(message)
    if error["type"] == "value_error":
        return f"{name}: {message}"
    return f"{name}: {message[0].lower()}{message[1:]}, got {error['input']!r}"


def _sub_section(field: FieldInfo) -> type[Section] | None:
    kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, Section)), None)


def _without_keys(location: list[str]) -> str:
    """A setting's path without names and numbers of entries.

    For example, eval.benchmarks.gsm8k.limit becomes eval.benchmarks.limit.
    """
    section: type[Section] | None = Config
    kept = []
    for i, part in enumerate(location):
        field = section.model_fields.get(part) if section else None
        if field or i == len(location) - 1:
            kept.append(part)
        section = _sub_section(field) if field else section
    return ".".join(kept)


def _names(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if below := _sub_section(field):
            yield from _names(below, f"{prefix}{name}.")


def annotated(
    section: type[Section] = Config, values: Section | None = None, indent: str = ""
) -> Iterator[str]:
    """The lines of a YAML file with every setting, its default (or its value in `values`) and its meaning."""
    for name, field in section.model_fields.items():
        below = _sub_section(field)
        fallback = None if field.is_required() else field.default
        default = getattr(values, name) if values else fallback
        doc = f"  # {field.description}"
        if below and (isinstance(default, Section) or field.is_required()):
            yield f"{indent}{name}:{doc}"
            yield from annotated(below, default, indent + "  ")
            continue
        if isinstance(default, list) and default and isinstance(default[0], Section):
            default = [item.model_dump(mode="json") for item in default]
        shown = ""
        if not field.is_required():
            shown = " " + yaml.safe_dump(default, default_flow_style=True, width=10**6).split("\n")[0]
        yield f"{indent}{name}:{shown}{doc}"
        if below and name != "prompt":  # the settings of each entry of a list or mapping
            yield from (f"{indent}  # {line}" for line in annotated(below))
