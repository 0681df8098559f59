"""Chosen elements of a plain PEFT model in other people's trainers: `pack`, train, `unpack`."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from stages.errors import ArtifactError
from stages.lora.adapter.adapter import lora_layers
from stages.lora.adapter.elements import pack, unpack
from stages.lora.adapter.sparse_linear import SparseLinear

PAIRS = [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": " no"} for i in range(8)]
SHARED = {"max_steps": 2, "learning_rate": 0.1, "weight_decay": 0.1, "report_to": "none", "use_cpu": True}
SHARED |= {"per_device_train_batch_size": 4, "save_strategy": "no", "logging_steps": 1, "warmup_steps": 0}


def _model(tiny, kind="CAUSAL_LM"):
    """A plain PEFT model whose B is not zero, so that A has a gradient, too."""
    auto = AutoModelForSequenceClassification if kind == "SEQ_CLS" else AutoModelForCausalLM
    options = {"num_labels": 1} if kind == "SEQ_CLS" else {}
    base = auto.from_pretrained(str(tiny), dtype=torch.float32, **options)
    base.config.pad_token_id = AutoTokenizer.from_pretrained(str(tiny)).pad_token_id
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type=kind)
    return get_peft_model(base, config)


def _masks(model):
    generator = torch.Generator().manual_seed(1)
    layers = lora_layers(model)
    return {name: torch.rand(layer.weight.shape, generator=generator) < 0.3 for name, layer in layers.items()}


def _sft(model, tokenizer, out):
    rows = Dataset.from_list([{"text": pair["prompt"] + pair["chosen"]} for pair in PAIRS])
    return SFTTrainer(model, SFTConfig(out, **SHARED), train_dataset=rows, processing_class=tokenizer)


def _dpo(model, tokenizer, out):
    rows = Dataset.from_list(PAIRS)
    return DPOTrainer(model, args=DPOConfig(out, **SHARED), train_dataset=rows, processing_class=tokenizer)


def _grpo(model, tokenizer, out):
    rows = Dataset.from_list([{"prompt": pair["prompt"]} for pair in PAIRS])
    args = GRPOConfig(out, **SHARED, num_generations=4, max_completion_length=6)
    return GRPOTrainer(
        model, lambda completions, **_: [float(i) for i in range(len(completions))], args=args,
        train_dataset=rows, processing_class=tokenizer,
    )  # fmt: skip


def _reward(model, tokenizer, out):
    rows = Dataset.from_list(PAIRS)
    return RewardTrainer(
        model, args=RewardConfig(out, **SHARED), train_dataset=rows, processing_class=tokenizer
    )


class Loop:
    """A plain loop with AdamW."""

    def __init__(self, model, tokenizer, out):
        self.model, self.tokenizer = model, tokenizer

    def train(self):
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1
        )
        ids = self.tokenizer("1 + 1 = 2", return_tensors="pt")["input_ids"]
        for _ in range(2):
            self.model(input_ids=ids, labels=ids).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


@pytest.mark.parametrize(
    "build", [_sft, _dpo, _grpo, _reward, Loop], ids=lambda build: build.__name__.strip("_")
)
def test_only_chosen_elements_move_in_any_trainer(tiny, tmp_path, build):
    kind = "SEQ_CLS" if build is _reward else "CAUSAL_LM"
    model, tokenizer = _model(tiny, kind), AutoTokenizer.from_pretrained(str(tiny))
    masks = _masks(model)
    start = {name: layer.weight.detach().clone() for name, layer in lora_layers(model).items()}
    trainer = build(model, tokenizer, str(tmp_path / "out"))
    pack(trainer.model, masks)
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    held = {
        id(p): sum(v.numel() for v in state.values() if torch.is_tensor(v) and v.ndim)
        for p, state in optimizer.state.items()
    }
    packed = [layer for layer in lora_layers(trainer.model).values() if isinstance(layer, SparseLinear)]
    assert len(packed) == len(masks)
    assert sum(held[id(layer.values)] for layer in packed) == 2 * sum(int(m.sum()) for m in masks.values())
    unpack(trainer.model)
    for name, layer in lora_layers(trainer.model).items():
        assert type(layer) is torch.nn.Linear and layer.weight.requires_grad
        assert torch.equal(layer.weight[~masks[name]], start[name][~masks[name]])
        assert not torch.equal(layer.weight[masks[name]], start[name][masks[name]])
    trainer.model.save_pretrained(tmp_path / "adapter")
    auto = AutoModelForSequenceClassification if build is _reward else AutoModelForCausalLM
    base = auto.from_pretrained(
        str(tiny), dtype=torch.float32, **({"num_labels": 1} if build is _reward else {})
    )
    loaded = lora_layers(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    assert all(torch.equal(loaded[n].weight, layer.weight) for n, layer in lora_layers(trainer.model).items())


def test_masks_of_other_weights_are_refused(tiny):
    model = _model(tiny)
    masks = _masks(model)
    masks.pop(next(iter(masks)))
    with pytest.raises(ArtifactError, match="masks do not fit the adapter: .* is on one side only"):
        pack(model, masks)
