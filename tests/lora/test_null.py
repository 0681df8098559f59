"""The null of importance: products of independent Gaussians, with the mean of each weight."""

import re
from types import SimpleNamespace

import pytest
import torch

from stages.lora.importance.masks import write_importance
from stages.report import elements
from stages.store.artifacts import Artifact


def _share(scores: torch.Tensor, theta: float) -> float:
    """Share of the elements that hold `theta` of the sum."""
    ordered = scores.double().sort(descending=True).values.cumsum(0)
    return float((ordered < theta * ordered[-1]).sum() + 1) / len(ordered)


def test_of_one_weight_it_is_the_distribution_of_a_product_of_two_gaussians():
    (scores,) = elements.gaussian_null({2: {"a": torch.full((1000, 400), 3.0)}}).values()
    assert len(scores) == 400_000 and scores.double().mean().item() == pytest.approx(3.0, rel=0.01)
    assert [round(_share(scores, theta), 3) for theta in (0.1, 0.5, 0.9)] == pytest.approx(
        [0.015, 0.151, 0.520], abs=0.003
    )


def test_systems_share_the_values_but_not_the_gradients():
    weight = torch.ones(1000, 400)
    scores = elements.gaussian_null({1: {"a": weight}, 2: {"a": 3 * weight}})
    # With x = log |g|, y = log |g'|, z = log |φ| alike and independent, x + z and y + z correlate by a half.
    assert torch.corrcoef(torch.stack([s.log() for s in scores.values()]))[0, 1] == pytest.approx(
        0.5, abs=0.01
    )
    assert elements.null_jaccard({1: {"a": weight}, 2: {"a": 3 * weight}}, 0.9) == pytest.approx(
        0.52, abs=0.005
    )


@pytest.mark.parametrize(
    ("variant", "rescore", "systems"),
    [
        ("", None, [1, 2]),
        ("", "grpo_sign", [1, 2]),
        ("rl", "grpo_sign", [1]),
        ("rl", "grad2", []),
        ("rl", "taylor1", [1, 2]),
    ],
)
def test_only_products_of_gradient_and_value_have_a_null(tmp_path, monkeypatch, variant, rescore, systems):
    monkeypatch.setattr("stages.report.figures.svg", lambda figure: "<svg></svg>")
    scores = {system: {"a": torch.ones(4, 8)} for system in (1, 2)}
    write_importance(tmp_path / "importance.safetensors", scores)
    config = SimpleNamespace(
        score=SimpleNamespace(scorer="taylor2"),
        rl=SimpleNamespace(rescore=rescore),
        partition=SimpleNamespace(theta=0.9),
    )
    caption = elements.cumulative_importance(config, Artifact(tmp_path, {"variant": variant})).caption
    assert [int(system) for system in re.findall(r"System (\d) \(\d+ % for independent", caption)] == systems
