"""The nulls of importance: products of independent Gaussians, with the mean of each weight or feature."""

import re
from types import SimpleNamespace

import pytest
import torch

from stages.lora.importance.masks import flatten_weights, write_importance
from stages.report import elements
from stages.store.artifacts import Artifact


def _share(scores: torch.Tensor, theta: float) -> float:
    """Share of the elements that hold `theta` of the sum."""
    ordered = scores.double().sort(descending=True).values.cumsum(0)
    return float((ordered < theta * ordered[-1]).sum() + 1) / len(ordered)


def test_of_one_weight_it_is_the_distribution_of_a_product_of_two_gaussians():
    (scores,) = elements.gaussian_null({2: {"a": torch.full((1000, 400), 3.0)}}).values()
    assert len(scores) == 400_000 and scores.double().mean().item() == pytest.approx(3.0, rel=0.01)
    shares = [_share(scores, theta) for theta in (0.1, 0.5, 0.9)]
    assert shares == pytest.approx([0.015, 0.151, 0.520], abs=0.003)


@pytest.mark.parametrize(("spread", "by_weight_more"), [(1, 0.04), (0, -0.005)])
def test_by_feature_it_is_what_chance_leaves_within_features(spread, by_weight_more):
    """To a point in 100, of products whose scales differ by feature alone, or not: 8 elements tell each."""
    draw = torch.Generator().manual_seed(1)
    scales = 0.2 + spread * torch.rand(5_000, 1, generator=draw) ** 3
    products = [torch.randn(2, 5_000, 8, generator=draw).prod(0).abs() * scales for _ in range(2)]
    scores = {"x.lora_A.weight": products[0].T, "x.lora_B.weight": products[1]}
    by_weight, by_feature = (elements.gaussian_null({1: scores}, by)[1] for by in (False, True))
    for theta in (0.1, 0.5, 0.9):
        drawn = _share(flatten_weights(scores), theta)
        assert _share(by_feature, theta) == pytest.approx(drawn, abs=0.01)
    assert _share(by_weight, 0.9) > drawn + by_weight_more


def test_systems_share_the_values_but_not_the_gradients():
    weight = torch.ones(1000, 400)
    scores = elements.gaussian_null({1: {"a": weight}, 2: {"a": 3 * weight}})
    # With x = log |g|, y = log |g'|, z = log |φ| alike and independent, x + z and y + z correlate by a half.
    correlation = torch.corrcoef(torch.stack([s.log() for s in scores.values()]))[0, 1]
    assert float(correlation) == pytest.approx(0.5, abs=0.01)
    index = elements.null_jaccard({1: {"a": weight}, 2: {"a": 3 * weight}}, 0.9)
    assert index == pytest.approx(0.52, abs=0.005)


@pytest.mark.parametrize(
    ("variant", "rescore", "systems"),
    [("", "grpo_sign", [1, 2]), ("rl", "grpo_sign", [1]), ("rl", "grad2", []), ("rl", "taylor1", [1, 2])],
)
def test_only_products_of_gradient_and_value_have_a_null(tmp_path, monkeypatch, variant, rescore, systems):
    monkeypatch.setattr("stages.report.figures.svg", lambda figure: "<svg></svg>")
    scores = {system: {"a": torch.logspace(-3, 0, 64)[:, None].expand(64, 8)} for system in (1, 2)}
    write_importance(tmp_path / "importance.safetensors", scores)
    config = SimpleNamespace(
        score=SimpleNamespace(scorer="taylor2"),
        rl=SimpleNamespace(rescore=rescore),
        partition=SimpleNamespace(theta=0.9),
    )
    caption = elements.cumulative_importance(config, Artifact(tmp_path, {"variant": variant})).caption
    found = re.findall(r"System (\d) \((\d+) % for Gaussians by weight, (\d+) % for Gaussians by f", caption)
    assert [int(system) for system, *_ in found] == systems
    assert all(int(by_feature) < int(by_weight) for _, by_weight, by_feature in found)
