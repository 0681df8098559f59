"""The trainers' forward passes over rows without padding, in which shared beginnings are computed once.

TRL computes every completion with its prompt, pads on both sides, and on CPUs applies the head to prompts and
padding, too. What TRL does with the log-probabilities afterwards, every loss and every metric, is untouched.
"""

from __future__ import annotations

import functools
import logging
import math
import types
from contextlib import nullcontext
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stages.packing import support
from stages.packing.batch import PackedBatch, PrefixGroup, Suffix, common_prefix_length
from stages.prompts.renderer import IGNORED

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def accept_packed(base: PreTrainedModel) -> None:
    """Let `base` take a row: `base(packed=row, temperature=1.0)`, which returns TRL's FusedCausalLMOutput.

    Its values are (1, tokens), zero where the row has no target. A trainer's model is called through wrappers
    (PEFT, DDP), which pass unknown arguments on. To be called when the trainer is built, because TRL replaces
    the forward method, too.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    usual, choose = base.forward.__func__, support.packed_logprobs

    @functools.wraps(usual)
    def forward(
        self: Any, *args: Any, packed: PackedBatch | None = None, temperature: float = 1.0, **given: Any
    ) -> Any:
        if packed is None:
            return usual(self, *args, **given)
        found = choose(self, packed, temperature)
        at = packed.target_positions()

        def spread(values: Tensor) -> Tensor:
            return values.new_zeros(packed.targets.shape[1]).index_copy(0, at, values)[None]

        return FusedCausalLMOutput(
            log_probs=spread(found.log_probs),
            entropy=spread(found.entropy),
            is_top1=spread(found.is_top1),
            label_mask=packed.targets != IGNORED,
        )

    base.forward = types.MethodType(forward, base)  # type: ignore[method-assign]


def may_share(model: PeftModel) -> bool:
    """Whether completions may share the pass over their prompt; if not, a warning says why."""
    apart = support.has_active_dropout(model)
    if apart:
        log.warning("with dropout each completion is computed with a prompt of its own; see rl.lora_dropout")
    return not apart


def _lists(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The real tokens of each row; both (rows, tokens)."""
    return [row[kept].tolist() for row, kept in zip(ids, mask.bool(), strict=True)]


def prefix_groups(prompts: list[list[int]], completions: list[list[int]]) -> list[PrefixGroup]:
    """One group for each run of equal prompts.

    The prompt's last token stands in every branch, because each has another token to predict after it.
    """
    pairs = zip(prompts, completions, strict=True)
    return [
        PrefixGroup(prompt[:-1], [Suffix([prompt[-1], *ids][: len(ids)], ids) for _, ids in run])
        for prompt, run in groupby(pairs, key=lambda pair: pair[0])
    ]


