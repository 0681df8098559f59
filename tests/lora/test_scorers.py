"""Importance, by batched gradients, against plain autograd; and its formulas."""

import pytest
import torch
from conftest import make_step
from guide import blocks

from stages.config import LoraSection, ModelSection
from stages.errors import ConfigError, UnusableResult
from stages.lora.adapter import adapter
from stages.lora.importance.masks import read_importance
from stages.lora.importance.scorers import Moments, moments, scorers
from stages.models.base import load_base
from stages.pipeline.resolve import resolved
from stages.pipeline.steps import plan_steps
from stages.prompts.renderer import IGNORED, Row
from stages.runtime.resources import BatchSize


def rows(count: int = 7) -> list[Row]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for i in range(count):
        prompt, answer = 3 + i % 4, 1 + (i * 5) % 7
        ids = torch.randint(3, 250, (prompt + answer,), generator=generator).tolist()
        made.append(Row(str(i), ids, [IGNORED] * prompt + ids[prompt:]))
    return made


def frozen(tiny, dtype: torch.dtype = torch.float32, init: str = "normal"):
    """As it is scored."""
    base = load_base(ModelSection(name=str(tiny))).to(dtype)
    return adapter.initial(base, LoraSection(r=3, init=init), 0).to(dtype).eval().requires_grad_(False)


def scored(model, examples: list[Row], size: int, counted: list[int] | None = None) -> Moments:
    done, batch = [] if counted is None else counted, BatchSize("score.batch_size", size, "shorten the rows")
    return moments(model, adapter.lora_layers(model), examples, batch, done.append, 0)


def one_by_one(model, examples) -> tuple[dict, dict]:
    """Σ g and Σ g² by autograd, an example at a time, without padding: the definition."""
    weights = {n: layer.weight.requires_grad_(True) for n, layer in adapter.lora_layers(model).items()}
    slopes = []
    for row in examples:
        logits, targets = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1], row.labels[1:]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(targets), ignore_index=IGNORED)
        slopes.append(torch.autograd.grad(loss, list(weights.values())))
    by_name = dict(zip(weights, map(torch.stack, zip(*slopes, strict=True)), strict=True))
    return {n: g.sum(0) for n, g in by_name.items()}, {n: g.square().sum(0) for n, g in by_name.items()}


@pytest.mark.parametrize(
    ("dtype", "bound", "init", "fits"),
    [
        (torch.float64, 1e-5, "normal", True),
        (torch.float64, 1e-5, "normal", False),
        (torch.float32, 1e-3, "pissa", True),
    ],
)
def test_batched_moments_equal_single_ones(tiny, monkeypatch, dtype, bound, init, fits):
    if not fits:
        monkeypatch.setattr("stages.packing.losses.supports_packing", lambda *_: False)
    model = frozen(tiny, dtype, init)
    wanted = one_by_one(model, rows())
    model.requires_grad_(False)
    counted: list[int] = []
    sums = scored(model, rows(), 4, counted)
    assert counted == [4, 3] and sums.examples == 7
    for got, want in ((sums.gradient, wanted[0]), (sums.square, wanted[1])):
        for name in want:
            assert torch.linalg.norm(got[name] - want[name]) <= bound * torch.linalg.norm(want[name]), name


def test_sums_over_a_model_of_16_bits_have_32(tiny):
    # Of one example: the sum over several would not be a number of 16 bits anyway.
    sums = scored(frozen(tiny, torch.bfloat16), rows(1), 4)
    for value in (*sums.gradient.values(), *sums.square.values()):
        assert value.dtype == torch.float32 and not torch.equal(value.bfloat16().float(), value)


def test_a_batch_without_memory_is_halved_and_no_sum_has_it_twice(tiny, monkeypatch, caplog):
    """Layers above the first have added their gradients when memory runs out."""
    monkeypatch.setattr("stages.packing.losses.supports_packing", lambda *_: False)
    model = frozen(tiny, torch.float64)
    wanted = scored(model, rows(), 2)

    def fail(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def watch(module, inputs, output):
        if len(inputs[0]) > 2:
            output.register_hook(fail)

    model.base_model.model.model.layers[0].register_forward_hook(watch)
    counted: list[int] = []
    sums = scored(model, rows(), 16, counted)
    assert counted == [1] * 7 and len(caplog.messages) == 2
    for name, value in wanted.square.items():
        torch.testing.assert_close(sums.square[name], value)
        torch.testing.assert_close(sums.gradient[name], wanted.gradient[name])


def test_formulas():
    inputs = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0]), torch.tensor([1.0, 4.0])
    by_hand = {
        "taylor2": [1, 5], "taylor1": [1, 3], "fisher": [1, 4], "grad2": [0.25, 9], "magnitude": [2, 1],
    }  # fmt: skip
    assert {name: scorers.pick(name)(*inputs).tolist() for name in by_hand} == by_hand


def test_a_loss_that_is_not_finite_and_a_module_that_runs_twice_are_refused(tiny):
    model = frozen(tiny)
    next(iter(adapter.lora_layers(model).values())).weight[0, 0] = float("inf")
    with pytest.raises(UnusableResult, match="loss is not finite for 0, 1"):
        scored(model, rows()[:2], 4)
    model = frozen(tiny)
    layers = model.base_model.model.model.layers
    layers[1] = layers[0]
    with pytest.raises(UnusableResult, match="runs 2 times in a forward pass"):
        scored(model, rows()[:2], 4)


def test_a_formula_of_one_s_own_is_that_of_the_guide(begun, tmp_path):
    """It is the paper's there, and what it changes has another key."""
    [text] = [block.text for block in blocks("python") if block.title == "scorers.py"]
    file = tmp_path / "scorers.py"
    bad = "\ndef narrow(value, *_):\n    return value[:1]\ndef wrong(*_):\n    return x\n"
    file.write_text(text + bad, encoding="utf-8")
    given = ("score.examples=6", f"score.scorer_file={file}")
    wanted, mine = (make_step(begun(*given, f"score.scorer={name}"), "score") for name in ("taylor2", "mine"))
    one, other = (read_importance(made.path / "importance.safetensors") for made in (wanted, mine))
    assert wanted.path != mine.path
    assert all(torch.equal(value, other[1][name]) for name, value in one[1].items())
    for name, said in (
        ("narrow", r"gave \(1, 64\) for the \(4, 64\) elements"),
        ("wrong", "raised NameError: .*x"),
    ):
        with pytest.raises(UnusableResult, match=f"scorer {name} {said}"):
            make_step(begun(*given, f"score.scorer={name}"), "score")
    with pytest.raises(ConfigError, match="unknown scorer 'wide'; .*, taylor2, mine, narrow, wrong"):
        begun(*given, "score.scorer=wide")
    keys = {plan_steps(resolved(begun(*given, "score.scorer=mine")))["score"].key}
    file.write_text(text.replace("0.5", "0.25"), encoding="utf-8")
    keys.add(plan_steps(resolved(begun(*given, "score.scorer=mine")))["score"].key)
    assert len(keys) == 2
