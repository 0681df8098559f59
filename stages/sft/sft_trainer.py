"""The SFT trainer: TRL's, with rows without padding and exact resume."""

from __future__ import annotations

from typing import Any

from trl import SFTTrainer

from stages.lora.training.trainer import ResumableTrainer
from stages.packing import trainer_inputs


class SftTrainer(ResumableTrainer, SFTTrainer):
    """SFTTrainer with packed rows and exact resume; its overrides stand in the order of a step."""

    def __init__(self, *, packed: bool = True, share_prefix: bool = False, **arguments: Any) -> None:
        """packed: compute a micro batch as one packed row; the model must `accept_packed` rows.

        share_prefix: compute the beginning that all rows of a micro batch have in common once.
        """
        super().__init__(**arguments)
        self.packed, self.share_prefix = packed, share_prefix

    def _prepare_inputs(self, inputs: Any) -> Any:
        prepared = super()._prepare_inputs(inputs)
        self.window.append(prepared)
        return prepared

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        # A packed row has no router's loss: a mixture of experts is padded.
        packable = self.packed and not self.aux_loss_enabled
        if packable and self._supports_packing(model, inputs["input_ids"], inputs["attention_mask"]):
            inputs = trainer_inputs.sft_inputs(inputs, self.share_prefix)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def restore_counters(self) -> None:
        """No checkpoint holds the count of tokens, but the log does."""
        self._total_train_tokens = self.state.log_history[-1]["num_tokens"]
