import copy

import pytest
import torch
from torch import nn

from stages.lora.adapter.elements import SparseLinear, frozen_weights


def layer() -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    linear = nn.Linear(12, 7, bias=False)
    return linear, torch.rand(7, 12) < 0.4


def test_frozen_elements_stay_to_the_bit_and_active_ones_move():
    linear, mask = layer()
    start = linear.weight.detach().clone()
    packed = SparseLinear(linear, mask)
    steps = torch.optim.AdamW(packed.parameters(), lr=0.1, weight_decay=0.1, fused=True)
    for _ in range(3):
        packed(torch.randn(5, 12)).square().sum().backward()
        nn.utils.clip_grad_norm_(packed.parameters(), 1.0)
        steps.step()
        steps.zero_grad()
    assert torch.equal(packed.weight[~mask], start[~mask]) and (packed.weight != start)[mask].all()
    assert torch.equal(packed.weight[mask], packed.values)


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_those_of_the_plain_layer(autocast):
    linear, mask = layer()
    packed, x = SparseLinear(copy.deepcopy(linear), mask), torch.randn(5, 12)
    with torch.autocast("cpu", torch.bfloat16, autocast):
        linear(x).square().sum().backward()
        packed(x).square().sum().backward()
    assert torch.equal(packed.values.grad, linear.weight.grad[mask])


def test_state_dict_is_dense_under_the_plain_name_and_loads_back():
    linear, mask = layer()
    packed = SparseLinear(linear, mask)
    state = packed.state_dict()
    assert list(state) == ["weight"] and torch.equal(state["weight"], linear.weight)
    state["weight"][mask] += 1
    packed.load_state_dict(state)
    assert torch.equal(packed.weight[mask], linear.weight[mask] + 1)
    state["weight"][~mask] += 1
    with pytest.raises(RuntimeError, match="differs in frozen elements"):
        packed.load_state_dict(state)


def test_without_active_elements_there_is_no_parameter():
    linear, _ = layer()
    packed = SparseLinear(linear, torch.zeros(7, 12, dtype=torch.bool))
    assert list(packed.parameters()) == [] and list(packed.state_dict()) == ["weight"]
    assert torch.equal(packed.weight, linear.weight)


def test_fixed_weights_are_made_once_and_train_again_afterwards():
    linear, mask = layer()
    packed = SparseLinear(linear, mask)
    with torch.no_grad():
        packed.values += 1
    with frozen_weights(nn.Sequential(packed)):
        assert torch.equal(packed.weight[mask], linear.weight[mask] + 1)
        assert packed.weight is packed.weight
    with torch.no_grad():
        packed.values -= 0.5
    packed(torch.randn(5, 12)).sum().backward()
    assert packed.values.grad.any() and torch.equal(packed.weight[mask], packed.values)
