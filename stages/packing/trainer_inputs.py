"""Forward passes of the trainers over packed batches: no padding, and shared prefixes computed once.

TRL computes every completion with its prompt, pads on both sides, and on CPUs applies the head to prompts and
padding, too. What TRL does with the log-probabilities afterwards, every loss and every metric, is untouched.
"""

import functools
import math
import types
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.packing import support
from stages.packing.batch import PackedBatch, PrefixGroup, Suffix, common_prefix_length
from stages.prompts.renderer import IGNORED

MAX_MASK_CELLS = 2**22
"""Most cells of masks for prefixes of unequal lengths: 8 MiB in bfloat16, for each head of a key head."""


def accept_packed(base: PreTrainedModel) -> None:
    """Teach `base` to take a packed batch: `base(packed=batch)` returns TRL's FusedCausalLMOutput.

    Its values are (1, tokens), zero where the batch has no target. A trainer's model is called through
    wrappers (PEFT, DDP), which pass unknown arguments on. Call this after the trainer is built, because TRL
    replaces the forward method, too.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    own_forward, packed_logprobs = base.forward.__func__, support.packed_logprobs

    @functools.wraps(own_forward)
    def forward(
        self: Any, *args: Any, packed: PackedBatch | None = None, temperature: float = 1.0, **kwargs: Any
    ) -> Any:
        if packed is None:
            return own_forward(self, *args, **kwargs)
        tokens = packed_logprobs(self, packed, temperature)
        positions = packed.target_positions()

        def spread(values: Tensor) -> Tensor:  # (targets,) → (1, tokens)
            return values.new_zeros(packed.targets.shape[1]).index_copy(0, positions, values)[None]

        return FusedCausalLMOutput(
            log_probs=spread(tokens.log_probs),
            entropy=spread(tokens.entropy),
            is_top1=spread(tokens.is_top1),
            label_mask=packed.targets != IGNORED,
        )

    base.forward = types.MethodType(forward, base)


def token_lists(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The real tokens of each row; both (rows, tokens)."""
    return [row[real].tolist() for row, real in zip(ids, mask.bool(), strict=True)]


def prefix_groups(prompts: list[list[int]], completions: list[list[int]]) -> list[PrefixGroup]:
    """One group for each run of equal prompts.

    The prompt's last token stands in every suffix, because each has another token to predict from it.
    """
    pairs = zip(prompts, completions, strict=True)
    return [
        PrefixGroup(prompt[:-1], [Suffix([prompt[-1], *ids][: len(ids)], ids) for _, ids in run])
        for prompt, run in groupby(pairs, key=lambda pair: pair[0])
    ]


def completion_logprobs(
    model: Any, input_ids: Tensor, attention_mask: Tensor, completion_length: int, temperature: float
) -> tuple[Tensor, Tensor, int]:
    """Log-probabilities and entropies of completions, each prompt computed once, and the tokens computed.

    input_ids, attention_mask: (rows, prompt + completion_length), prompts padded on the left and completions
    on the right, as TRL has them. The model must `accept_packed` rows. Returns (rows, completion_length)
    twice, zero behind the end of a completion.
    """
    is_completion = attention_mask[:, -completion_length:].bool()
    prompts = token_lists(input_ids[:, :-completion_length], attention_mask[:, :-completion_length])
    completions = token_lists(input_ids[:, -completion_length:], is_completion)
    batch = PackedBatch.from_groups(prefix_groups(prompts, completions), input_ids.device)
    output = model(packed=batch, temperature=temperature)
    positions = batch.target_positions()

    def rectangle(values: Tensor) -> Tensor:  # (1, packed tokens) → (rows, completion_length)
        return values.new_zeros(is_completion.shape).masked_scatter(is_completion, values[0, positions])

    return rectangle(output.log_probs), rectangle(output.entropy), batch.input_ids.numel()