class SharedPrompts:
    """Mixin for GRPOTrainer, to stand before it among the base classes: each prompt is computed once.

    Set `sharing` before `train`, and let the model `accept` rows. Micro batches then hold whole groups, those
    with completions of about equal length together.
    """

    sharing: bool
    accelerator: Any
    args: Any
    model: Any
    num_iterations: int
    temperature: float
    _buffered_inputs: Any
    _metrics: Any
    _step: int

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """As TRL's, but that one shuffles completions over the micro batches.

        Here groups stand by length, but for bnpo, whose loss depends on what is in a micro batch together.
        """
        if not self.sharing or not self.model.training or self.args.loss_type == "bnpo":
            return super()._prepare_inputs(generation_batch)  # type: ignore[misc]
        from trl.trainer.utils import split_tensor_dict

        slices = self.args.steps_per_generation
        if self._step % (slices * self.num_iterations) == 0 or self._buffered_inputs is None:
            made = self._generate_and_score_completions(generation_batch)  # type: ignore[attr-defined]
            self._buffered_inputs = split_tensor_dict(_by_length(made, self.args.num_generations), slices)
        return self._buffered_inputs[self._step % slices]

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **more: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities and entropies of completions, (rows, logits_to_keep), and no auxiliary loss.

        Both are zero behind the end of a completion. Passes that only compare, of the reference and of the
        policy that sampled, drop nothing out: else equal models would differ.
        """
        rows = input_ids.split(batch_size or len(input_ids))
        masks = attention_mask.split(batch_size or len(input_ids))
        with nullcontext() if torch.is_grad_enabled() else support.eval_mode(self.model):
            if not self.sharing or compute_aux_loss or not self._fits(model, rows[0][:1], masks[0][:1]):
                return super()._get_per_token_logps_and_entropies(  # type: ignore[misc, no-any-return]
                    model,
                    input_ids,
                    attention_mask,
                    logits_to_keep,
                    batch_size,
                    compute_entropy,
                    compute_aux_loss,
                    **more,
                )
            made = [self._of_rows(model, *part, logits_to_keep) for part in zip(rows, masks, strict=True)]
        log_probs, entropies = (torch.cat(parts) for parts in zip(*made, strict=True))
        return log_probs, entropies if compute_entropy else None, None

    def _fits(self, model: Any, ids: Tensor, mask: Tensor) -> bool:
        return support.supports_packing(self.accelerator.unwrap_model(model), _lists(ids, mask)[0])

    def _of_rows(self, model: Any, ids: Tensor, mask: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        real = mask[:, -keep:].bool()
        prompts, completions = _lists(ids[:, :-keep], mask[:, :-keep]), _lists(ids[:, -keep:], real)
        row = PackedBatch.of(prefix_groups(prompts, completions), ids.device)
        found = model(packed=row, temperature=self.temperature)
        at = row.target_positions()
        if torch.is_grad_enabled():
            self._metrics["train"]["tokens_saved"].append(1 - row.input_ids.numel() / ids.numel())

        def rectangle(values: Tensor) -> Tensor:
            return values.new_zeros(real.shape).masked_scatter(real, values[0, at])

        return rectangle(found.log_probs), rectangle(found.entropy)


def _by_length(batch: dict[str, Any], group: int) -> dict[str, Any]:
    """The rows of a generation batch, with its groups in the order of their longest completion."""
    lengths = batch["completion_mask"].sum(1)
    size = math.gcd(len(lengths), group)  # a process may hold parts of groups
    longest = lengths.view(-1, size).amax(1)
    rows = torch.arange(len(lengths), device=longest.device).view(-1, size)
    order = rows[longest.argsort(stable=True)].flatten()
    return {
        name: value[order] if isinstance(value, Tensor) and value.dim() else value
        for name, value in batch.items()
    }


class PaddingFree:
    """Mixin for SFTTrainer, to stand before it among the base classes: rows without padding.

    Set `unpadded` and `shares` before `train`, and let the model `accept` rows. With `shares` the beginning
    that all rows of a micro batch have in common is computed once; dropout needs one for each. A row has no
    router's loss: a mixture of experts is padded.
    """

    unpadded: bool
    shares: bool
    accelerator: Any
    aux_loss_enabled: bool

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **given: Any) -> Any:
        if self.unpadded and not self.aux_loss_enabled:
            rows = _lists(inputs["input_ids"], inputs["attention_mask"])
            if support.supports_packing(self.accelerator.unwrap_model(model), rows[0]):
                labels = _lists(inputs["labels"], inputs["attention_mask"])
                row = PackedBatch.of([suffix_only(rows, labels, self.shares)], inputs["input_ids"].device)
                inputs = {
                    "packed": row,
                    "attention_mask": inputs["attention_mask"],
                }  # TRL counts tokens by it
        return super().compute_loss(model, inputs, *args, **given)  # type: ignore[misc]


def suffix_only(rows: list[list[int]], labels: list[list[int]], shares: bool) -> PrefixGroup:
    """All rows as one group, whose beginning ends before the first token after which one is predicted."""
    first = min(next((i for i, label in enumerate(row) if label != IGNORED), len(row)) for row in labels)
    shared = max(0, min(common_prefix_length(rows), first - 1)) if shares else 0
    pairs = zip(rows, labels, strict=True)
    return PrefixGroup(
        rows[0][:shared], [Suffix(ids[shared:-1], wanted[shared + 1 :]) for ids, wanted in pairs]
    )
