"""One line for each option that other libraries have: is it trained, saved, loaded by plain PEFT, and served?

Makes SFT and RL of the smoke config with each option, exports RL's adapter, and has `lorapar export --check`
compare answers of each engine, a real vLLM server among them, with those of plain PEFT. Prints Markdown.

python benchmarks/options.py [--only NAME …]
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

from measure import lorapar

from stages.pipeline.resolve import load, resolved
from stages.pipeline.steps import plan_steps
from stages.store.artifacts import Store

CONFIG = Path("configs/smoke.yaml")
OPTIONS = {
    "lora.target_modules all-linear": ["lora.target_modules=all-linear"],
    "lora.init pissa_niter_16": ["lora.init=pissa_niter_16"],
    "lora.init olora": ["lora.init=olora"],
    "lora.use_rslora": ["lora.use_rslora=true"],
    "strategy topk, scorer grad2 (SPT)": ["partition.strategy=topk", "score.scorer=grad2"],
    "strategy topk, scorer moved": ["partition.strategy=topk", "score.scorer=moved"],
    "strategy random_half (LoRA-SP)": ["partition.strategy=random_half"],
    "rl.rescore": ["rl.rescore=taylor2"],
    "rl.importance_sampling_level sequence (GSPO)": [
        "rl.importance_sampling_level=sequence",
        "rl.loss_type=grpo",
    ],
    "rl.epsilon_high (clip-higher)": ["rl.epsilon_high=0.28"],
    "rl.loss_type cispo": ["rl.loss_type=cispo", "rl.epsilon_high=5"],
    "sft.loss_type dft": ["sft.loss_type=dft"],
    "sft.system1_targets answer": ["sft.system1_targets=answer"],
    **{
        f"baseline {name}": [f"baseline.method={name}"]
        for name in ("dora", "miss", "randlora", "shira", "vera")
    },
}
ALWAYS = ["rl.max_steps=2", "eval.targets=[rl]"]


def said_by(*arguments: str, settings: list[str]) -> list[str]:
    """Lines that a command says; those of an error, too."""
    command = lorapar(*arguments, settings=settings)
    return subprocess.run(command, capture_output=True, text=True).stderr.splitlines()


def line(settings: list[str], folder: Path) -> list[str]:
    """Cells: how many elements moved, and what the check of the export says of each engine."""
    settings = [*ALWAYS, *settings, f"runs_dir={folder / 'runs'}"]
    said = said_by("run", str(CONFIG), "--to", "rl", settings=settings)
    config = resolved(load(CONFIG, settings))
    step = plan_steps(config)["rl"]
    manifest = Store(config.root).folder("rl", step.key) / "manifest.json"
    if not manifest.exists():
        return [next((text for text in said if text.startswith("error")), "failed"), "", ""]
    summary = json.loads(manifest.read_bytes())["summary"]
    trained = f"{summary['moved']} of {summary['active']}"
    said = said_by("export", str(CONFIG), str(folder / "out"), "--check", "4", settings=settings)
    saved = "yes" if (folder / "out/adapter_model.safetensors").exists() else "no"
    checked = [
        f"{engine} {share}" for engine, share in re.findall(r"^  (\w+): (\S+) of", "\n".join(said), re.M)
    ]
    refused = [text for text in said if text.startswith("error")]
    return [trained, saved, ", ".join(checked + refused)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", action="append", choices=OPTIONS, metavar="NAME")
    wanted = parser.parse_args().only or list(OPTIONS)
    print(
        "| option | elements moved by RL | saved | tokens served that plain PEFT would choose |",
        "| --- | --- | --- | --- |",
        sep="\n",
    )
    for name in wanted:
        with tempfile.TemporaryDirectory() as folder:
            print("", name, *line(OPTIONS[name], Path(folder)), "", sep=" | ", flush=True)


if __name__ == "__main__":
    main()
