"""Model cards of exported adapters and models: what they are, how well they answer, how they are used."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from stages import escaping
from stages.config import AUTO, FAST, MODES, TRAINED, Config, prompt_under
from stages.engines.vllm import SERVER, context_length, lora_flags
from stages.engines.vllm import flags as vllm_flags
from stages.errors import ConfigError
from stages.evaluation.statistics import Interval
from stages.prompts.renderer import plain
from stages.records import read_json
from stages.report.page import Grid
from stages.store.artifacts import Artifact
from stages.sweep.values import Value

Form = Literal["adapter", "merged"]
TEMPLATE = "chat_template.jinja"
"""The file in which transformers saves a tokenizer's chat template."""
QUESTION = "Tom has 3 boxes of 4 pens. How many pens does Tom have?"
NF4 = (
    'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, '
    'bnb_4bit_compute_dtype="{dtype}")'
)
BASE_BESIDE = """Do not ask that server for the base model while an adapter answers: vLLM 0.31 then gives it
the adapter, too (its pull request 48421)."""


def card(
    config: Config, trained: Artifact, form: Form, folder: Path, evaluated: Sequence[Artifact] = ()
) -> str:
    """Compose a model card from the manifest of an adapter and the metrics of its evaluations.

    folder: holds the export.
    """
    base, baseline = config.model, config.baseline
    base_model = f"base_model: {base.name}\n" if base.may_be_on_hub else ""  # the hub refuses folders
    facts = [[name, value] for name, value in _facts(config, trained).items()]
    strategy = config.partition.strategy
    names = {"importance": "LoRA-PAR", "all": "LoRA"}
    method = baseline.method if baseline else names.get(strategy, f"LoRA-PAR ({strategy})")
    note = ""
    if form == "merged" and config.model.load_in_4bit:
        note = "Trained and evaluated on the base in 4 bits; merged into its weights before that."
    elif form == "adapter" and not baseline:
        note = "Elements that were not trained are those that training started from, to the bit."
    texts = [
        f"---\n{base_model}library_name: {'peft' if form == 'adapter' else 'transformers'}\n"
        f"tags: [lorapar, {baseline.method if baseline else 'lora'}]\n---",
        f"# {escaping.markdown(base.title)} after {method}",
        f"Made by lorapar (arXiv 2507.20999). {note}",
        *_results(evaluated),
        *_usage(config, trained, form, folder),
        Grid(["", "value"], facts).markdown(),
    ]
    return "\n\n".join(texts) + "\n"


