"""The examples of `docs/elements.md`, run as they stand: what they train, leave and save; and one layer."""

import copy
from functools import partial

import pytest
import torch
import trl
from datasets import Dataset
from guide import blocks
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from stages.errors import ArtifactError
from stages.lora.adapter.adapter import lora_layers
from stages.lora.adapter.elements import SparseLinear, frozen_weights
from stages.runtime import libraries

_SCORER, MODEL, *TRAINERS, TRAIN, LOOP = [b for b in blocks("python") if b.page == "elements.md"]
SHORT = {"max_steps": 2, "learning_rate": 0.1, "weight_decay": 0.1, "report_to": "none"}
SHORT |= {"per_device_train_batch_size": 4, "save_strategy": "no", "logging_steps": 1, "warmup_steps": 0}
"""Options that the page leaves to TRL."""
SHORT_GROUPS = {"num_generations": 4, "max_completion_length": 6}
PAIRS = [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": " no"} for i in range(8)]
DATA = {
    "SFTTrainer": [{"text": pair["prompt"] + pair["chosen"]} for pair in PAIRS],
    "DPOTrainer": PAIRS,
    "GRPOTrainer": [{"prompt": pair["prompt"]} for pair in PAIRS],
    "RewardTrainer": PAIRS,
}


@pytest.fixture
def page(tiny, tmp_path, monkeypatch):
    """The names that the page's first block defines, for the tiny model."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"path": str(tiny)}
    with libraries.hide_packages(*libraries.UNUSED, "vllm"):  # TRL and PEFT would import them, for seconds
        exec(MODEL.text, names)
        yield names


def _train(page, example, monkeypatch):
    """Run the rest of an example in the names of `page`."""
    if example is LOOP:
        batch = page["tokenizer"]("1 + 1 = 2", return_tensors="pt")
        page["data"] = [{**batch, "labels": batch["input_ids"]}] * 2
        exec(LOOP.text, page)
        return
    options = SHORT | (SHORT_GROUPS if example.title == "GRPOTrainer" else {})
    config = example.title.replace("Trainer", "Config")
    monkeypatch.setattr(trl, config, partial(getattr(trl, config), **options))
    page["data"] = Dataset.from_list(DATA[example.title])
    exec(example.text + TRAIN.text, page)


def _weights(model):
    return {name: layer.weight.detach().clone() for name, layer in lora_layers(model).items()}


def _moment_bytes(model, optimizer):
    """Bytes of the optimizer's moments by the name of their parameter; all of them are the model's."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    states = optimizer.state.items()
    return {names[parameter]: sum(v.nbytes for v in state.values() if v.ndim) for parameter, state in states}


@pytest.mark.parametrize("example", [*TRAINERS, LOOP], ids=lambda block: block.title)
def test_example_trains_chosen_elements_alone(page, tiny, monkeypatch, example):
    start, trained, moments = {}, {}, {}
    sparsify, densify = page["sparsify"], page["densify"]

    def recording_sparsify(model, masks):
        start.update(_weights(model))
        sparsify(model, masks)

    def recording_densify(model):
        trained.update(_weights(model))
        optimizer = page["optimizer"] if example is LOOP else page["trainer"].optimizer
        moments.update(_moment_bytes(model, getattr(optimizer, "optimizer", optimizer)))
        densify(model)

    page |= {"sparsify": recording_sparsify, "densify": recording_densify}
    _train(page, example, monkeypatch)

    masks, model = page["masks"], page["model"]
    for name, mask in masks.items():
        assert torch.equal(trained[name][~mask], start[name][~mask]), name
        assert not torch.equal(trained[name][mask], start[name][mask]), name
    # Adam has two moments of float32; a reward model's head is saved whole and trains outside of the adapter.
    adapter_moments = {name: size for name, size in moments.items() if "modules_to_save" not in name}
    assert adapter_moments == {
        name.replace(".weight", ".default.values"): 2 * 4 * int(mask.sum()) for name, mask in masks.items()
    }
    base = type(model.get_base_model()).from_pretrained(str(tiny), num_labels=1)
    saved = lora_layers(PeftModel.from_pretrained(base, "adapter"))
    for name, layer in lora_layers(model).items():
        assert type(layer) is nn.Linear and layer.weight.requires_grad
        assert torch.equal(layer.weight, trained[name]), name
        assert torch.equal(saved[name].weight, trained[name]), name
    assert trained.keys() == masks.keys() == saved.keys() == lora_layers(model).keys()


def test_masks_of_other_weights_are_refused(page):
    (name, mask), model = page["masks"].popitem(), page["model"]
    with pytest.raises(ArtifactError, match="masks do not fit the adapter: .* is on one side only"):
        page["sparsify"](model, page["masks"])
    page["masks"][name] = mask.to(torch.uint8)  # as a run's regions are
    with pytest.raises(ArtifactError, match=r"has torch.uint8 in place of bool"):
        page["sparsify"](model, page["masks"])
    # Of half the rank, as a compensated run's are: of an adapter of this very rank they are another run's.
    sides = {n: (w[:4] if "lora_A" in n else w[:, :4]) for n, w in _weights(model).items()}
    halves = {n: torch.ones_like(side, dtype=torch.bool) for n, side in sides.items()}
    shapes = r"masks do not fit the adapter: .* has a mask of shape \(4, 64\) and a weight of \(8, 64\)"
    with pytest.raises(ArtifactError, match=shapes) as caught:
        page["sparsify"](model, halves)
    assert "compensated=True" in caught.value.hint
    assert all(type(layer) is nn.Linear for layer in lora_layers(model).values())
    page["sparsify"](model, halves, compensated=True)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == sum(half.numel() for half in halves.values())


def test_an_optimizer_made_before_trains_the_chosen_elements_at_its_rates(page):
    """PEFT's LoRA+ tells A from B by their shape, which is that of a vector afterwards."""
    model, masks = page["model"], page["masks"]
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.weight)  # with B = 0 no element of A has a gradient
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    page["sparsify"](model, masks)
    start, ids = _weights(model), torch.arange(3, 30)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    for name, weight in _weights(model).items():
        moved = (weight - start[name]).abs()
        rate = 1e-3 if "lora_A" in name else 16e-3
        assert float(moved[masks[name]].median()) == pytest.approx(rate, rel=1e-2), name
        assert not moved[~masks[name]].any(), name


