"""Reads and writes YAML."""

import copy
import functools
import re
from pathlib import Path
from typing import Any

import yaml

from stages.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses duplicate keys (PyYAML would silently take the last one).

    And texts with half of a surrogate pair, which no file can hold.
    """

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{ascii(value)} has half of a surrogate pair")
        return value

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
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
    return parse_yaml(text, where)


def parse_yaml(text: str, where: str) -> Any:
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
