"""Every default of TRL's configs is set by lorapar or was judged harmless, so none moves without a word.

`trl_defaults.json` has the harmless ones by the reason.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import trl

from stages.config import RlSection, SftSection
from stages.config.rl import RolloutsSection
from stages.lora.grpo import building, vllm_rollouts
from stages.lora.training import loop
from stages.sft import run as sft
from stages.store.checkpoints import Checkpoints


def given() -> dict[str, set[str]]:
    """The fields that lorapar sets, by config; those of vLLM count where only a vLLM engine sets them."""
    fields: dict[str, set[str]] = {}

    def keep(name):
        return lambda **arguments: fields.setdefault(name, set()).update(arguments)

    checkpoints = Checkpoints(Path("run/stage/checkpoints/key"), "")
    colocated = RlSection(rollouts=RolloutsSection(engine="vllm_colocate", gpu_memory_utilization=0.5))
    kept = patch.multiple(trl, **{name: keep(name) for name in ("GRPOConfig", "SFTConfig")})
    with kept, patch.object(loop, "check_training"):  # without vLLM, too
        sft._arguments(SftSection(), 1, 0, checkpoints)
        for section in (RlSection(), colocated):
            building._arguments(section, 1, 0, checkpoints, vllm_rollouts.arguments(section, None, []))
    return fields


def default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def test_no_default_has_moved_and_none_is_new():
    """A field that was judged may be missing: several releases of transformers are allowed."""
    reviewed = json.loads(Path(__file__).with_name("trl_defaults.json").read_text(encoding="utf-8"))
    known = {name: value for fields in reviewed.values() for name, value in fields.items()}
    moved = {
        f"{config}.{field.name}": (known.get(field.name, "new"), default(field))
        for config, names in given().items()
        for field in dataclasses.fields(getattr(trl, config))
        if field.init and field.name not in names and known.get(field.name, "new") != default(field)
    }
    assert not moved, f"pin these, or judge them harmless: {moved}"