def test_what_no_mask_could_freeze_is_refused_before_anything_changes(page, tiny):
    def refused(model, said):
        masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in _weights(model).items()}
        with pytest.raises(ArtifactError, match=said):
            page["sparsify"](model, masks)
        assert all(type(layer) is nn.Linear for layer in lora_layers(model).values())

    model = page["model"]
    for options, untouched in (
        ({"target_modules": ["q_proj"], "use_dora": True}, "lora_magnitude_vector"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding_A"),
    ):
        base = type(model.get_base_model()).from_pretrained(str(tiny))
        adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options))
        refused(adapted, f"{untouched}.* trains, and no mask is for it")
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    refused(model, "lora_A.other.weight trains, and no mask is for it")
    model.set_adapter("default")
    first, second, *_ = (layer for name, layer in lora_layers(model).items() if "q_proj.lora_A" in name)
    second.weight = first.weight
    refused(model, "two layers share LoRA weights")


def layer() -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    linear = nn.Linear(12, 7, bias=False)
    return linear, torch.rand(7, 12) < 0.4


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_those_of_the_plain_layer(autocast):
    linear, mask = layer()
    packed, x = SparseLinear(copy.deepcopy(linear), mask), torch.randn(5, 12)
    with torch.autocast("cpu", torch.bfloat16, autocast):
        linear(x).square().sum().backward()
        packed(x).square().sum().backward()
    assert torch.equal(packed.values.grad, linear.weight.grad[mask])


def test_state_dict_is_dense_under_the_plain_name_and_loads_back():
    linear, mask = layer()
    packed = SparseLinear(linear, mask)
    state = packed.state_dict()
    assert list(state) == ["weight"] and torch.equal(state["weight"], linear.weight)
    state["weight"][mask] += 1
    packed.load_state_dict(state)
    assert torch.equal(packed.weight[mask], linear.weight[mask] + 1)
    state["weight"][~mask] += 1
    with pytest.raises(RuntimeError, match="differs in frozen elements"):
        packed.load_state_dict(state)
    frozen = SparseLinear(linear, torch.zeros_like(mask))
    assert list(frozen.parameters()) == [] and list(frozen.state_dict()) == ["weight"]
    assert torch.equal(frozen.weight, linear.weight)


def test_fixed_weights_are_made_once_and_train_again_afterwards():
    linear, mask = layer()
    packed = SparseLinear(linear, mask)
    with torch.no_grad():
        packed.values += 1
    with frozen_weights(nn.Sequential(packed)):
        assert torch.equal(packed.weight[mask], linear.weight[mask] + 1)
        assert packed.weight is packed.weight
    with torch.no_grad():
        packed.values -= 0.5
    packed(torch.randn(5, 12)).sum().backward()
    assert packed.values.grad.any() and torch.equal(packed.weight[mask], packed.values)
