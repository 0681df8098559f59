"""An export for llama.cpp and Ollama: the prompt of training, and what the converters cannot hold."""

import json
from pathlib import Path

import pytest
from conftest import make_steps

from stages import export, gguf
from stages.config import PromptSection
from stages.errors import ConfigError, OutputError
from stages.models.tokenizer import load_tokenizer
from stages.prompts.renderer import Renderer
from stages.records import Example
from stages.report.views import view_of

CONVERTER = """import sys
arguments = sys.argv[1:]
if {fails}:
    sys.exit("ValueError: unknown model")
open(arguments[arguments.index("--outfile") + 1], "w").write(" ".join(arguments))
"""


@pytest.fixture(scope="module")
def trained(begun):
    config = begun("sft.max_steps=1")
    return config, make_steps(config, "score", "partition", "sft")["sft"][0]


@pytest.fixture
def llama_cpp(tmp_path):
    """A folder with stand-ins of llama.cpp's converters, which write down how they were called."""

    def make(fails: bool = False) -> Path:
        folder = tmp_path / "llama.cpp"
        folder.mkdir(exist_ok=True)
        for name in (gguf.ADAPTER_CONVERTER, gguf.MODEL_CONVERTER):
            (folder / name).write_text(CONVERTER.format(fails=fails))
        return folder

    return make


def test_base_and_adapter_are_converted_and_the_card_says_how_to_run_them(trained, tmp_path, llama_cpp):
    config, artifact = trained
    export.write(artifact, config, tmp_path / "a", "adapter", llama_cpp=llama_cpp())
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert {"base.gguf", "sft.gguf", "sft.Modelfile", "adapter_model.safetensors"} <= names
    assert (tmp_path / "a/base.gguf").read_text().endswith(f"--outtype auto {config.model.name}")
    assert f"--base {config.model.name}" in (tmp_path / "a/sft.gguf").read_text()
    assert "ollama create sft -f sft.Modelfile" in (tmp_path / "a/README.md").read_text()
    export.write(artifact, config, tmp_path / "m", "merged", llama_cpp=llama_cpp())
    assert "ADAPTER" not in (tmp_path / "m/sft.Modelfile").read_text()
    assert (tmp_path / "m/model.gguf").exists() and not (tmp_path / "m/sft.gguf").exists()


@pytest.mark.parametrize(
    "prompt",
    [
        {"template": "plain"},
        {"template": "chat", "by_system": {1: "Answer {{at}} once.", 2: "Work it out."}},
        {"template": "chat", "system": "Say hello.\n\nBe kind."},
    ],
)
def test_a_modelfile_has_the_prompt_of_training(trained, prompt):
    config, artifact = trained
    section = PromptSection(**prompt)
    view = view_of(artifact)
    text = gguf.modelfile("base.gguf", "sft.gguf", config.model_copy(update={"prompt": section}), view)
    template = text.split('TEMPLATE """')[1].split('"""')[0]
    shown = template.replace('{{ "{{" }}', "{{").replace("{{ .Prompt }}", "What is 2 + 2?")
    renderer = Renderer(load_tokenizer(config.model), section, system=1)
    assert shown == renderer.prompt("What is 2 + 2?", example=Example("", "What is 2 + 2?", "", None))
    assert f"PARAMETER stop {json.dumps(renderer.end)}" in text
    assert text.startswith("FROM ./base.gguf\nADAPTER ./sft.gguf\n")


def test_what_gguf_cannot_hold_and_a_failed_converter_leave_nothing(trained, tmp_path, llama_cpp):
    config, artifact = trained
    with pytest.raises(ConfigError, match=r"no convert_lora_to_gguf.py there"):
        gguf.check(tmp_path)
    with pytest.raises(OutputError, match="ValueError: unknown model"):
        export.write(artifact, config, tmp_path / "a", "adapter", llama_cpp=llama_cpp(fails=True))
    settings = tmp_path / "adapter_config.json"
    for other in ({"use_rslora": True}, {"rank_pattern": {"q_proj": 4}}, {"peft_type": "OFT"}):
        settings.write_text(json.dumps({"peft_type": "LORA", **other}))
        with pytest.raises(ConfigError, match=f"this one has {next(iter(other))}"):
            gguf._require_plain(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "llama.cpp"]


def test_a_tokenizer_that_the_converter_takes_for_another_kind_is_said(trained, tmp_path):
    config, _ = trained
    file = tmp_path / "base.gguf"
    for kind in (b"gpt2", b"llama"):
        length = len(kind).to_bytes(8, "little")
        file.write_bytes(b"GGUF" + gguf.VOCABULARY + (8).to_bytes(4, "little") + length + kind)
        if kind == b"gpt2":
            gguf._check_vocabulary(file, config.model)
    with pytest.raises(OutputError, match="takes the tokenizer of .* for SentencePiece"):
        gguf._check_vocabulary(file, config.model)