def _facts(config: Config, trained: Artifact) -> dict[str, str]:
    """Return what the adapter learned, and the settings on which it depends."""
    manifest, summary = trained.manifest, trained.manifest["summary"]
    dtype = manifest["provenance"].get("dtype", "")
    share = f"{summary['active']:,} of {summary['elements']:,} ({summary['active_share']:.1%})"
    facts = {
        "trained by": " and ".join(TRAINED[: TRAINED.index(manifest["stage"]) + 1]).upper(),
        "elements trained": share,
        "steps": str(summary["steps"]),
        "artifact": manifest["key"],
        "lorapar": manifest["provenance"]["versions"]["lorapar"],
        "base in": f"NF4, {dtype}" if config.model.load_in_4bit else dtype,
        "seed": str(config.seed),
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
        metrics = read_json(artifact.path / "metrics.json")
        for group, title in (("all", "all"), ("system1", "System 1"), ("system2", "System 2")):
            if (measures := metrics.get(group, {})).get("interval"):
                interval = Interval(*measures["interval"])
                value = Value(measures["accuracy"], n=measures["n"], over_items=interval)
                rows.append([f"{target} on {benchmark}, {title}", value.text(), str(value.n)])
    return [Grid(["", "accuracy, % [95 % interval]", "items"], rows).markdown()] if rows else []


def _usage(config: Config, trained: Artifact, form: Form, folder: Path) -> list[str]:
    """Write how to load the export, and where vLLM can, how to serve it."""
    dtype = trained.manifest["provenance"].get("dtype", "")
    merged = form == "merged"
    texts = [f"In this folder:\n\n```python\n{code(config, trained, form, folder)}\n```"]
    if not merged and not config.served_by_vllm:
        return texts
    try:
        server = server_command(config, dtype, folder, merged)
    except ConfigError:  # its rank is larger than vLLM serves
        return texts
    texts.append(f"Or a server of vLLM, started in this folder:\n\n```sh\n{server}\n```")
    if config.modes and config.prompt_of(trained.manifest["stage"]).template == "chat":
        mode = json.dumps({"chat_template_kwargs": {"mode": FAST}})
        texts.append(
            f"A request names its mode, one of {', '.join(MODES)}, by `{mode}`; without a name it is {AUTO}."
        )
    return texts if merged else [*texts, BASE_BESIDE]


def server_command(config: Config, dtype: str, folder: Path, merged: bool) -> str:
    """Write vLLM's command that serves an export as it was trained, for a shell in its folder.

    dtype: of the base in training. ConfigError if the adapter's rank is larger than vLLM serves.
    """
    base, flags = ".", f"--served-model-name {config.run}"
    if not merged:
        base = escaping.shell(_path_from(folder, config.model.name))
        if config.model.revision != "main":
            base += f" --revision {escaping.shell(config.model.revision)}"
        flags = " ".join(lora_flags({config.run: folder})).replace(f"={folder} ", "=. ")
    if (folder / TEMPLATE).exists():
        flags += f" --chat-template {TEMPLATE}"
    length = context_length(config.model, config.server)
    dtype_flag = f" --dtype {dtype}" if dtype else ""
    flags = " ".join([flags, *map(escaping.shell, vllm_flags(config.server.vllm | {"max_model_len": None}))])
    server = f"python {' '.join(SERVER)} {base} --generation-config vllm"
    return f"{server}{dtype_flag} --max-model-len {length} {flags}"


def code(config: Config, trained: Artifact, form: Form, folder: Path) -> str:
    """Write Python that loads an export in its folder, and answers the question as in training."""
    prompt = config.prompt_of(trained.manifest["stage"])
    limit, dtype = config.rl.max_completion_length, trained.manifest["provenance"].get("dtype", "")
    names, arguments, imports, load = ["AutoModelForCausalLM", "AutoTokenizer"], '"."', "", ""
    if form == "adapter":
        imports, load = "from peft import PeftModel\n", 'model = PeftModel.from_pretrained(model, ".")\n'
        arguments = json.dumps(_path_from(folder, config.model.name))
        if config.model.revision != "main":
            arguments += f", revision={json.dumps(config.model.revision)}"
        arguments += f', dtype="{dtype}"' if dtype else ""
        if config.model.load_in_4bit:
            names.append("BitsAndBytesConfig")
            arguments += f", quantization_config={NF4.format(dtype=dtype)}"
    if prompt.template == "chat":  # the template in the folder writes the messages
        given = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        given |= {"mode": AUTO} if config.modes else {}
        listed = "".join(f", {name}={value!r}" for name, value in given.items())
        inputs = (
            f"inputs = tokenizer.apply_chat_template({[{'role': 'user', 'content': QUESTION}]!r}{listed})"
        )
    else:
        bare, message = prompt.template == "bare", prompt_under(prompt, config.modes, AUTO).system
        text = repr(QUESTION) + " + tokenizer.eos_token" if bare else repr(plain(QUESTION, message))
        inputs = f'inputs = tokenizer({text}, return_tensors="pt")'
    return f"""{imports}from transformers import {", ".join(names)}

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained({arguments})
{load}
{inputs}
output = model.generate(**inputs.to(model.device), max_new_tokens={limit}, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


def _path_from(folder: Path, base: str) -> str:
    """Return the base's name for a command that runs in `folder`: a local path becomes relative to it."""
    local = not Path(base).is_absolute() and Path(base).is_dir()
    # Both without links: `..` leads from where the folder is, not from where a link to it is.
    return os.path.relpath(Path(base).resolve(), folder.resolve()) if local else base
