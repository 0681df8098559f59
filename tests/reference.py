"""Writes the guide's reference pages and schemas from the code; with `--check`, fails if they are stale.

python tests/reference.py [--check]      (`make reference`; `make check` checks)
"""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from typing import Any

import typer
import yaml
from pydantic.fields import FieldInfo

from lorapar_cli.commands import COMMANDS
from lorapar_cli.short import kinds
from stages.config import Config, Section
from stages.config.fields import marks_of
from stages.config.listing import describe, json_schema, section_type
from stages.pipeline.stage import all_stages
from stages.runtime import libraries
from stages.sweep.file import TableFile

MANIFEST = {
    "stage, variant, key": "Which step the artifact is of, and its key.",
    "identity": "What the key is a digest of: settings, keys of inputs, digests of rows and weights.",
    "inputs": "Step → key of each artifact that was read.",
    "summary": "The step's figures, such as `active_share` and `frozen_drift` of training.",
    "provenance": "Whole config, versions, command, machine, seconds, peak memory, and `plan`'s estimates.",
    "files": "Digest and size of each file.",
    "seal": "Digest of the manifest itself.",
}
"""Fields of `manifest.json`, which every artifact has."""
FOLDER = Path(__file__).parent.parent / "docs/reference"
GENERATED = "<!-- Written by `make reference` from the code: change it there. -->"
OTHER_NAMES = {
    "lora.init": "`init_lora_weights`", "model.load_in_4bit": "`BitsAndBytesConfig.load_in_4bit`",
    "model.attention": "`attn_implementation`", "rl.rewards": "`reward_funcs`, `reward_weights`",
    "rl.rollouts.correction": "`vllm_importance_sampling_mode`",
    "rl.rollouts.engine": "`use_vllm`, `vllm_mode`", "sft.warmup_ratio": "`warmup_steps` below 1",
    "rl.rollouts.gpu_memory_utilization": "`vllm_gpu_memory_utilization`",
}  # fmt: skip
"""Settings whose name in TRL, PEFT or transformers is another one."""
OF_COMMANDS = """`lorapar COMMAND --help` shows the same. Below are the options of several commands. The first
line of a command names those that it has; its other options are in its table."""
OF_SETTINGS = """Settings stand in a YAML file, in sections. `--set section.key=value` overrides one of them,
and `extends: FILE` takes all others from another file. `lorapar config` prints this list. Editors complete
and check a config that begins with the first line of `configs/demo.yaml`.

° marks a setting that has this name in TRL or PEFT, → another name there or in transformers. Few users change
what stands below *advanced*."""
OF_ARTIFACTS = """An artifact is the folder `<runs_dir>/<run>/<stage>/<key>/`. Each has a `manifest.json`.
NAME is PEFT's name of a LoRA weight: A is (r, in_features), B is (out_features, r)."""
OPTIONS = ["option", "meaning"]
HEAD, ADVANCED = ["setting", "default", "meaning"], ["*advanced*", "", ""]


def commands() -> str:
    from lorapar_cli.app import app

    group: Any = typer.main.get_command(app)
    rows = {name: [_option(p) for p in group.commands[name].params if p.name != "help"] for name in COMMANDS}
    counts = Counter(row for options in rows.values() for row in options)
    shared = [row for row, number in counts.items() if number > 1]
    lines = [*_head("Commands", OF_COMMANDS), *_table(OPTIONS, shared), ""]
    for command, options in rows.items():
        names = [name.strip("`") for name, text in options if (name, text) in shared or "--" not in name]
        usage = " ".join([command, *(f"[{name}]" if "--" in name else name for name in names)])
        lines += [f"## {command}", "", f"`lorapar {usage}`", "", COMMANDS[command], ""]
        own = [row for row in options if row not in shared]
        lines += [*_table(OPTIONS, own), ""] if own else []
    return "\n".join(lines)


def _option(parameter: Any) -> tuple[str, str]:
    """Return the cells of its row."""
    metavar = str(parameter.metavar or parameter.name.upper()).strip("{}[]")
    name = metavar if parameter.required else f"[{metavar}]"
    for option in parameter.opts:
        if option.startswith("--"):
            name = option if parameter.is_flag else f"{option} {metavar}"
    default = parameter.default
    shown = isinstance(default, str | int | float | Path) and not isinstance(default, bool)
    return f"`{name}`", _cell(parameter.help or "") + (f" Default: `{default}`." if shown else "")


