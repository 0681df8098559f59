"""What lorapar trains is what TRL and PEFT alone would train, and the paper's settings run.

Every default of TRL's configs is set by lorapar or was judged harmless, so none moves without a word:
`trl_defaults.json` has the harmless ones by the reason.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import trl
from conftest import ROOT, labels_of, make_step, paths
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from results import artifacts, history
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.config import RlSection, SftSection
from stages.config.rl import RolloutsSection
from stages.lora.adapter import adapter
from stages.lora.grpo import building, vllm_rollouts
from stages.lora.training import loop
from stages.pipeline.resolve import load
from stages.prompts.renderer import Renderer
from stages.records import examples_of_system
from stages.sft import run as sft
from stages.store.checkpoints import Checkpoints


def test_strategy_all_is_a_plain_sft_trainer(begun, tmp_path):
    """Written with the libraries alone, from the rows as the stage renders them, with the same seed."""
    # No warm-up: there lorapar's rates are not the library's, as test_training says.
    settings = ["sft.max_steps=4", "sft.num_train_epochs=9", "sft.system2_share=0", "sft.warmup_ratio=0"]
    config = begun("partition.strategy=all", *settings, "sft.lora_dropout=0")
    made = artifacts(config, "score", "partition", "sft")
    start, ours = (adapter.read(made[stage].adapter) for stage in ("score", "sft"))

    tokenizer = AutoTokenizer.from_pretrained(config.model.name)
    examples = examples_of_system(labels_of(config), 1)
    rows = [Renderer(tokenizer, config.prompt).row(example) for example in examples]
    options = {"r": 4, "lora_alpha": 32, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
    lora = LoraConfig(**options, target_modules=config.lora.target_modules)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float32), lora)
    set_peft_model_state_dict(model, start)
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), report_to="none", save_strategy="no", use_cpu=not torch.cuda.is_available(),
        max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_length=None,
        learning_rate=0.01, lr_scheduler_type="cosine", warmup_steps=0, weight_decay=0.1, max_grad_norm=1.0,
        seed=0, data_seed=0, bf16=False, gradient_checkpointing=False, loss_type="nll",
    )  # fmt: skip
    data = Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
    trl.SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer).train()
    plain = {name: weight.cpu() for name, weight in get_peft_model_state_dict(model).items()}  # as in files
    assert plain.keys() == ours.keys()
    for name, weight in plain.items():
        assert (weight - start[name]).abs().max() > 1e-3, name
        apart = (ours[name] - weight).abs()  # Adam enlarges rounding where a gradient is near zero
        assert apart.median() < 1e-6 and apart.max() < 2e-4, name


@pytest.mark.slow
def test_the_paper_s_settings_train_a_tiny_model(tiny, demo_data, tmp_path):
    """One step of each stage.

    Every setting is the paper's but the model, the data, the votes and what fits a byte tokenizer.
    """
    home = [path for path in paths(tiny, demo_data, tmp_path) if not path.startswith("eval.")]
    smaller = [
        "model.dtype=float32", "data.subset=null", "data.format=auto", "data.limit=120",
        "data.max_length=1024", "classify.strategy=random", "score.examples=8", "sft.max_steps=2",
        "rl.max_steps=1", "rl.prompts_per_step=4", "rl.max_prompt_length=1024", "rl.max_completion_length=8",
    ]  # fmt: skip
    config = load(ROOT / "configs/paper/gsm8k-llama2-7b.yaml", [*home, *smaller])
    for stage in ("classify:train", "score", "partition", "sft", "rl"):
        artifact = make_step(config, stage)
    (step,) = history(artifact)
    assert {f"rewards/{reward}/mean" for reward in config.rl.rewards} <= set(step)
    assert artifact.manifest["summary"]["frozen_drift"] == 0


def given() -> dict[str, set[str]]:
    """The fields that lorapar sets, by config; those of vLLM count where only a vLLM engine sets them."""
    fields: dict[str, set[str]] = {}

    def keep(name):
        return lambda **arguments: fields.setdefault(name, set()).update(arguments)

    checkpoints = Checkpoints(Path("run/stage/checkpoints/key"), "")
    colocated = RlSection(rollouts=RolloutsSection(engine="vllm_colocate", gpu_memory_utilization=0.5))
    kept = patch.multiple(trl, **{name: keep(name) for name in ("GRPOConfig", "SFTConfig")})
    with kept, patch.object(loop, "check_training"):  # without vLLM, too
        sft._arguments(SftSection(), 1, 0, checkpoints)
        for section in (RlSection(), colocated):
            building._arguments(section, 1, 0, checkpoints, vllm_rollouts.arguments(section, None, []))
    return fields


def default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def test_no_default_has_moved_and_none_is_new():
    """A field that was judged may be missing: several releases of transformers are allowed."""
    reviewed = json.loads(Path(__file__).with_name("trl_defaults.json").read_text(encoding="utf-8"))
    known = {name: value for fields in reviewed.values() for name, value in fields.items()}
    moved = {
        f"{config}.{field.name}": (known.get(field.name, "new"), default(field))
        for config, names in given().items()
        for field in dataclasses.fields(getattr(trl, config))
        if field.init and field.name not in names and known.get(field.name, "new") != default(field)
    }
    assert not moved, f"pin these, or judge them harmless: {moved}"
