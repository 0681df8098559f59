"""Drift: how far SFT or RL has moved on the rows of `partition.protect`, every few steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

from stages.lora.adapter import adapter
from stages.lora.adapter.elements import sparse_layers
from stages.lora.training.curves import PROTECTED_KL
from stages.lora.training.start import Training
from stages.packing import losses
from stages.packing.support import eval_mode
from stages.prompts.renderer import IGNORED, Row
from stages.records import read_labels

TOKENS_AT_ONCE = 128
"""Answer tokens whose probabilities of the whole vocabulary exist at a time, in 64 bits and of two models."""
MEASUREMENTS = 8
"""Most measurements in a run of SFT, without that after the last step; RL has a setting."""


def watch(trainer: Any, run: Training, every: int | None = None) -> None:
    """Let the trainer log its drift on the held-out rows of `score:protected`, if there are any.

    every: steps between two measurements; None: at most MEASUREMENTS and the last step.
    """
    artifact, start = run.context.protected, run.start.folder
    # The file is empty if there are three protected rows or fewer, or if all held-out rows are too long.
    if artifact is None or start is None or not (held_out := artifact / "held_out.jsonl").stat().st_size:
        return
    rows = [run.renderer.row(row.example) for row in read_labels(held_out)]
    trainer.add_callback(ProtectedKl(trainer, start, rows, every))


class ProtectedKl(TrainerCallback):
    """Logs KL(start ‖ policy) on answers that training does not read.

    The start is the adapter from which the stage began: that of SFT in RL, so drift in SFT is not in it.

    It is the mean over the answers' tokens of the divergence between the two distributions over the whole
    vocabulary, after the same text: Σ_v p_v (log p_v − log q_v), with p of the start. Nothing is sampled.
    """

    def __init__(self, trainer: Any, start: Path, rows: list[Row], every: int | None) -> None:
        """start: the folder of that adapter."""
        self.trainer, self.start, self.rows, self.every = trainer, start, rows, every

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        every = self.every or max(1, math.ceil(state.max_steps / MEASUREMENTS))
        if state.global_step % every == 0 or state.global_step >= state.max_steps:
            self.trainer._metrics["train"][PROTECTED_KL].append(self.divergence())

    @torch.no_grad()
    def divergence(self) -> float:
        """Mean KL(start ‖ policy) per answer token, in nats."""
        model, initial, total, tokens = self.trainer.model, adapter.read(self.start), 0.0, 0
        with self.trainer.memory("while the drift was measured"), eval_mode(model):
            for row in self.rows:
                batch = losses.collate([row], 0, self.trainer.args.device)
                policy = _answer_logits(model, batch)
                with _weights(model, initial):
                    start = _answer_logits(model, batch)
                tokens += len(start)
                chunks = zip(start.split(TOKENS_AT_ONCE), policy.split(TOKENS_AT_ONCE), strict=True)
                total += sum(_divergence(*chunk) for chunk in chunks)
        return total / tokens


def _answer_logits(model: nn.Module, batch: losses.Batch) -> Tensor:
    """Logits from which the answer tokens of one row are predicted, (answer tokens, vocabulary)."""
    answered = batch.labels[0, 1:] != IGNORED  # a token is predicted from the one before it
    first = int(answered.nonzero()[0])  # logits further left, of the prompt, are not computed
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        logits_to_keep=batch.input_ids.shape[1] - first,
    ).logits
    return logits[0, :-1][answered[first:]]  # type: ignore[no-any-return]


def _divergence(start: Tensor, policy: Tensor) -> float:
    """Sum of KL(start ‖ policy) over tokens, of logits (tokens, vocabulary)."""
    # Terms of the sum over the vocabulary cancel: in 32 bits a model that has not moved would seem to drift.
    p, q = (logits.double().log_softmax(-1) for logits in (start, policy))
    return float((p.exp() * (p - q)).sum())


@contextmanager
def _weights(model: PeftModel, weights: dict[str, Tensor]) -> Iterator[None]:
    """Context in which the packed adapter has other values in its active elements."""
    layers = sparse_layers(model)
    policy = {name: layer.state_dict() for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.load_state_dict({"weight": weights[name]})
        yield
    finally:
        for name, layer in layers.items():
            layer.load_state_dict(policy[name])