def by_length(batch: dict[str, Any], group: int) -> dict[str, Any]:
    """The rows of a generation batch, with its groups in the order of their longest completion."""
    lengths = batch["completion_mask"].sum(1)
    size = math.gcd(len(lengths), group)  # a process may hold parts of groups
    longest = lengths.view(-1, size).amax(1)  # (groups,)
    rows = torch.arange(len(lengths), device=longest.device).view(-1, size)  # (groups, completions of one)
    order = rows[longest.argsort(stable=True)].flatten()
    return {
        name: value[order] if isinstance(value, Tensor) and value.dim() else value
        for name, value in batch.items()
    }


def sft_inputs(inputs: dict[str, Any], share_prefix: bool) -> dict[str, Any]:
    """The arguments of a forward pass over a padded batch of SFTTrainer, as one packed row.

    With `share_prefix` a beginning that rows have in common is computed once; dropout needs one for each.
    """
    mask = inputs["attention_mask"]
    rows, labels = token_lists(inputs["input_ids"], mask), token_lists(inputs["labels"], mask)
    batch = PackedBatch.from_groups(groups_of_rows(rows, labels, share_prefix), mask.device)
    return {"packed": batch, "attention_mask": mask}  # TRL counts tokens by the mask


def groups_of_rows(rows: list[list[int]], labels: list[list[int]], shares: bool) -> list[PrefixGroup]:
    """The rows in groups with a common prefix each, divided so that as few tokens as possible are computed.

    Groups within groups would save more where a part of a group has more in common.
    Every suffix keeps the token before its first target. Prefixes of unequal lengths need a mask for each
    suffix: where these would be large, all rows are one group. shares: False for an empty prefix.
    """
    pairs = sorted(zip(rows, labels, strict=True), key=lambda pair: pair[0])
    if shares and len(rows) * max(map(len, rows)) ** 2 <= MAX_MASK_CELLS:
        divided = _divide(pairs)
    else:
        limit = max(0, min(map(_first_target, labels)) - 1)
        divided = [(0, len(pairs), min(common_prefix_length(rows), limit) if shares else 0)]
    groups = []
    for begin, end, prefix in divided:
        members = pairs[begin:end]
        # Token i predicts label i + 1.
        suffixes = [Suffix(ids[prefix:-1], targets[prefix + 1 :]) for ids, targets in members]
        groups.append(PrefixGroup(members[0][0][:prefix], suffixes))
    return groups


def _divide(pairs: list[tuple[list[int], list[int]]]) -> list[tuple[int, int, int]]:
    """Divide sorted rows with labels into groups: begin, end and length of the common prefix of each.

    The best division up to a row is that up to some row before it, and one group more. n rows with a prefix
    of p tokens save (n − 1) · p; of equal divisions that with the longest last group is taken.
    """
    limits = [max(0, _first_target(targets) - 1) for _, targets in pairs]
    # In sorted order the common prefix of several rows is the shortest that two neighbours share.
    shared_with_next = [common_prefix_length([a, b]) for (a, _), (b, _) in pairwise(pairs)]
    saved, last_groups = [0], list[tuple[int, int]]()
    for end in range(1, len(pairs) + 1):
        prefix, candidates = limits[end - 1], [(saved[end - 1], end - 1, 0)]
        for begin in range(end - 2, -1, -1):
            prefix = min(prefix, limits[begin], shared_with_next[begin])
            candidates.append((saved[begin] + (end - begin - 1) * prefix, begin, prefix))
        most, begin, prefix = max(candidates, key=lambda candidate: (candidate[0], -candidate[1]))
        saved.append(most)
        last_groups.append((begin, prefix))
    groups, end = [], len(pairs)
    while end:
        begin, prefix = last_groups[end - 1]
        groups.append((begin, end, prefix))
        end = begin
    return groups[::-1]


def _first_target(targets: list[int]) -> int:
    return next((i for i, label in enumerate(targets) if label != IGNORED), len(targets))
