"""The null of importance: products of independent Gaussians, with the mean of each weight."""

import pytest
import torch

from stages.lora.importance import null


def _share(scores: torch.Tensor, theta: float) -> float:
    """Share of the elements that hold `theta` of the sum."""
    ordered = scores.double().sort(descending=True).values.cumsum(0)
    return float((ordered < theta * ordered[-1]).sum() + 1) / len(ordered)


def test_of_one_weight_it_is_the_distribution_of_a_product_of_two_gaussians():
    scores = null.gaussian_null({"a": torch.full((1000, 400), 3.0)})
    assert len(scores) == 400_000 and scores.double().mean().item() == pytest.approx(3.0, rel=0.01)
    assert [round(_share(scores, theta), 3) for theta in (0.1, 0.5, 0.9)] == pytest.approx(
        [0.015, 0.151, 0.520], abs=0.003
    )


def test_a_weight_keeps_its_mean_and_large_models_are_sampled(monkeypatch):
    monkeypatch.setattr(null, "SAMPLE", 4000)
    scores = null.gaussian_null({"b": torch.ones(100, 500), "a": torch.full((100, 1500), 1e-3)})
    assert len(scores) == 4000
    assert scores[:3000].sum() < 0.01 * scores[3000:].sum()
    assert torch.equal(
        scores, null.gaussian_null({"a": torch.full((100, 1500), 1e-3), "b": torch.ones(100, 500)})
    )
