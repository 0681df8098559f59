"""A region alone: its elements are RL's, all others those that training began with."""

import pytest
import torch
from conftest import ROOT, flags, make_steps
from safetensors.torch import save_file

from stages.errors import ArtifactError
from stages.eval import ablation
from stages.lora.adapter import adapter
from stages.lora.importance.masks import Masks
from stages.pipeline.resolve import resolved
from stages.pipeline.steps import plan_steps
from stages.records import Sample
from stages.report.comparison import compared

RL = ["rl.max_steps=1", "sft.learning_rate=0.1", "eval.benchmarks.demo.limit=4"]
TARGETS = "eval.targets=[rl, shared]"


def test_regions_are_evaluated_and_compared_with_the_model_that_they_are_of(begun, lorapar):
    config = begun(*RL, TARGETS)
    make_steps(config, "classify:demo", "sft", "rl", "eval")
    steps = plan_steps(resolved(config))
    assert list(steps["eval:shared@demo"].inputs) == ["classify:demo", "score", "partition:rl", "rl"]
    done = lorapar("show", ROOT / "configs/smoke.yaml", *flags(*begun.home, *RL, TARGETS))
    assert done.code == 0 and "Regions alone are tested against the model that they are of" in done.out
    shown = next(line for line in done.out.splitlines() if line.startswith("demo"))
    assert shown.split() == ["demo", "n", "rl", "shared"]


def test_regions_are_tested_against_rl_wherever_it_is_listed():
    samples = {"all": [Sample("a", 0, None, "", "", "", "", "", True, True, "correct")]}
    rows = compared(dict.fromkeys(("shared", "sft", "s1_only", "rl"), samples))
    against = {row.target: row.against for row in rows}
    assert against == {"shared": "rl", "sft": None, "s1_only": "rl", "rl": "sft"}


@pytest.mark.parametrize(
    ("target", "kept"),
    [("s1_only", [[1, 0], [0, 0]]), ("s2_only", [[0, 2], [0, 0]]), ("shared", [[0, 0], [3, 0]])],
)
def test_a_region_by_hand(tmp_path, target, kept):
    """Elements of System 1, of System 2, of both, and of none."""
    name = "x.lora_A.weight"
    masks = Masks({name: torch.tensor([[1, 2], [3, 0]], dtype=torch.uint8)}, {})
    for folder, values in (("start", [[0.0, 0.0], [0.0, 0.0]]), ("rl", [[1.0, 2.0], [3.0, 4.0]])):
        (tmp_path / folder).mkdir()
        save_file({name: torch.tensor(values)}, tmp_path / folder / adapter.ADAPTER)
    ablation.write(target, tmp_path / "rl", tmp_path / "start", masks, tmp_path / target)
    assert adapter.read(tmp_path / target)[name].tolist() == kept
    save_file({"y.lora_A.weight": torch.ones(2, 2)}, tmp_path / "rl" / adapter.ADAPTER)
    with pytest.raises(ArtifactError, match="are not of one adapter"):
        ablation.write(target, tmp_path / "rl", tmp_path / "start", masks, tmp_path / "out")
