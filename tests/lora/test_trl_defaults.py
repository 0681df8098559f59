"""Every default of TRL's configs is set by lorapar or was judged harmless, so none moves without a word.

`trl_defaults.json` has the harmless ones by the reason. With another TRL or transformers, this writes it
anew:

    PYTHONPATH=. python tests/lora/test_trl_defaults.py

Known fields keep their reason. New ones come under `NEW`, to be judged: pinned, where a number of the
training may depend on them, or moved to a reason.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import trl

from stages.config import RlSection, SftSection
from stages.config.rl import RolloutsSection
from stages.lora.grpo import building
from stages.sft import run as sft
from stages.store.checkpoints import Checkpoints

REVIEWED = Path(__file__).with_name("trl_defaults.json")
NEW = "not judged yet"


def given() -> dict[str, set[str]]:
    """The fields that lorapar sets, by config; those of vLLM count where only a vLLM engine sets them."""
    fields: dict[str, set[str]] = {}

    def keep(name):
        return lambda **arguments: fields.setdefault(name, set()).update(arguments)

    checkpoints = Checkpoints(Path("run/stage/checkpoints/key"), "")
    with patch.multiple(trl, **{name: keep(name) for name in ("GRPOConfig", "SFTConfig")}):
        sft._arguments(SftSection(), 1, 0, checkpoints)
        building._arguments(RlSection(), 1, 0, checkpoints, [])
        alone = set(fields["GRPOConfig"])
        building._arguments(
            RlSection(rollouts=RolloutsSection(engine="vllm_colocate")), 1, 0, checkpoints, []
        )
    assert all(name.startswith("vllm_") for name in fields["GRPOConfig"] - alone)
    return fields


def default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def unpinned() -> dict[str, dict[str, Any]]:
    """Field → default of what lorapar leaves alone, by config."""
    found = {}
    for config, names in given().items():
        fields = [field for field in dataclasses.fields(getattr(trl, config)) if field.init]
        found[config] = {field.name: default(field) for field in fields if field.name not in names}
    return found


def reviewed() -> dict[str, dict[str, Any]]:
    return json.loads(REVIEWED.read_text(encoding="utf-8"))


def test_no_default_has_moved_and_none_is_new():
    """A field that was judged may be missing: several releases of transformers are allowed."""
    known = {name: value for fields in reviewed().values() for name, value in fields.items()}
    moved = {
        f"{config}.{name}": (known.get(name, "new"), value)
        for config, fields in unpinned().items()
        for name, value in fields.items()
        if known.get(name, "new") != value
    }
    assert not moved, f"pin these, or judge them harmless: {moved}"


def test_what_is_pinned_is_a_field():
    for config, names in given().items():
        assert names <= {field.name for field in dataclasses.fields(getattr(trl, config))}


def write() -> None:
    found = {name: value for fields in unpinned().values() for name, value in fields.items()}
    reasons = reviewed() if REVIEWED.exists() else {}
    kept = {reason: {n: found.pop(n) for n in fields if n in found} for reason, fields in reasons.items()}
    kept |= {NEW: found} if found else {}
    REVIEWED.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
