"""RL's elements chosen by importances at the adapter of SFT."""

import pytest
import torch
from conftest import ROOT
from results import artifacts, flags

from stages.lora.adapter import adapter
from stages.lora.importance.masks import read_importance
from stages.pipeline.resolve import resolved
from stages.pipeline.run import pending_stages
from stages.pipeline.steps import plan_steps
from stages.report import elements
from stages.report.page import Pictures, Text
from stages.store.artifacts import Store

RL = ["rl.max_steps=1", "sft.learning_rate=0.1", "score.examples=4"]
AGAIN = "rl.rescore=taylor2"


def test_the_adapter_of_sft_is_scored_after_it_and_for_rl_alone(begun):
    before, now = (plan_steps(resolved(begun(*RL, *more))) for more in ((), (AGAIN,)))
    differ = [name for name in now if name not in before or now[name].key != before[name].key]
    assert [name for name in differ if not name.startswith("eval")] == ["score:rl", "partition:rl", "rl"]
    assert list(now["score:rl"].inputs) == ["classify:train", "sft"]
    assert list(now["partition:rl"].inputs) == ["score:rl"] and list(now["partition:sft"].inputs) == ["score"]
    config = resolved(begun(*RL, AGAIN, "eval.targets=[rl]"))
    assert [
        (task.stage.name, task.variants)
        for task in pending_stages(config, plan_steps(config), Store(config.root), None, "rl")
    ] == [
        ("classify", ["train"]),
        ("score", ["score"]),
        ("partition", ["sft"]),
        ("sft", []),
        ("score", ["rl"]),
        ("partition", ["rl"]),
        ("rl", []),
    ]


def test_importance_is_taken_where_sft_ended(begun):
    """Magnitude is |φ|: of the file that SFT wrote."""
    made = artifacts(begun(*RL, "rl.rescore=magnitude"), "score", "partition:sft", "sft")
    assert not (made["score:rl"].path / "init").exists()
    weights = adapter.read(made["sft"].adapter)
    found = read_importance(made["score:rl"].path / "importance.safetensors")
    assert all(torch.equal(value, weights[name].abs()) for name, value in found[2].items())


def test_each_step_of_score_can_be_made_alone(own, lorapar):
    settings = [*own.home, *RL, AGAIN]
    sets = flags(settings)
    done = lorapar("score", ROOT / "configs/smoke.yaml", *sets, "--only", "score")
    assert done.code == 0
    done = lorapar("score", ROOT / "configs/smoke.yaml", *sets, "--only", "rl")
    assert done.code == 66 and "lorapar run" in done.err
    done = lorapar("score", ROOT / "configs/smoke.yaml", *sets, "--only", "sft")
    assert done.code == 78 and "choose from: score, rl" in done.err


@pytest.mark.slow
def test_a_page_has_the_elements_of_both(begun):
    config = begun(*RL, AGAIN)
    parts = list(elements.parts(config, artifacts(config, "score", "partition", "sft")))
    at = parts.index(Text("For RL the elements were scored again, by taylor2 at the adapter of SFT."))
    *of_sft, maps_text, maps = parts[:at]  # the maps are of SFT's elements alone
    assert [type(part) for part in of_sft] == [type(part) for part in parts[at + 1 :]]
    assert "How to read the maps" in maps_text.text and len(maps.figures) == 3
    assert parts[0].rows != parts[at + 1].rows
    drawn = [picture.svg for part in parts if isinstance(part, Pictures) for picture in part.figures]
    assert len(set(drawn)) == len(drawn)
