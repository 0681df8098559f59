"""The card of an export: what it is, how well it answers, what it was trained on."""

import json
from pathlib import Path

import pytest

from stages.config import Config
from stages.report.card import card
from stages.store.artifacts import Artifact


def config(**sections: dict) -> Config:
    model = {"name": "org/m", "revision": "b" * 40} | sections.pop("model", {})
    return Config.model_validate({"model": model, **sections})


@pytest.fixture
def trained(tmp_path: Path) -> Artifact:
    """Of an adapter in this folder."""
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    manifest = {
        "key": "abc",
        "stage": "rl",
        "summary": {"active": 4, "elements": 10, "active_share": 0.4, "steps": 3},
        "identity": {"config": {"baseline": None, "lora": {"r": 8}, "rl": {"beta": 0.04, "prompt": {}}}},
        "provenance": {"versions": {"lorapar": "1"}, "dtype": "bfloat16"},
    }
    return Artifact(tmp_path, manifest)


def test_the_card_shows_all_results_with_intervals(trained, tmp_path):
    part = {"n": 1000, "accuracy": 0.276, "interval": [0.246, 0.306]}
    measured = {"all": part, "system2": part | {"n": 400}, "system1": {"n": 0, "accuracy": None}}
    (tmp_path / "metrics.json").write_text(json.dumps(measured))
    text = card(config(), trained, "adapter", tmp_path, [Artifact(tmp_path, {"variant": "rl@gsm8k"})])
    assert text.startswith("---\nbase_model: org/m\n")
    assert f'from_pretrained("org/m", revision="{"b" * 40}"' in text
    assert r"| rl on gsm8k, all | 27.6 \[24.6, 30.6\] | 1000 |" in text
    assert r"| rl on gsm8k, System 2 | 27.6 \[24.6, 30.6\] | 400 |" in text and "8k, System 1" not in text
    assert "accuracy, %" not in card(config(), trained, "adapter", tmp_path)


def test_the_card_names_what_it_is_and_what_it_was_trained_on(trained, tmp_path):
    text = card(config(partition={"beta": 1}), trained, "adapter", tmp_path)
    assert "# m after LoRA-PAR\n" in text and "| partition.theta | 0.9 |" in text
    assert "| partition.beta | 1.0 |" in text and "| rl.beta | 0.04 |" in text and "rl.prompt" not in text
    assert "| elements trained | 4 of 10 (40.0%) |" in text and "to the bit" in text
    assert "--lora-modules default=. --max-loras 1 --max-lora-rank 8" in text
    for strategy, title in (("all", "LoRA"), ("random", "LoRA-PAR (random)")):
        text = card(config(partition={"strategy": strategy}), trained, "adapter", tmp_path)
        assert f"# m after {title}\n" in text
    assert "4 bits" not in card(config(), trained, "merged", tmp_path)


def test_the_card_of_a_base_in_4_bits(trained, tmp_path):
    quantized = config(model={"load_in_4bit": True})
    adapter, merged = (card(quantized, trained, form, tmp_path) for form in ("adapter", "merged"))
    assert "api_server" not in adapter and "api_server --model . " in merged
    assert "--served-model-name default\n" in merged
    assert "load_in_4bit=True" in adapter and "load_in_4bit" not in merged.partition("| learned")[0]
    assert "| base in | NF4, bfloat16 |" in adapter
    assert "Trained and evaluated on the base in 4 bits" in merged and "to the bit" not in merged
