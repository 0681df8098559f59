"""Importance scores of single LoRA elements for one system, from per-example gradients.

A LoRA layer computes y_t = W x_t for each token t, with W (out, in). With δ_t = ∂loss/∂y_t, the gradient of
one example's loss with respect to W is g = Σ_t δ_t x_tᵀ over the tokens of the example. Hooks record x in the
forward and δ in the backward pass, so that one pass over a batch gives the gradients of all its examples. The
loss of a batch is the sum over examples of each example's mean answer-token loss: no term mixes two examples,
and each g is that of the example alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from stages.errors import UnusableResult, is_out_of_memory
from stages.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from stages.packing.batch import PackedBatch
    from stages.prompts.renderer import Row
    from stages.runtime.resources import BatchSize

scorers: Registry = Registry("scorer", file_setting="score.scorer_file")
"""Formulas score(φ, g, F): φ is an element, g the mean over examples of its gradient, F that of its square.

Trait `product`: the score is gradient times value, which is zero everywhere while B = 0 (the gradient of A is
zero, and so is the value of B).
"""


def formula_of(name: str, file: str | None) -> Callable[..., Tensor]:
    """The formula of that name; one of a person's file takes precedence, with checks of what it returns."""
    formula = scorers.pick(name, file)
    if name in scorers.in_file(file):
        hint = f"mend it in {file} and run the same command"
        return partial(_own_scores, formula, f"scorer {name}", hint)
    return formula


def _own_scores(formula: Callable[..., Any], title: str, hint: str, *tensors: Tensor) -> Tensor:
    """Scores by a person's formula; UnusableResult if it raises, or gives another thing than one for each."""
    import torch

    try:
        scores = formula(*tensors)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UnusableResult(f"{title} raised {type(error).__name__}: {error}", hint) from error
    shape = tensors[0].shape
    if not isinstance(scores, torch.Tensor) or scores.shape != shape:
        gave = tuple(getattr(scores, "shape", ())) or type(scores).__name__
        raise UnusableResult(f"{title} gave {gave} for the {tuple(shape)} elements of a weight", hint)
    return scores


@dataclass
class Moments:
    """Sums over examples: one tensor per LoRA weight, of the weight's shape and at least float32."""

    gradient: dict[str, Tensor]
    """Σ g"""
    square: dict[str, Tensor]
    """Σ g²"""
    examples: int
    loss: float
    """Sum of the examples' mean answer-token losses."""

    @classmethod
    def of_no_example(cls, weights: dict[str, nn.Module]) -> Moments:
        """The sums over no example, of LoRA layers by parameter name."""
        import torch

        tensors = {name: layer.weight for name, layer in weights.items()}
        wide = {name: torch.promote_types(x.dtype, torch.float32) for name, x in tensors.items()}
        gradient, square = (
            {name: torch.zeros_like(x, dtype=wide[name]) for name, x in tensors.items()} for _ in range(2)
        )
        return cls(gradient, square, 0, 0.0)

    def add(self, other: Moments) -> None:
        for own, others in ((self.gradient, other.gradient), (self.square, other.square)):
            for name, value in others.items():
                own[name] += value
        self.examples += other.examples
        self.loss += other.loss


@scorers.add("product")
def taylor2(value: Tensor, gradient: Tensor, fisher: Tensor) -> Tensor:
    """|g·φ − ½·F·φ²| with the mean gradient g and the diagonal Fisher F (arXiv 2507.20999, §3)."""
    return (gradient * value - 0.5 * fisher * value * value).abs()


@scorers.add("product")
def taylor1(value: Tensor, gradient: Tensor, fisher: Tensor) -> Tensor:
    """|g·φ|: the first-order term alone (Molchanov et al. 2019, arXiv 1906.10771)."""
    return (gradient * value).abs()


@scorers.add()
def fisher(value: Tensor, gradient: Tensor, fisher: Tensor) -> Tensor:
    """F, the mean of squared per-example gradients: the diagonal of the empirical Fisher information."""
    return fisher


@scorers.add()
def grad2(value: Tensor, gradient: Tensor, fisher: Tensor) -> Tensor:
    """g², the square of the mean gradient (SPT's sensitivity, arXiv 2303.08566)."""
    return gradient.square()


@scorers.add()
def magnitude(value: Tensor, gradient: Tensor, fisher: Tensor) -> Tensor:
    """|φ|: needs no gradients and is the same for both systems."""
    return value.abs()


