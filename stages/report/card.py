"""Model cards of exported adapters and models: what they are, how well they answer, how they are used."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from stages import escaping
from stages.config import MODES, SYSTEMS, Config
from stages.engines.vllm import context_length, lora_flags
from stages.errors import ConfigError
from stages.evaluation.statistics import Interval
from stages.prompts.renderer import plain
from stages.records import read_json
from stages.report.page import Grid
from stages.store.artifacts import Artifact
from stages.sweep.values import Value

Form = Literal["adapter", "merged"]
LEARNED = {
    "sft": "System 1, to answer at once: SFT",
    "rl": "System 2, to work it out: GRPO",
}
"""Trained target → what its last stage taught, and how."""
QUESTION = "Tom has 3 boxes of 4 pens. How many pens does Tom have?"
NF4 = (
    'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, '
    'bnb_4bit_compute_dtype="{dtype}")'
)
BASE_BESIDE = """Do not ask that server for the base model while an adapter answers: vLLM 0.31 then gives it
the adapter, too (its pull request 48421)."""


def card(
    config: Config,
    trained: dict[str, Artifact],
    form: Form,
    folder: Path,
    evaluated: Sequence[Artifact] = (),
) -> str:
    """Compose a model card from the manifests of adapters and the metrics of their evaluations.

    trained: by target; use is shown with the last one. folder: holds the export, with a folder for each
    mode if there are several adapters.
    """
    modes = {target: mode for mode, target in MODES.items()}
    names = {target: modes[target] if len(trained) > 1 else target for target in trained}
    base, baseline = config.model, config.baseline
    base_model = f"base_model: {base.name}\n" if base.may_be_on_hub else ""  # the hub refuses folders
    columns = {names[target]: _facts(config, target, artifact) for target, artifact in trained.items()}
    facts = dict.fromkeys(fact for column in columns.values() for fact in column)
    rows = [[fact, *(column.get(fact, "–") for column in columns.values())] for fact in facts]
    note = ""
    if form == "merged" and config.model.load_in_4bit:
        note = "Trained and evaluated on the base in 4 bits; merged into its weights before that."
    elif form == "adapter" and not baseline:
        note = "Elements that were not trained are those that training started from, to the bit."
    texts = [
        f"---\n{base_model}library_name: {'peft' if form == 'adapter' else 'transformers'}\n"
        f"tags: [lorapar, {baseline.method if baseline else 'lora'}]\n---",
        f"# {escaping.markdown(base.title)} after {_method_name(config)}: {', '.join(names.values())}",
        f"Made by lorapar (arXiv 2507.20999). {note}",
        *_results(evaluated),
        *_usage(config, trained, names, form, folder),
        Grid(["", *columns], rows).markdown(),
    ]
    return "\n\n".join(texts) + "\n"


def _method_name(config: Config) -> str:
    """Name the training method as people do: `LoRA-PAR`, `LoRA`, or the baseline's own name."""
    if config.baseline:
        return config.baseline.method
    strategy = config.partition.strategy
    return {"importance": "LoRA-PAR", "all": "LoRA"}.get(strategy, f"LoRA-PAR ({strategy})")


def _facts(config: Config, target: str, artifact: Artifact) -> dict[str, str]:
    """Return what the adapter learned, and the settings on which it depends."""
    manifest, summary = artifact.manifest, artifact.manifest["summary"]
    dtype = manifest["provenance"].get("dtype", "")
    prompt = config.prompt_of(target)
    share = f"{summary['active']:,} of {summary['elements']:,} ({summary['active_share']:.1%})"
    facts = {
        "learned": LEARNED[target],
        "elements trained": share,
        "steps": str(summary["steps"]),
        "artifact": manifest["key"],
        "lorapar": manifest["provenance"]["versions"]["lorapar"],
        "base in": f"NF4, {dtype}" if config.model.load_in_4bit else dtype,
        "seed": str(config.seed),
        "prompt template": prompt.template,
        "system message": prompt.system_message(SYSTEMS[target]) or "–",
    }
    sections = {name: part for name, part in manifest["identity"]["config"].items() if isinstance(part, dict)}
    if not config.baseline:
        sections |= {"partition": config.partition.model_dump(), "score": {"scorer": config.score.scorer}}
    for name, section in sections.items():  # with their sections: both partition and rl have a `beta`
        scalars = {key: value for key, value in section.items() if isinstance(value, str | int | float)}
        facts |= {f"{name}.{key}": str(value) for key, value in scalars.items()}
    return facts


