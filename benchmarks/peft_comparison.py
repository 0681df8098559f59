"""Chosen elements in PEFT's method comparison: MetaMathQA, then GSM8K, with Llama-3.2-3B on a GPU.

    cd PEFT/method_comparison/MetaMathQA
    python LORAPAR/benchmarks/peft_comparison.py experiments/lora/llama-3.2-3B-rank32-chosen
        [--share 0.4 | --run RUN] [--rate 1e-4]

It writes the two files of the experiment, if they are not there: LoRA of rank 32 as in the comparison's own,
and the learning rate. Then it runs the comparison's `run.py`, which trains, evaluates and logs as ever. But
only a share of the adapter's elements trains: one drawn at random, or what SFT trains in a lorapar run of the
same base, rank and modules, from that run's initial adapter. What is saved is plain LoRA.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from measure import random_masks
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file

from stages.lora import densify, lora_layers, read_masks, sparsify

LORA = {"r": 32, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def write_experiment(folder: Path, rate: float) -> None:
    if folder.exists():
        return
    LoraConfig(**LORA).save_pretrained(str(folder))
    settings = {"optimizer_kwargs": {"lr": rate, "weight_decay": 0.1}}
    (folder / "training_params.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def choose_elements(comparison: Any, share: float, run: Path | None) -> None:
    """Let the comparison's module train chosen elements, and save all of them as plain LoRA."""
    get_model, get_file_size = comparison.get_model, comparison.get_file_size

    def sparse_model(**settings: Any) -> Any:
        model = get_model(**settings)
        if run is None:
            masks = random_masks(lora_layers(model), share)
        else:
            set_peft_model_state_dict(model, load_file(run / "score/latest/init/adapter_model.safetensors"))
            masks = read_masks(run / "partition/latest-sft", "sft")
        sparsify(model, masks)
        return model

    def size_of_plain_lora(model: Any, **settings: Any) -> Any:
        densify(model)
        return get_file_size(model, **settings)

    comparison.get_model, comparison.get_file_size = sparse_model, size_of_plain_lora


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--share", type=float, default=0.4)
    parser.add_argument("--run", type=Path, help="folder of a lorapar run")
    parser.add_argument("--rate", type=float, default=1e-4)
    given = parser.parse_args()
    write_experiment(given.experiment, given.rate)
    sys.path.insert(0, ".")
    comparison = importlib.import_module("run")
    choose_elements(comparison, given.share, given.run)
    # `run.py` defines this one where it is the main script.
    comparison.print_verbose = lambda *texts, **_: print(*texts, file=sys.stderr)  # type: ignore[attr-defined]
    name = comparison.validate_experiment_path(str(given.experiment))
    comparison.main(path_experiment=str(given.experiment), experiment_name=name, clean=False)
