"""Chosen elements in PEFT's method comparison, whose `run.py` a script of the same form stands in for."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_steps
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stages.lora import lora_layers, read_masks

RUN = """
import torch
from peft import PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM

def validate_experiment_path(path):
    assert path.split("/")[0] == "experiments"
    return "/".join(path.split("/")[1:])

def get_model(*, model_id, peft_config, autocast_adapter_dtype=True):
    torch.manual_seed(0)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(model_id), peft_config)

def train(*, model, max_steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    print_verbose(model.get_nb_trainable_parameters()[0])
    ids = torch.arange(3, 40).view(1, -1)
    for _ in range(max_steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    model.generate(input_ids=ids, max_new_tokens=2)

def get_file_size(model, *, peft_config, clean, print_fn):
    model.save_pretrained("saved")

def main(*, path_experiment, experiment_name, clean):
    peft_config = PeftConfig.from_pretrained(path_experiment)
    model = get_model(model_id="MODEL", peft_config=peft_config)
    train(model=model, max_steps=3)
    get_file_size(model, peft_config=peft_config, clean=clean, print_fn=print_verbose)
"""


@pytest.mark.slow
@pytest.mark.parametrize("by_run", [False, True], ids=["random", "run"])
def test_only_chosen_elements_move_and_what_is_saved_is_plain_lora(begun, tiny, tmp_path, by_run):
    (tmp_path / "run.py").write_text(RUN.replace("MODEL", str(tiny)), encoding="utf-8")
    flags = ["--share", "0.3"]
    if by_run:
        config = begun("lora.r=32", "lora.lora_alpha=64", "lora.target_modules=[q_proj,v_proj]")
        make_steps(config, "score", "partition:sft")
        flags = ["--run", str(config.root)]
    experiment = "experiments/lora/chosen"
    command = [sys.executable, str(ROOT / "benchmarks/peft_comparison.py"), experiment, *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {file.name for file in (tmp_path / experiment).iterdir()} >= {
        "adapter_config.json",
        "training_params.json",
    }
    base = AutoModelForCausalLM.from_pretrained(str(tiny))
    layers = lora_layers(PeftModel.from_pretrained(base, str(tmp_path / "saved")))
    active = int(done.stderr.split()[-1])
    if by_run:
        masks = read_masks(config.root / "partition/latest-sft", "sft")
        start = load_file(config.root / "score/latest/init/adapter_model.safetensors")
        assert active == sum(int(mask.sum()) for mask in masks.values())
        for name, layer in layers.items():
            moved = layer.weight != start[name]
            assert not (moved & ~masks[name]).any()
    else:
        assert 0.2 < active / sum(layer.weight.numel() for layer in layers.values()) < 0.4
        b = torch.cat([layer.weight.flatten() for name, layer in layers.items() if "lora_B" in name])
        assert 0.2 < (b != 0).float().mean() < 0.4