def settings() -> str:
    return "\n".join([*_head("Settings", OF_SETTINGS), *_section("", Config, {})])


def _section(prefix: str, section: type[Section], listed: dict[tuple[str, str], str]) -> Iterator[str]:
    """Yield a table of settings, advanced ones last, then those of the sections within.

    listed: where a setting of this name and meaning was described; of others only the default is told.
    """
    rows, repeated, sections = list[list[str]](), defaultdict[str, list[str]](list), list[str]()
    for name, field in sorted(section.model_fields.items(), key=lambda item: marks_of(item[1])["advanced"]):
        if (kind := section_type(field)) and (name != "prompt" or not prefix):
            sections += [f"##{'#' * bool(prefix)} {prefix}{name}", "", _cell(field.description or ""), ""]
            sections += _section(f"{prefix}{name}.", kind, listed)
            continue
        row, first = _setting(prefix, name, field), listed.setdefault((name, describe(field)), prefix)
        if first == prefix:
            rows += [ADVANCED] * (marks_of(field)["advanced"] and ADVANCED not in rows)
            rows.append(row)
        else:
            repeated[first].append(f"`{prefix}{name}: {row[1].strip('`')}`")
    yield from [*_table(HEAD, rows), ""] if rows else []
    for first, names in repeated.items():
        yield from [f"As in `{first[:-1]}`: {', '.join(names)}.", ""]
    yield from sections


def _setting(prefix: str, name: str, field: FieldInfo) -> list[str]:
    default = "required" if field.is_required() else f"`{_yaml(field.default)}`"
    other = f" → {OTHER_NAMES[prefix + name]}" if prefix + name in OTHER_NAMES else ""
    return [f"`{prefix}{name}`{' °' * _is_of_library(prefix, name)}", default, _cell(describe(field)) + other]


def _yaml(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).split("\n")[0]


def _is_of_library(prefix: str, name: str) -> bool:
    """True if the setting becomes a field of this name of a library's config class."""
    with libraries.hide_packages(*libraries.UNUSED):
        from peft import LoraConfig
        from trl import GRPOConfig, SFTConfig

    kinds: Any = {"sft.": (SFTConfig, LoraConfig), "rl.": (GRPOConfig, LoraConfig), "lora.": (LoraConfig,)}
    return name in {field.name for kind in kinds.get(prefix, ()) for field in fields(kind)}


def choices() -> str:
    lines = _head("Names to choose from", "`lorapar list` prints the same.")
    for kind, names in kinds().items():
        rows = [[f"`{name}`", _cell(text)] for name, text in names.items()]
        lines += [f"## {kind}", "", *_table(["name", "meaning"], rows), ""]
    return "\n".join(lines)


def artifacts() -> str:
    lines = _head("Files of each artifact", OF_ARTIFACTS)
    for files, stages in groupby(all_stages(), key=lambda stage: stage.files):
        rows = [[f"`{name}`", text] for name, text in files.items()]
        names = ", ".join(stage.name for stage in stages)
        lines += [f"## {names}", "", *_table(["file", "content"], rows), ""]
    table = _table(["field", "content"], list(map(list, MANIFEST.items())))
    return "\n".join([*lines, "## manifest.json", "", *table, ""])


def _head(title: str, text: str) -> list[str]:
    return [f"# {title}", "", GENERATED, "", text, ""]


def _cell(text: str) -> str:
    """Escape a text for a cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def _table(head: list[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def pages() -> dict[str, str]:
    """Return the text of each generated file by its name."""
    texts = {f"{page.__name__}.md": page() for page in (commands, settings, choices, artifacts)}
    for name, kind in (("config", Config), ("table", TableFile)):
        schema = json.dumps(json_schema(kind), indent=1, ensure_ascii=False)
        texts[f"{name}.schema.json"] = f"{schema}\n"
    return texts


def main() -> int:
    files = {FOLDER / name: text for name, text in pages().items()}
    stale = [p for p, text in files.items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    names = ", ".join(path.name for path in stale)
    if "--check" in sys.argv and stale:
        print(f"FAIL: {names} in docs/reference do not fit the code; run: make reference")
        return 1
    for path in stale:
        path.write_text(files[path], encoding="utf-8")
    print(f"docs/reference: {names or 'nothing'} {'written' if stale else 'to change'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
