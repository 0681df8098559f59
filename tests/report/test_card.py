"""Results in the card of an export, and in the hub's format."""

import json
from pathlib import Path

import pytest

from stages.config import Config
from stages.report.card import card
from stages.store.artifacts import Artifact


@pytest.fixture
def evaluated(tmp_path: Path) -> list[Artifact]:
    """Of GSM8K from the hub, and of a file."""
    hub = {"path": "openai/gsm8k", "revision": "a" * 40}
    sources = {"gsm8k": hub, "demo": {"path": "data/test.jsonl"}}
    config = Config.model_validate({"model": {"name": "m"}, "eval": {"benchmarks": sources}})
    found = []
    for name, share in (("gsm8k", 0.276), ("demo", 0.53)):
        folder = tmp_path / name
        folder.mkdir()
        part = {"n": 1000, "accuracy": share, "interval": [share - 0.03, share + 0.03]}
        measured = {"all": part, "system2": part | {"n": 400}, "system1": {"n": 0, "accuracy": None}}
        (folder / "metrics.json").write_text(json.dumps(measured))
        provenance = {"config": config.model_dump(mode="json"), "finished": "2026-11-26T10:00:00+00:00"}
        manifest = {"key": f"key-{name}", "variant": f"rl@{name}", "summary": {"all": part}}
        found.append(Artifact(folder, manifest | {"provenance": provenance}))
    return found


@pytest.fixture
def manifest(tmp_path: Path) -> dict:
    """Of an adapter in this folder."""
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    return {
        "key": "abc", "stage": "rl",
        "summary": {"active": 4, "elements": 10, "active_share": 0.4, "steps": 3},
        "identity": {
            "variant": "",
            "config": {"baseline": None, "lora": {"r": 8}, "rl": {"learning_rate": 0.1, "beta": 0.04}},
        },
        "provenance": {
            "config": {"model": {"name": "org/m", "revision": "b" * 40}},
            "versions": {"lorapar": "1"}, "dtype": "bfloat16",
        },
    }  # fmt: skip


def test_the_card_shows_all_results_with_intervals(evaluated, manifest, tmp_path):
    text = card(Artifact(tmp_path, manifest), "adapter", tmp_path, evaluated)
    assert text.startswith("---\nbase_model: org/m\n")
    assert f'from_pretrained("org/m", revision="{"b" * 40}")' in text
    assert "| gsm8k, all | 27.6 [24.6, 30.6] | 1000 |" in text
    assert "| demo, System 2 | 53.0 [50.0, 56.0] | 400 |" in text and "System 1" not in text
    assert "| benchmark" not in card(Artifact(tmp_path, manifest), "adapter", tmp_path)


def test_the_card_names_what_it_is_and_what_it_was_trained_on(manifest, tmp_path):
    made = Artifact(tmp_path, manifest)
    config = manifest["provenance"]["config"]
    text = card(made, "adapter", tmp_path)
    assert "# m after LoRA-PAR rl" in text and "| partition.theta | 0.9 |" in text
    config["partition"] = {"beta": 1}
    text = card(made, "adapter", tmp_path)
    assert "| partition.beta | 1.0 |" in text and "| rl.beta | 0.04 |" in text
    assert "to the bit" in card(made, "adapter", tmp_path) and "4 bits" not in card(made, "merged", tmp_path)
    config["partition"] = {"strategy": "all"}
    assert "# m after LoRA rl" in card(made, "adapter", tmp_path)
    config["partition"]["strategy"] = "random"
    assert "# m after LoRA-PAR (random) rl" in card(made, "adapter", tmp_path)
    config["model"]["load_in_4bit"] = True
    adapter, merged = card(made, "adapter", tmp_path), card(made, "merged", tmp_path)
    assert "curl" not in adapter and "vllm serve . " in merged and "--served-model-name rl\n" in merged
    assert "load_in_4bit=True" in adapter and "import torch\n" in adapter
    assert "| base in | NF4, bfloat16 |" in adapter
    assert "Trained and evaluated on the base in 4 bits" in merged and "to the bit" not in merged
