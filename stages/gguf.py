"""Writes an export for llama.cpp and Ollama: GGUF files by llama.cpp's own converters, and a Modelfile each.

A Modelfile holds the whole prompt of training as its template, system message and switches of thinking
included, because Ollama knows few chat templates and passes a question bare where it does not know one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from stages.config import Config, ModelSection
from stages.errors import ConfigError, OutputError
from stages.models.tokenizer import load_tokenizer
from stages.prompts.renderer import Renderer
from stages.records import Example
from stages.report.views import View, prompt_of

ADAPTER_CONVERTER = "convert_lora_to_gguf.py"
MODEL_CONVERTER = "convert_hf_to_gguf.py"
CLONE = "git clone https://github.com/ggml-org/llama.cpp, and name that folder"
VOCABULARY = b"tokenizer.ggml.model"
"""Key of the kind of tokenizer, in the first HEADER_BYTES of a GGUF file."""
HEADER_BYTES = 1 << 20
QUESTION = "@@question@@"
"""Stands for the question in a rendered prompt."""
PLAIN = {"peft_type": "LORA", "use_rslora": False, "use_dora": False}
"""What a GGUF adapter can hold, as settings of PEFT; beside these one rank and one alpha for all weights."""
NOT_PLAIN = ("rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices")


def check(llama_cpp: Path) -> None:
    """Raise ConfigError if the folder lacks llama.cpp's converters."""
    for name in (ADAPTER_CONVERTER, MODEL_CONVERTER):
        if not (llama_cpp / name).is_file():
            raise ConfigError(f"--gguf {llama_cpp}: no {name} there", CLONE)


def write(folder: Path, modes: dict[str, tuple[View, Path]], config: Config, llama_cpp: Path) -> str:
    """Convert an export into `folder`; return what its card says about it, in Markdown.

    modes: name → the mode, and the folder of its adapter or of the merged model. ConfigError for an adapter
    that GGUF cannot hold, OutputError if a converter fails.
    """
    merged = any((path / "config.json").exists() for _, path in modes.values())
    model = folder / ("model.gguf" if merged else "base.gguf")
    base = folder if merged else _base_folder(config.model)
    for _, path in () if merged else modes.values():
        _require_plain(path)
    _convert(llama_cpp / MODEL_CONVERTER, model, "auto", str(base))
    _check_vocabulary(model, config.model)
    for name, (view, path) in modes.items():
        if not merged:
            adapter = folder / f"{name}.gguf"
            _convert(llama_cpp / ADAPTER_CONVERTER, adapter, "f32", "--base", str(base), str(path))
        text = modelfile(model.name, "" if merged else f"{name}.gguf", config, view)
        (folder / f"{name}.Modelfile").write_text(text, encoding="utf-8")
    return _usage(model.name, list(modes), merged)


def _base_folder(model: ModelSection) -> Path:
    """The folder of the base model, which is fetched from the hub if it is there."""
    if not model.may_be_on_hub:
        return Path(model.name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model.name, revision=model.pinned_revision))


def modelfile(model: str, adapter: str, config: Config, view: View) -> str:
    """Compose Ollama's description of a mode: files, the prompt of training, greedy decoding."""
    section, tokenizer = prompt_of(config, view), load_tokenizer(config.model)
    renderer = Renderer(tokenizer, section, system=int(view.system))
    text = renderer.prompt(QUESTION, example=Example("", QUESTION, "", None))
    bos = tokenizer.bos_token
    if bos and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(bos)  # llama.cpp puts it there where the tokenizer does
    if '"""' in text:
        raise ConfigError('a Modelfile cannot hold """, which the prompt has', "change prompt.system")
    # Braces would begin an action of Go's templates.
    template = text.replace("{{", '{{ "{{" }}').replace(QUESTION, "{{ .Prompt }}")
    stop = dict.fromkeys([renderer.end, *(["\nQuestion:"] if section.template == "plain" else [])])
    lines = [f"FROM ./{model}", *([f"ADAPTER ./{adapter}"] if adapter else [])]
    lines.append(f'TEMPLATE """{template}"""')
    lines += [f"PARAMETER stop {json.dumps(end)}" for end in stop]
    return "\n".join([*lines, "PARAMETER temperature 0", ""])


def _check_vocabulary(file: Path, model: ModelSection) -> None:
    """Raise OutputError if the converter took byte-level BPE for SentencePiece, whose tokens are others."""
    with file.open("rb") as content:
        _, key, behind = content.read(HEADER_BYTES).partition(VOCABULARY)
    size = int.from_bytes(behind[4:12], "little")  # the type, 4 bytes, then the length of the text
    byte_level = "ByteLevel" in repr(getattr(load_tokenizer(model), "backend_tokenizer", None))
    if key and byte_level and behind[12 : 12 + size] == b"llama":
        raise OutputError(
            f"{MODEL_CONVERTER} takes the tokenizer of {model.name} for SentencePiece, which it is not",
            "files of the model as its authors publish them may do; those of lorapar fetch do not",
        )


def _require_plain(adapter: Path) -> None:
    """Raise ConfigError for an adapter whose scaling or parts llama.cpp does not read."""
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    unlike = [name for name, value in PLAIN.items() if (settings.get(name) or False) != value]
    if unlike := [*unlike, *(name for name in NOT_PLAIN if settings.get(name))]:
        raise ConfigError(
            f"--gguf: a GGUF adapter is plain LoRA, and this one has {', '.join(unlike)}", "add --merged"
        )


def _convert(script: Path, out: Path, kind: str, *arguments: str) -> None:
    command = [sys.executable, str(script), "--outfile", str(out), "--outtype", kind, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not out.is_file():
        message = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise OutputError(f"{script.name} failed: {message}", f"try it by hand: {' '.join(command)}")


def _usage(model: str, names: list[str], merged: bool) -> str:
    created = "\n".join(f"ollama create {name} -f {name}.Modelfile" for name in names)
    adapter = "" if merged else f" --lora {names[0]}.gguf"
    return f"""
## Ollama and llama.cpp

In this folder:

```sh
{created}
ollama run {names[0]}
```

A Modelfile has the prompt of training. Or start llama.cpp's server, and send the same messages as to vLLM:

```sh
llama-server -m {model}{adapter} --jinja
```
"""