@contextmanager
def _accumulate_gradients(
    model: PreTrainedModel, layers: dict[str, nn.Module], sums: Moments, packed: PackedBatch | None
) -> Iterator[None]:
    """Context in which a backward pass adds g and g² of every example and LoRA layer to `sums`.

    packed: the batch, if the examples are packed into one row; None if they are padded rows.
    """
    import torch

    pending = dict.fromkeys(layers, 0)  # forward passes of each layer whose backward pass is still to come

    def by_example(x: Tensor) -> Tensor:
        """(examples, longest, width): zero after the end of a packed example."""
        return x if packed is None else packed.suffixes.spread(x[0])

    def add_gradients(name: str, x: Tensor, delta: Tensor) -> None:  # (batch, tokens, in or out)
        # g = Σ_t δ_t x_tᵀ for each example b. Padding adds nothing: δ is zero where no loss depends on the
        # output.
        wide = torch.promote_types(torch.float32, x.dtype)
        # (examples, out, in)
        gradients = torch.einsum("bto,bti->boi", by_example(delta.to(wide)), by_example(x.detach().to(wide)))
        sums.gradient[name] += gradients.sum(0)
        sums.square[name] += gradients.square_().sum(0)
        pending[name] = 0

    def watch(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # (batch, tokens, in); it keeps alive the cast that `shared_cast` gives to the layers beside this one.
        x = inputs[0]
        pending[name] += 1
        # A second pass would have a g of its own, and (g₁ + g₂)² is not g₁² + g₂². Inputs without a batch
        # axis, as in experts that get single tokens, do not tell the examples apart.
        if x.dim() != 3 or pending[name] != 1:
            raise UnusableResult(
                f"{name} runs {pending[name]} times in a forward pass, on inputs of {x.dim()} dimensions",
                "shared modules and mixtures of experts cannot be scored element by element",
            )
        output.register_hook(partial(add_gradients, name, x))

    with ExitStack() as hooks:
        # No parameter requires a gradient, so the graph has to begin at the embedded input.
        embeddings = model.get_input_embeddings()
        hooks.enter_context(embeddings.register_forward_hook(lambda m, i, out: out.requires_grad_()))
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(partial(watch, name)))
        yield


def moments(
    model: PreTrainedModel,
    weights: dict[str, nn.Module],
    rows: list[Row],
    size: BatchSize,
    advance: Callable[[int], None],
    pad: int,
) -> Moments:
    """Compute Σ g and Σ g² over the examples, in batches as large as memory allows.

    weights: LoRA layers by parameter name. The model must be in eval mode (no dropout) and without gradient
    checkpointing, and none of its parameters may require a gradient: the graph starts at the embedded input
    instead, so autograd computes none of the weight gradients that the hooks compute per example.
    advance: called with the number of examples after each batch. pad: token that fills padded batches.
    UnusableResult if a loss is not finite.
    """
    sums = Moments.of_no_example(weights)
    while sums.examples < len(rows):
        batch = rows[sums.examples : sums.examples + size.now]
        if batch_sums := size.attempt(len(batch), _batch_moments, model, weights, batch, pad):
            sums.add(batch_sums)
            advance(len(batch))
    return sums


def _batch_moments(
    model: PreTrainedModel, weights: dict[str, nn.Module], rows: list[Row], pad: int
) -> Moments:
    """Compute the sums over one batch, see `moments`."""
    import torch

    from stages.packing import losses

    device = next(model.parameters()).device
    sums = Moments.of_no_example(weights)
    packed = losses.pack_rows(model, rows, device)
    with _accumulate_gradients(model, weights, sums, packed):
        if packed is None:
            example_losses = losses.answer_losses(model, rows, pad, device)
        else:
            example_losses = losses.packed_answer_losses(model, packed)
        finite = torch.isfinite(example_losses)  # (examples,)
        if not bool(finite.all()):
            bad = [row.id for row, ok in zip(rows, finite.tolist(), strict=True) if not ok]
            raise UnusableResult(f"loss is not finite for {', '.join(bad)}")
        # Summed, not averaged: a mean would scale each example's gradient by the size of its batch.
        example_losses.sum().backward()
    sums.examples = len(rows)
    sums.loss = float(example_losses.detach().sum())
    return sums