def _results(evaluated: Sequence[Artifact]) -> list[str]:
    """Tabulate accuracies with their intervals; nothing if there are none."""
    rows = []
    for artifact in evaluated:
        target, _, benchmark = artifact.manifest["variant"].partition("@")
        metrics = read_json(artifact.path / "metrics.json", dict[str, Any])
        for group, title in (("all", "all"), ("system1", "System 1"), ("system2", "System 2")):
            if (measures := metrics.get(group, {})).get("interval"):
                interval = Interval(*measures["interval"])
                value = Value(measures["accuracy"], n=measures["n"], over_items=interval)
                rows.append([f"{target} on {benchmark}, {title}", value.text(), str(value.n)])
    return [Grid(["", "accuracy, % [95 % interval]", "items"], rows).markdown()] if rows else []


def _usage(
    config: Config, trained: dict[str, Artifact], names: dict[str, str], form: Form, folder: Path
) -> list[str]:
    """Write how to load the export, and where vLLM can, how to serve it."""
    *_, (target, artifact) = trained.items()
    merged, dtype = form == "merged", artifact.manifest["provenance"].get("dtype", "")
    load = "" if merged else 'model = PeftModel.from_pretrained(model, ".")\n'
    if len(names) > 1:
        first, last = names.values()
        load = f'model = PeftModel.from_pretrained(model, "{first}", adapter_name="{first}")\n'
        load += f'model.load_adapter("{last}", adapter_name="{last}")\n'
        load += f'model.set_adapter("{last}")  # or "{first}"\n'
    library = "transformers" if merged else "plain PEFT"
    python = code(config, target, dtype, folder, load)
    texts = [f"In this folder, with {library}:\n\n```python\n{python}\n```"]
    if not merged and not config.served_by_vllm:
        return texts
    folders = {name: folder / name if len(names) > 1 else folder for name in names.values()}
    try:
        server = server_command(config, dtype, folder, {} if merged else folders, names[target])
    except ConfigError:  # its rank is larger than vLLM serves
        return texts
    texts.append(f"Or a server of vLLM, started in this folder:\n\n```sh\n{server}\n```")
    return texts if merged else [*texts, BASE_BESIDE]


def server_command(config: Config, dtype: str, folder: Path, modules: dict[str, Path], name: str) -> str:
    """Write vLLM's command that serves an export as it was trained, for a shell in its folder.

    dtype: of the base in training. modules: name → folder of each adapter, which is `folder` or below it;
    without any, a merged model is served by this name. ConfigError if a rank is larger than vLLM serves.
    """
    base, flags = ".", f"--served-model-name {name}"
    if modules:
        base = escaping.shell(_path_from(folder, config.model.name))
        if config.model.revision != "main":
            base += f" --revision {escaping.shell(config.model.revision)}"
        flags = " ".join(lora_flags(modules)).replace(f"{folder}/", "").replace(f"={folder} ", "=. ")
    length = context_length(config.model, config.server)
    dtype_flag = f" --dtype {dtype}" if dtype else ""
    return f"vllm serve {base} --generation-config vllm{dtype_flag} --max-model-len {length} {flags}"


def code(config: Config, target: str, dtype: str, folder: Path, load_adapters: str) -> str:
    """Write Python that loads an export in its folder, and answers the question as in training.

    load_adapters: the lines that load adapters into `model`; empty for a merged model.
    """
    prompt, limit = config.prompt_of(target), config.rl.max_completion_length
    message = prompt.system_message(SYSTEMS[target])
    source = json.dumps(_path_from(folder, config.model.name) if load_adapters else ".")
    if load_adapters and config.model.revision != "main":
        source += f", revision={json.dumps(config.model.revision)}"
    names, arguments = ["AutoModelForCausalLM", "AutoTokenizer"], source
    if load_adapters and dtype:
        arguments += f', dtype="{dtype}"'
    if load_adapters and config.model.load_in_4bit:
        names.append("BitsAndBytesConfig")
        arguments += f", quantization_config={NF4.format(dtype=dtype)}"
    imports = "from peft import PeftModel\n" if load_adapters else ""
    if prompt.template == "chat":
        given = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        given |= prompt.template_arguments(SYSTEMS[target])
        listed = "".join(f", {name}={value!r}" for name, value in given.items())
        messages = [{"role": "system", "content": message}] if message else []
        messages.append({"role": "user", "content": QUESTION})
        inputs = f"inputs = tokenizer.apply_chat_template({messages!r}{listed})"
    else:
        bare = prompt.template == "bare"
        text = repr(QUESTION) + " + tokenizer.eos_token" if bare else repr(plain(QUESTION, message))
        inputs = f'inputs = tokenizer({text}, return_tensors="pt")'
    return f"""{imports}from transformers import {", ".join(names)}

tokenizer = AutoTokenizer.from_pretrained({source})
model = AutoModelForCausalLM.from_pretrained({arguments})
{load_adapters}
{inputs}
output = model.generate(**inputs.to(model.device), max_new_tokens={limit}, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


def _path_from(folder: Path, base: str) -> str:
    """Return the base's name for a command that runs in `folder`: a local path becomes relative to it."""
    local = not Path(base).is_absolute() and Path(base).is_dir()
    return os.path.relpath(base, folder) if local else base
