"""How far vLLM's probabilities of its rollouts are from the trainer's.

TRL logs their ratios as they are used: what the correction masked is 0 by then, and what it cut has its
limit, so that a run whose samples are all thrown away looks calm. Here they are logged as they were.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

RAW, BEYOND = "sampling/raw_ratio", "sampling/beyond_limit_share"


class Ratios:
    """Mixin for GRPOTrainer, to stand before it among the base classes, for corrected rollouts."""

    accelerator: Any
    model: Any
    vllm_importance_sampling_mode: str
    vllm_importance_sampling_clip_max: float
    _metrics: Any

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        made = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        if "importance_sampling_ratio" in made and self.model.training:
            of_tokens = self.vllm_importance_sampling_mode.startswith("token")
            raw = ratios(made, of_tokens)
            beyond = (raw > self.vllm_importance_sampling_clip_max).float()
            found = {f"{RAW}/mean": raw.mean(), f"{RAW}/max": raw.max(), BEYOND: beyond.mean()}
            for name, value in found.items():
                every = self.accelerator.gather(value)
                of_all = every.max() if name.endswith("max") else every.mean()
                self._metrics["train"][name].append(of_all.item())
        return made


def ratios(made: dict[str, Tensor], of_tokens: bool) -> Tensor:
    """The trainer's probability over vLLM's: of each token that was written, or of each completion.

    made: the log-probabilities of both and the mask of what was written, (completions, tokens) each. A token
    of which vLLM told none counts as equal, as in TRL.
    """
    mask = made["completion_mask"].bool()
    apart = (made["old_per_token_logps"] - made["sampling_per_token_logps"]).nan_to_num(nan=0.0) * mask
    return (apart[mask] if of_tokens else apart.sum(-1)).exp()
