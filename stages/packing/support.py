"""Forward passes of a model over packed rows (`stages.packing.batch`), if its architecture supports them.

The model's attention implementation is wrapped in one that can also follow a layout. Without a layout the
results are those of the original implementation, to the bit.
"""

import functools
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stages.packing.batch import AttentionLayout, PackedBatch, PrefixGroup, Suffix
from stages.packing.logprobs import TokenLogprobs, selected_logprobs

log = logging.getLogger(__name__)

KINDS = ("eager", "sdpa")
"""Attention implementations of transformers that can be wrapped."""
MARK = "flat_"
"""Prefix of the names under which the wrapped implementations are registered."""
LONGEST = 512
"""Most tokens on which packed and plain passes are compared; more logits would take much memory."""
TOLERANCE, TOLERANCE_16 = 1e-3, 0.25
"""Largest mean difference of log-probabilities between a packed and a plain pass, in 32 and in 16 bits."""


def _wrapped_attention(kind: str) -> Any:
    """Attention function that follows a layout if it gets one, and else calls implementation `kind`."""

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        layout: AttentionLayout | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if layout is None:
            # "eager" is not in the registry: each modelling file defines its own.
            eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
            original = ALL_ATTENTION_FUNCTIONS.get_interface(kind, eager)
            return original(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
        output = layout.attend(module.layer_idx, query, key, value, scale=scaling, dropout_p=dropout)
        return output, None

    return attend


for kind in KINDS:
    AttentionInterface.register(MARK + kind, _wrapped_attention(kind))
    AttentionMaskInterface.register(MARK + kind, ALL_MASK_ATTENTION_FUNCTIONS[kind])


def unsupported_reason(model: PreTrainedModel) -> str | None:
    """Reason why the architecture cannot run packed rows, as far as its config shows, else None."""
    config = model.config
    kind = config._attn_implementation.removeprefix(MARK)
    if kind not in KINDS:
        return f"attention is {kind}, not {' or '.join(KINDS)}"
    text = config.get_text_config()  # a model that sees images, too, has its windows there
    layer_types = {*(getattr(text, "layer_types", None) or ["full_attention"])}
    if layer_types != {"full_attention"}:
        return f"it has layers of {', '.join(sorted(layer_types - {'full_attention'}))}"
    # Older configs have a window but no layer_types; every layer then has that window.
    if getattr(text, "layer_types", None) is None and getattr(text, "sliding_window", None):
        return f"its layers see {text.sliding_window} tokens back"
    if config.model_type in ("diffllama", "hrm_text"):
        return "its layers attend several times, and a cache keeps one pass"
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        return "its head is not a linear layer"
    return None


def supports_packing(model: Any, ids: list[int]) -> bool:
    """True if packed rows give the model's own log-probabilities; if not, one warning says why.

    The answer is computed once for each model. model: a plain model, or one in PEFT's wrapper. ids: a real
    sequence, on which a packed and a plain pass are compared. After True the model can be given to
    `packed_hidden_states`; its own forward pass gives the same results as before, to the bit.
    """
    base = _unwrapped(model)
    if base not in _supported:
        prompt = "a trained prompt precedes every text" if is_prompt_learning(model) else None
        reason = prompt or unsupported_reason(base) or _mismatch(model, base, ids)
        if reason:
            _warn(f"{type(base).__name__} computes every sequence by itself: {reason}")
        _supported[base] = reason is None
    return _supported[base]


_warn = functools.cache(log.warning)
"""Warns once per text, although the trainer and its sampler each have a model."""
_supported: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Answers of `supports_packing` by plain model."""


@torch.no_grad()
def _mismatch(model: Any, base: PreTrainedModel, ids: list[int]) -> str | None:
    """Describe how a packed pass differs from a plain one; None if it agrees. Draws no random numbers."""
    # One sequence, cut into a prefix and a suffix that is there twice: a model that ignores the layout would
    # let the second suffix see the first, or give it wrong positions.
    ids = (ids * 4)[: min(max(4, len(ids)), LONGEST)]  # at least 4 tokens: prefix and suffix are not empty
    half = len(ids) // 2
    device = base.get_input_embeddings().weight.device
    targets = ids[half:]
    suffix = Suffix(ids[half - 1 : -1], targets)
    row = PackedBatch.from_groups([PrefixGroup(ids[: half - 1], [suffix, suffix])], device)
    try:
        with eval_mode(model):
            logits = model(input_ids=torch.tensor([ids], device=device)).logits[0, half - 1 : -1]
            base.set_attn_implementation(MARK + base.config._attn_implementation.removeprefix(MARK))
            packed = packed_logprobs(model, row).log_probs.view(2, -1)  # (suffixes, targets)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    plain = logits.to(packed.dtype).log_softmax(-1).gather(1, torch.tensor(targets, device=device)[:, None])
    gap = float((packed - plain[:, 0]).abs().mean())
    # By the model's dtype, not that of the log-probabilities: a head may return 32 bits for 16-bit states.
    limit = TOLERANCE if base.dtype.itemsize >= 4 else TOLERANCE_16
    return None if gap <= limit else f"log-probabilities in a row differ by {gap:.2g}"


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Context in which the model is in eval mode, without dropout; each module's mode is restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def has_active_dropout(model: nn.Module) -> bool:
    """True if any dropout is active in training (adapter, layers or attention)."""
    return any(
        (isinstance(module, nn.Dropout) and module.p) or getattr(module, "attention_dropout", 0.0)
        for module in model.modules()
    )


def is_prompt_learning(model: Any) -> bool:
    """True if the adapter is a trained prompt that precedes every text.

    PEFT then ignores position ids, so padding on the left would separate the prompt from the text.
    """
    return hasattr(model, "get_base_model") and model.active_peft_config.is_prompt_learning


def _unwrapped(model: Any) -> PreTrainedModel:
    """The plain model inside PEFT's wrapper, if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def packed_hidden_states(
    model: Any, input_ids: Tensor, position_ids: Tensor, layout: AttentionLayout
) -> Tensor:
    """Compute the last hidden states of a packed row, (1, tokens, width).

    The model must be one that `supports_packing`. input_ids, position_ids: (1, tokens).
    """
    # The layout decides what each token sees. transformers passes a mask of four dimensions on as it is,
    # instead of building a causal one for the row.
    unused_mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=input_ids.device)
    inputs = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": unused_mask}
    output = _unwrapped(model).base_model(**inputs, use_cache=False, layout=layout)
    return output.last_hidden_state


def packed_logprobs(model: Any, row: PackedBatch, temperature: float = 1.0) -> TokenLogprobs:
    """Log-probabilities of the row's targets, in order; the head is applied at their positions only."""
    positions = row.target_positions()
    states = packed_hidden_states(model, row.input_ids, row.position_ids, row)[0].index_select(0, positions)
    return selected_logprobs(states, model.get_output_embeddings(), row.targets[0, positions], temperature)
