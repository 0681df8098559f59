"""The head's log-probabilities in parts, against the whole distribution."""

import pytest
import torch
from torch import nn

from stages.packing import logprobs
from stages.packing.logprobs import selected_logprobs


def given(bias: bool, tokens: int = 13, words: int = 29, width: int = 8):
    """Hidden states with a gradient, a frozen head, and targets; in float64."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, dtype=torch.float64, requires_grad=True)
    layer = nn.Linear(width, words, bias=bias, dtype=torch.float64).requires_grad_(False)
    nn.init.normal_(layer.weight)
    return hidden, layer, torch.randint(0, words, (tokens,))


def expected(hidden, layer, targets, temperature):
    logp = (layer(hidden) / temperature).log_softmax(-1)
    own = logp.gather(1, targets[:, None])[:, 0]
    return own, -(logp.exp() * logp).sum(-1), logp.argmax(-1) == targets


@pytest.mark.parametrize("part", [1, 29 * 5, 2**24])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_a_log_softmax_in_parts(bias, temperature, part, monkeypatch):
    """A part of one logit still takes a token at a time; five tokens at a time leave a smaller part."""
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", part)
    hidden, layer, targets = given(bias)
    targets[::2] = layer(hidden).argmax(-1)[::2]
    found = selected_logprobs(hidden, layer, targets, temperature)
    log_probs, entropy, likeliest = expected(hidden, layer, targets, temperature)
    torch.testing.assert_close(found.log_probs, log_probs, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.entropy, entropy, rtol=0, atol=1e-12)
    assert torch.equal(found.is_top1, likeliest) and 0 < likeliest.sum() < len(likeliest)
    weights = torch.randn(len(targets), dtype=torch.float64)
    (wanted,) = torch.autograd.grad((weights * log_probs).sum(), hidden)
    (slope,) = torch.autograd.grad((weights * found.log_probs).sum(), hidden)
    torch.testing.assert_close(slope, wanted, rtol=0, atol=1e-12)


def test_16_bit_states_give_32_bit_numbers():
    """Of the logits as the head has them in 16 bits; the gradient is again in 16 bits."""
    hidden, layer, targets = given(bias=True)
    small, layer = hidden.detach().bfloat16().requires_grad_(), layer.bfloat16()
    found = selected_logprobs(small, layer, targets, 0.7)
    assert found.log_probs.dtype == found.entropy.dtype == torch.float32
    logp = (layer(small).double() / 0.7).log_softmax(-1)
    wanted = logp.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found.log_probs.double(), wanted, rtol=0, atol=1e-5)
    found.log_probs.sum().backward()
    wide = small.detach().double().requires_grad_()
    expected(wide, layer.double(), targets, 0.7)[0].sum().backward()
    assert float((small.grad - wide.grad).norm() / wide.grad.norm()) < 0.02


def test_no_token_has_no_value():
    hidden, layer, targets = given(bias=False)
    found = selected_logprobs(hidden[:0], layer, targets[:0])
    assert found.log_probs.shape == found.entropy.shape == found.is_top1.shape == (0,)
    found.log_probs.sum().backward()
    assert not hidden.grad.any()
