"""Was the adapter served? Answers are followed, token by token, by the base model with the unmerged adapter in plain PEFT.

A merged copy, a LoRA module of a server and the adapter itself compute the same function in other roundings, so a token is
accepted where its logit is within TOLERANCE of the best one. Where too few are, something else was served: others have scored
the base model unnoticed (lm-evaluation-harness issue 2432).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stages.benchmarks.replies import Recorded
from stages.config import ModelSection
from stages.engines.transformers import word_tokens
from stages.errors import AnswerError
from stages.language.prompts import Asked
from stages.models.base import load_adapted, load_base

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOLERANCE = 0.5
"""Logits; bfloat16 resolves 0.125 at the usual size of a logit, and merging rounds every weight once more."""
LEAST = 0.9
"""Share of tokens that must be accepted."""
LONGEST = 64
"""Tokens of an answer that are followed."""


@torch.no_grad()
def check(
    pairs: list[tuple[Asked, Recorded]],
    model: ModelSection,
    adapter: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    hint: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """How well the answers agree with the reference, and how many the base would have given too.

    AnswerError with `hint` if fewer than LEAST of their tokens are the reference's.
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
        raise AnswerError(
            f"what was served is not this adapter: {agree:.0%} of {len(gaps)} tokens agree with it, {LEAST:.0%} expected",
            hint,
        )
    if adapter is not None:
        found["differ_from_base"] = differing
        if not differing:
            say(f"warning: the adapter's answers to the first {len(pairs)} items are the base model's own")
    return found


def _gaps(model: Any, tokenizer: PreTrainedTokenizerBase, asked: Asked, reply: Recorded) -> list[float]:
    """Per token of the reply, how far its logit is below the best one; of a choice, how far below the best word's."""
    before, words = word_tokens(tokenizer, asked.words) if reply.shares else ([], [])
    ids = reply.ids[:LONGEST]
    row = torch.tensor([asked.ids + before + ids], device=model.device)
    logits: Tensor = (
        model(input_ids=row, logits_to_keep=len(ids) + 1).logits[0].float()
    )  # (answer + 1, vocabulary)
    if reply.shares:
        of_words = logits[-1, words]
        return [float(of_words.max() - of_words[reply.best])]
    taken = logits[:-1].gather(1, torch.tensor(ids, device=model.device, dtype=torch.long)[:, None])[:, 0]
    return (logits[:-1].max(1).values - taken).tolist()  # type: ignore[no-any-return]
