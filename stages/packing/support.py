"""A model's pass over several sequences in one row (`stages.packing.batch`), if its architecture allows it.

Attention is replaced by one that can also take a layout. Without a layout it is the model's own, to the bit.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stages.packing.batch import AttentionArgs, AttentionLayout, PackedBatch, PrefixGroup, Suffix
from stages.packing.logprobs import TokenLogprobs, selected_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

KINDS = ("eager", "sdpa")
"""Implementations of attention beside which a layout may stand."""
MARK = "flat_"
"""Before the name of an implementation that can also take a layout."""
LONGEST = 512
"""Tokens on which the two are compared; the logits of a long sequence take much memory."""
TOLERANCE, TOLERANCE_16 = 1e-3, 0.25
"""Mean difference of log-probabilities, between two ways to compute them, in 32 and in 16 bits."""


def _attention(usual: str) -> Any:
    """Attention as in a layout, or where none is given, as `usual`."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        layout: AttentionLayout | None = None, scaling: float | None = None, dropout: float = 0.0,
        **given: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if layout is None:
            own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
            interface = ALL_ATTENTION_FUNCTIONS.get_interface(usual, own)
            return interface(  # type: ignore[no-any-return]
                module, query, key, value, mask, scaling=scaling, dropout=dropout, **given
            )
        return layout.attend(module.layer_idx, query, key, value, AttentionArgs(scaling, dropout)), None

    return attend


for usual in KINDS:
    AttentionInterface.register(MARK + usual, _attention(usual))
    AttentionMaskInterface.register(MARK + usual, ALL_MASK_ATTENTION_FUNCTIONS[usual])


def unsupported_reason(model: PreTrainedModel) -> str | None:
    """Why the architecture cannot take rows, as far as its config says; else None."""
    config = model.config
    kind = config._attn_implementation.removeprefix(MARK)
    if kind not in KINDS:
        return f"attention is {kind}, not {' or '.join(KINDS)}"
    kinds = {*(getattr(config, "layer_types", None) or ["full_attention"])}
    if kinds != {"full_attention"}:
        return f"it has layers of {', '.join(sorted(kinds - {'full_attention'}))}"
    if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None):
        return f"its layers see {config.sliding_window} tokens back"
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        return "its head is no linear layer"
    return None


def supports_packing(model: Any, ids: list[int]) -> bool:
    """Whether rows give the model's own numbers; if not, one warning says why. Asked once for each model.

    model: a plain model, or one in PEFT's wrapper. ids: a real sequence, on which both ways are compared. Its
    architecture then takes rows, see `hidden`; its own forward pass stays as it was, to the bit.
    """
    base = _plain(model)
    if base not in _fitting:
        prompt = "a trained prompt stands before every text" if is_prompt_learning(model) else None
        reason = prompt or unsupported_reason(base) or _differs(model, base, ids)
        if reason:
            _warn(f"{type(base).__name__} computes every sequence by itself: {reason}")
        _fitting[base] = reason is None
    return _fitting[base]


@functools.cache
def _warn(text: str) -> None:
    """Once, though the trainer and its sampling have a model each."""
    log.warning("%s", text)


_fitting: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.no_grad()
def _differs(model: Any, base: PreTrainedModel, ids: list[int]) -> str | None:
    """What is wrong with a row of two equal branches; None if nothing is. Draws no random number."""
    ids = (ids * 4)[: min(max(4, len(ids)), LONGEST)]
    half = len(ids) // 2
    device = base.get_input_embeddings().weight.device
    branch = Suffix(ids[half - 1 : -1], ids[half:])
    row = PackedBatch.of([PrefixGroup(ids[: half - 1], [branch, branch])], device)
    try:
        with eval_mode(model):
            logits = model(input_ids=torch.tensor([ids], device=device)).logits[0, half - 1 : -1]
            base.set_attn_implementation(MARK + base.config._attn_implementation.removeprefix(MARK))
            found = packed_logprobs(model, row).log_probs.view(2, -1)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    usual = logits.to(found.dtype).log_softmax(-1).gather(1, torch.tensor(ids[half:], device=device)[:, None])
    gap = float((found - usual[:, 0]).abs().mean())
    # By the model's own type: a head may give 32 bits for hidden states of 16.
    limit = TOLERANCE if base.dtype.itemsize >= 4 else TOLERANCE_16
    return None if gap <= limit else f"log-probabilities in a row differ by {gap:.2g}"


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, nothing drops out."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def has_active_dropout(model: nn.Module) -> bool:
    """Whether anything in the model drops out in training: its adapter, its layers or its attention."""
    return any(
        (isinstance(module, nn.Dropout) and module.p) or getattr(module, "attention_dropout", 0.0)
        for module in model.modules()
    )


def is_prompt_learning(model: Any) -> bool:
    """Whether a trained prompt stands before every text.

    PEFT then ignores position ids, so padding would stand between the prompt and the text.
    """
    return hasattr(model, "get_base_model") and model.active_peft_config.is_prompt_learning


def _plain(model: Any) -> PreTrainedModel:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[no-any-return]


def packed_hidden_states(
    model: Any, input_ids: Tensor, position_ids: Tensor, layout: AttentionLayout
) -> Tensor:
    """Last hidden states of a row: (1, tokens, width). The model must be one that `fits`.

    input_ids, position_ids: (1, tokens).
    """
    anything = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=input_ids.device)
    return (
        _plain(model)
        .base_model(  # type: ignore[no-any-return]
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=anything,  # with four dimensions the library makes none of its own
            use_cache=False,
            layout=layout,
        )
        .last_hidden_state
    )


def packed_logprobs(model: Any, row: PackedBatch, temperature: float = 1.0) -> TokenLogprobs:
    """What the model gives for the row's targets, in their order; without the head on any other token."""
    at = row.target_positions()
    states = packed_hidden_states(model, row.input_ids, row.position_ids, row)[0].index_select(0, at)
    return selected_logprobs(states, model.get_output_embeddings(), row.targets[0, at], temperature)
