"""Writes the guide's reference pages and schemas from the code; with `--check`, fails if they are stale.

python tests/reference.py [--check]      (`make reference`; `make check` checks)
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer
import yaml

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
    "identity": "What the key is a digest of: settings, keys of the inputs, digests of rows and weights.",
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
    "lora.init": "`LoraConfig.init_lora_weights`", "model.load_in_4bit": "`BitsAndBytesConfig.load_in_4bit`",
    "model.attention": "`attn_implementation`", "rl.rewards": "`reward_funcs`, `GRPOConfig.reward_weights`",
    "rl.rollouts.correction": "`GRPOConfig.vllm_importance_sampling_mode`",
    "rl.rollouts.engine": "`GRPOConfig.use_vllm`, `vllm_mode`",
    "sft.warmup_ratio": "`SFTConfig.warmup_steps` below 1",
    "rl.warmup_ratio": "`GRPOConfig.warmup_steps` below 1", "sft.lora_dropout": "`LoraConfig.lora_dropout`",
    "rl.lora_dropout": "`LoraConfig.lora_dropout`",
}  # fmt: skip
"""Settings whose name in the library is another one, or is not of the section's usual class."""


INTRODUCTION = [
    "Settings stand in a YAML file, in sections. `--set section.key=value` overrides one of them, and",
    "`extends: FILE` takes all others from another file. `lorapar config` prints this list.",
    "",
    "Editors complete and check a config that begins with a line such as the one in `configs/demo.yaml`.",
]
"""Of the page of settings."""
HEAD = ["setting", "default", "meaning", "in TRL, PEFT"]


def commands() -> str:
    from lorapar_cli.app import app

    group: Any = typer.main.get_command(app)
    lines = ["# Commands", "", GENERATED, "", "`lorapar COMMAND --help` shows the same.", ""]
    for name in COMMANDS:
        command = group.commands[name]
        parameters = [p for p in command.params if p.name != "help"]
        arguments = [_usage(p) for p in parameters if p.param_type_name == "argument"]
        lines += [f"## {name}", "", COMMANDS[name], "", "```text"]
        lines += [" ".join(["lorapar", name, *arguments, "[OPTIONS]"]), "```", ""]
        rows = [_option(parameter) for parameter in parameters]
        lines += [*_table(["option", "meaning"], rows), ""] if rows else []
    return "\n".join(lines)


def _usage(parameter: Any) -> str:
    metavar = str(parameter.metavar or parameter.name.upper()).strip("{}[]")
    return metavar if parameter.required else f"[{metavar}]"


def _option(parameter: Any) -> list[str]:
    """Return the cells of its row."""
    name = next((name for name in parameter.opts if name.startswith("--")), _usage(parameter))
    if name.startswith("--") and not parameter.is_flag:
        name += f" {parameter.metavar or parameter.name.upper()}"
    default = parameter.default
    shown = isinstance(default, str | int | float | Path) and not isinstance(default, bool)
    return [f"`{name}`", _cell(parameter.help or "") + (f" Default: `{default}`." if shown else "")]


def settings() -> str:
    lines = ["# Settings", "", GENERATED, "", *INTRODUCTION, ""]
    top = [n for n, f in Config.model_fields.items() if not (section_type(f))]
    lines += ["## Top level", "", *_table(HEAD, [_setting("", name, Config) for name in top]), ""]
    for name, field in Config.model_fields.items():
        if section := section_type(field):
            lines += [f"## {name}", "", _cell(field.description or ""), "", *_section(f"{name}.", section)]
    return "\n".join(lines)


def _section(prefix: str, section: type[Section]) -> Iterator[str]:
    """Yield a table of common settings, one of advanced settings, then those of sections within."""
    plain = {n: f for n, f in section.model_fields.items() if not section_type(f)}
    for title, advanced in (("", False), ("Advanced", True)):
        rows = [_setting(prefix, n, section) for n, f in plain.items() if marks_of(f)["advanced"] is advanced]
        if rows:
            yield from [f"**{title}**", ""] if title else []
            yield from [*_table(HEAD, rows), ""]
    for name, field in section.model_fields.items():
        if inner := section_type(field):
            yield from [f"### {prefix}{name}", "", _cell(field.description or ""), ""]
            if prefix + name not in ("sft.prompt", "rl.prompt", "score.prompt", "eval.benchmarks.prompt"):
                yield from _section(f"{prefix}{name}.", inner)


def _setting(prefix: str, name: str, section: type[Section]) -> list[str]:
    field = section.model_fields[name]
    default = "required" if field.is_required() else f"`{_yaml(field.default)}`"
    return [f"`{prefix}{name}`", default, _cell(describe(field)), library_name(prefix + name)]


def _yaml(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).split("\n")[0]


def library_name(setting: str) -> str:
    """Name the field of a library's config class that the setting becomes, if there is one."""
    section, _, name = setting.rpartition(".")
    if setting in OTHER_NAMES:
        return OTHER_NAMES[setting]
    with libraries.hide_packages(*libraries.UNUSED):
        from peft import LoraConfig
        from trl import GRPOConfig, SFTConfig

    kinds_of: dict[str, Any] = {
        "sft": SFTConfig, "rl": GRPOConfig, "lora": LoraConfig, "rl.rollouts": GRPOConfig,
    }  # fmt: skip
    name = f"vllm_{name}" if section == "rl.rollouts" else name
    kind = kinds_of.get(section)
    return f"`{kind.__name__}.{name}`" if kind and name in {field.name for field in fields(kind)} else ""


def choices() -> str:
    lines = ["# Names to choose from", "", GENERATED, "", "`lorapar list` prints the same.", ""]
    for kind, names in kinds().items():
        rows = [[f"`{name}`", _cell(text)] for name, text in names.items()]
        lines += [f"## {kind}", "", *_table(["name", "meaning"], rows), ""]
    return "\n".join(lines)


def artifacts() -> str:
    folder = "An artifact is the folder `<runs_dir>/<run>/<stage>/<key>/`. Every one has a `manifest.json`."
    lines = ["# Files of each artifact", "", GENERATED, "", folder, ""]
    for stage in all_stages():
        rows = [[f"`{name}`", text] for name, text in stage.files.items()]
        lines += [f"## {stage.name}", "", *_table(["file", "content"], rows), ""]
    table = _table(["field", "content"], list(map(list, MANIFEST.items())))
    return "\n".join([*lines, "## manifest.json", "", *table, ""])


def _cell(text: str) -> str:
    """Escape a text for a cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]


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
