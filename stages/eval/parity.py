"""Check that vLLM served the adapter: its answers are compared, token by token, with the unmerged adapter.

The reference is plain PEFT. A merged copy, a server's LoRA module and the adapter itself compute the same
function with different rounding, so a token is accepted if its logit is within TOLERANCE of the best one. If
too few tokens are accepted, something else was served. This happens: people have evaluated the base model
without noticing it (lm-evaluation-harness issue 2432).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from stages.config import ModelSection
from stages.engines.in_process import word_tokens
from stages.errors import AnswerError
from stages.eval.answer_cache import CachedAnswer
from stages.models.base import load_adapted, load_base
from stages.prompts.renderer import RenderedPrompt

ITEMS = 8
"""Items whose answers are checked."""
TOLERANCE = 0.5
"""Logits. At their usual size bfloat16 resolves 0.125, and merging rounds every weight once more."""
MIN_AGREEMENT = 0.9
"""Share of tokens that must be accepted."""
MAX_TOKENS = 64
"""Tokens of an answer that are checked, from its beginning."""


@torch.no_grad()
def check(
    answers: list[tuple[RenderedPrompt, CachedAnswer, range]],
    model: ModelSection,
    adapter: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    hint: str,
) -> dict[str, Any]:
    """Measure how well answers agree with the unmerged adapter or, without one, with the base model.

    answers: each with its prompt and the places of tokens that the model did not write. Raises AnswerError
    with `hint` if less than MIN_AGREEMENT of the other tokens are accepted.
    """
    reference: Any = load_adapted(model, adapter) if adapter else load_base(model)
    gaps = [gap for given in answers for gap in _logit_gaps(reference, tokenizer, *given)]
    agree = sum(gap <= TOLERANCE for gap in gaps) / max(1, len(gaps))
    if agree < MIN_AGREEMENT:
        counts = f"{agree:.0%} of {len(gaps)} tokens agree with it, {MIN_AGREEMENT:.0%} expected"
        raise AnswerError(f"what was served is not this adapter: {counts}", hint)
    return {"items": len(answers), "tokens": len(gaps), "agree": agree, "worst_gap": max(gaps, default=0)}


def _logit_gaps(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: RenderedPrompt,
    answer: CachedAnswer,
    not_written: range,
) -> list[float]:
    """Logit gap to the argmax, for each answer token; for a choice, to the likeliest of the words."""
    # The words of a choice may begin with the same tokens: the choice falls at the token after these.
    word_prefix, word_ids = word_tokens(tokenizer, prompt.words) if answer.shares else ([], [])
    ids = answer.ids[:MAX_TOKENS]
    row = torch.tensor([prompt.ids + word_prefix + ids], device=model.device)  # (1, tokens)
    # Position t predicts token t + 1: the row before the answer's first token is needed, the last is not.
    output = model(input_ids=row, logits_to_keep=len(ids) + 1)
    logits: Tensor = output.logits[0].float()  # (answer + 1, vocabulary)
    if answer.shares:
        word_logits = logits[-1, word_ids]  # (words,)
        return [float(word_logits.max() - word_logits[answer.best])]
    targets = torch.tensor(ids, device=model.device, dtype=torch.long)
    answer_logits = logits[:-1].gather(1, targets[:, None])[:, 0]  # (answer,)
    gaps = (logits[:-1].max(1).values - answer_logits).tolist()
    return [gap for place, gap in enumerate(gaps) if place not in not_written]
