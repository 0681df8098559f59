"""Use of an exported adapter or model without lorapar: a server, requests, Python."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from stages import escaping
from stages.config import SYSTEMS, Config
from stages.engines.vllm import context_length, lora_flags
from stages.prompts.renderer import plain

QUESTION = "Tom has 3 boxes of 4 pens. How many pens does Tom have?"
EOS = "<EOS>"
"""Stands in a request for the tokenizer's own token."""
NF4 = (
    'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, '
    'bnb_4bit_compute_dtype="{dtype}")'
)


def server_command(config: Config, dtype: str, folder: Path, modules: dict[str, Path], name: str) -> str:
    """Write vLLM's command that serves an export as it was trained, for a shell in its folder.

    dtype: of the base in training. modules: name → folder of each adapter, which is `folder` or below it;
    without any, a merged model is served by this name. ConfigError if a rank is larger than vLLM serves.
    """
    base, flags = ".", f"--served-model-name {name}"
    if modules:
        base = escaping.shell(_path_from(folder, config.model.name))
        base += (
            "" if config.model.revision == "main" else f" --revision {escaping.shell(config.model.revision)}"
        )
        flags = " ".join(lora_flags(modules)).replace(f"{folder}/", "").replace(f"={folder} ", "=. ")
    length = context_length(config.model, config.server)
    dtype_flag = f" --dtype {dtype}" if dtype else ""
    return f"vllm serve {base} --generation-config vllm{dtype_flag} --max-model-len {length} {flags}"


def request(model: str, config: Config, target: str) -> str:
    """Write a request by curl to the model of this name, with the question prompted as in training."""
    prompt, content = config.prompt_of(target), dict[str, Any](model=model)
    if prompt.template == "chat":
        path, content["messages"] = "chat/completions", _messages(config, target)
        if arguments := prompt.template_arguments(SYSTEMS[target]):
            content["chat_template_kwargs"] = arguments
    else:
        path, content["prompt"] = "completions", _text(config, target)
    limit = config.rl.max_completion_length  # by default vLLM completes a text by 16 tokens
    body = json.dumps(content | {"max_tokens": limit, "temperature": 0}, ensure_ascii=False)
    hint = f"# for {EOS} write the tokenizer's own token\n" if prompt.template == "bare" else ""
    url = f"http://127.0.0.1:8000/v1/{path}"
    return f"{hint}curl {url} -H 'Content-Type: application/json' \\\n    -d {escaping.shell(body)}"


def _messages(config: Config, target: str) -> list[dict[str, str]]:
    message = config.prompt_of(target).system_message(SYSTEMS[target])
    system_message = [{"role": "system", "content": message}] if message else []
    return [*system_message, {"role": "user", "content": QUESTION}]


def _text(config: Config, target: str) -> str:
    prompt = config.prompt_of(target)
    bare = prompt.template == "bare"
    return QUESTION + EOS if bare else plain(QUESTION, prompt.system_message(SYSTEMS[target]))


def code(config: Config, target: str, dtype: str, folder: Path, load_adapters: str) -> str:
    """Write Python that loads an export in its folder, and answers the question as in training.

    load_adapters: the lines that load adapters into `model`; empty for a merged model.
    """
    prompt, limit = config.prompt_of(target), config.rl.max_completion_length
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
        inputs = f"inputs = tokenizer.apply_chat_template({_messages(config, target)!r}{listed})"
    else:
        text = repr(_text(config, target).removesuffix(EOS))
        end = " + tokenizer.eos_token" if prompt.template == "bare" else ""
        inputs = f'inputs = tokenizer({text}{end}, return_tensors="pt")'
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
