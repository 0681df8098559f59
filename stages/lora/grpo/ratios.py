"""Importance ratios between vLLM's probabilities and the trainer's, before they are corrected.

TRL logs the ratios as it uses them: what the correction masked is 0 by then, and what it truncated has its
limit, so that a run whose samples are all thrown away looks calm. Here they are logged as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

RAW, BEYOND = "sampling/raw_ratio", "sampling/beyond_limit_share"


def raw_ratio_metrics(
    batch: dict[str, Tensor], of_tokens: bool, limit: float, gather: Callable[[Tensor], Tensor]
) -> Iterator[tuple[str, float]]:
    """Mean and largest raw ratio, and the share beyond the correction's limit, over all processes.

    The ratio is the trainer's probability over vLLM's, of each token that was written or of each completion.
    batch: the log-probabilities of both and the mask of what was written, (completions, tokens) each. A token
    for which vLLM gave none counts as equal, as in TRL. The two means weigh every process alike, however many
    tokens it has. gather: joins a value of every process.
    """
    mask = batch["completion_mask"].bool()
    differences = batch["old_per_token_logps"] - batch["sampling_per_token_logps"]
    differences = differences.nan_to_num(nan=0.0) * mask
    raw = (differences[mask] if of_tokens else differences.sum(-1)).exp()
    yield f"{RAW}/mean", gather(raw.mean()).mean().item()
    yield f"{RAW}/max", gather(raw.max()).max().item()
    yield BEYOND, gather((raw > limit).float().mean()).mean().item()
