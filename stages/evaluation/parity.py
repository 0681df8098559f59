"""Was the adapter served? Answers are checked, token by token, by the unmerged adapter in plain PEFT.

A merged copy, a server's LoRA module and the adapter itself compute the same function with different
rounding, so a token is accepted if its logit is within TOLERANCE of the best one. If too few tokens are
accepted, something else was served. This happens: others have evaluated the base model without noticing it
(lm-evaluation-harness issue 2432).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stages.config import ModelSection
from stages.engines.in_process import word_tokens
from stages.errors import AnswerError
from stages.evaluation.answer_cache import CachedAnswer
from stages.models.base import load_adapted, load_base
from stages.prompts.renderer import Asked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOLERANCE = 0.5
"""Logits. At their usual size bfloat16 resolves 0.125, and merging rounds every weight once more."""
LEAST = 0.9
"""Share of tokens that must be accepted."""
LONGEST = 64
"""How many tokens of an answer are checked."""


@torch.no_grad()
def check(
    pairs: list[tuple[Asked, CachedAnswer]],
    model: ModelSection,
    adapter: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    hint: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """How well the answers agree with the reference, and how many differ from the base model's answers.

    AnswerError with `hint` if less than LEAST of their tokens are accepted. Without an adapter the base model
    is the reference.
    """
    reference: Any = load_adapted(model, adapter) if adapter else load_base(model)
    off = reference.disable_adapter if adapter else nullcontext
    gaps: list[float] = []
    differing = 0
    for asked, reply in pairs:
        gaps += _gaps(reference, tokenizer, asked, reply)
        with off():
            differing += adapter is not None and max(_gaps(reference, tokenizer, asked, reply), default=0) > 0
    agree = sum(gap <= TOLERANCE for gap in gaps) / max(1, len(gaps))
    found = {
        "items": len(pairs),
        "tokens": len(gaps),
        "agree": agree,
        "worst_gap": max(gaps, default=0),
        "tolerance": TOLERANCE,
    }
    if agree < LEAST:
        counted = f"{agree:.0%} of {len(gaps)} tokens agree with it, {LEAST:.0%} expected"
        raise AnswerError(f"what was served is not this adapter: {counted}", hint)
    if adapter is not None:
        found["differ_from_base"] = differing
        if not differing:
            say(f"warning: the adapter's answers to the first {len(pairs)} items are the base model's own")
    return found


def _gaps(model: Any, tokenizer: PreTrainedTokenizerBase, asked: Asked, reply: CachedAnswer) -> list[float]:
    """How far the logit of each token of the reply, or of the word chosen, is below the best one."""
    before, words = word_tokens(tokenizer, asked.words) if reply.shares else ([], [])
    ids = reply.ids[:LONGEST]
    row = torch.tensor([asked.ids + before + ids], device=model.device)
    output = model(input_ids=row, logits_to_keep=len(ids) + 1)
    logits: Tensor = output.logits[0].float()  # (answer + 1, vocabulary)
    if reply.shares:
        of_words = logits[-1, words]
        return [float(of_words.max() - of_words[reply.best])]
    taken = logits[:-1].gather(1, torch.tensor(ids, device=model.device, dtype=torch.long)[:, None])[:, 0]
    return (logits[:-1].max(1).values - taken).tolist()  # type: ignore[no-any-return]
