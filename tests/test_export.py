"""An exported adapter or model answers as what was trained."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, flags, make_steps
from huggingface_hub.errors import LocalTokenNotFoundError

from stages import export
from stages.config import SYSTEMS, BaselineSection
from stages.errors import ConfigError, OutputError
from stages.models.base import load_adapted, load_base
from stages.models.tokenizer import load_tokenizer
from stages.prompts.renderer import Renderer
from stages.report.card import QUESTION, card, code
from stages.store.artifacts import Artifact, Store

SETTINGS = ["sft.max_steps=3", "sft.learning_rate=0.1", "sft.num_train_epochs=9", "lora.lora_alpha=256"]


@pytest.fixture(scope="module")
def trained(begun):
    config = begun(*SETTINGS)
    return config, list(make_steps(config, "score", "partition", "sft").values())[-1][0]


@pytest.fixture(scope="module")
def another(begun):
    """An adapter that answers otherwise, and says that it is RL's."""
    made = make_steps(begun(*SETTINGS, "lora.lora_alpha=2000"), "score", "partition", "sft")["sft"][0]
    return replace(made, manifest={**made.manifest, "stage": "rl"})


def same_files(folder: Path, artifact: Artifact) -> None:
    weights, settings = "adapter_model.safetensors", "adapter_config.json"
    assert (folder / weights).read_bytes() == (artifact.path / "adapter" / weights).read_bytes()
    trained = json.loads((artifact.path / "adapter" / settings).read_text())
    base = str(Path(trained["base_model_name_or_path"]).absolute())
    assert json.loads((folder / settings).read_text()) == {**trained, "base_model_name_or_path": base}


def test_the_adapter_is_copied_byte_by_byte_with_a_card(trained, tmp_path):
    config, artifact = trained
    (tmp_path / ".a.partial").mkdir()  # like a temporary folder, and a person's own
    (tmp_path / ".a.partial/mine").write_text("mine")
    export.write({"sft": artifact}, config, tmp_path / "a", "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.partial", "a"]
    assert (tmp_path / ".a.partial/mine").read_text() == "mine"
    same_files(tmp_path / "a", artifact)
    text = (tmp_path / "a/README.md").read_text()
    assert artifact.manifest["key"] in text and "| sft.learning_rate | 0.1 |" in text
    assert f'from_pretrained("{config.model.name}")' in text
    assert "base_model" not in text  # the model is a folder, and the hub takes only its own names
    with pytest.raises(OutputError, match="a exists"):
        export.write({"sft": artifact}, config, tmp_path / "a", "adapter")


def test_the_merged_model_loads_by_itself_and_answers_alike(trained, tmp_path):
    """Also beside sampling settings that greedy decoding does not read."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config, artifact = trained
    shutil.copytree(config.model.name, tmp_path / "base")
    settings = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}
    (tmp_path / "base/generation_config.json").write_text(json.dumps(settings))
    model = config.model.model_copy(update={"name": str(tmp_path / "base")})
    export.write({"sft": artifact}, config.model_copy(update={"model": model}), tmp_path / "m", "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert AutoTokenizer.from_pretrained(tmp_path / "m").eos_token
    ids = torch.arange(5, 60).view(1, -1)
    wanted = load_adapted(config.model, artifact.path / "adapter")(input_ids=ids).logits
    torch.testing.assert_close(merged(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(load_base(config.model)(input_ids=ids).logits, wanted, atol=1e-2)
    assert merged.generation_config.temperature == 0.9


def test_nothing_is_exported_among_artifacts_or_onto_a_full_disk(trained, tmp_path, full_disk):
    config, artifact = trained
    with pytest.raises(OSError, match="full"):
        export.write({"sft": artifact}, config, tmp_path / "a", "adapter")
    assert not list(tmp_path.iterdir())
    for name in ("adapter/new", "../new"):
        with pytest.raises(OutputError, match="would lie among the artifacts of a run"):
            export.write({"sft": artifact}, config, artifact.path / name, "adapter")
    assert Store(artifact.path.parents[1]).integrity_error(artifact) is None


def test_views_are_two_adapters_with_the_command_that_serves_both(trained, another, tmp_path, monkeypatch):
    config, artifact = trained
    both = {"sft": artifact, "rl": another}
    export.write(both, config, tmp_path / "out/v", "adapter")
    for view, source in (("fast", artifact), ("slow", another)):
        same_files(tmp_path / "out/v" / view, source)
    text = (tmp_path / "out/v/README.md").read_text(encoding="utf-8")
    how = "--generation-config vllm --dtype float32 --max-model-len 4096"
    served = f"vllm serve {config.model.name} {how} --enable-lora --lora-modules fast=fast slow=slow"
    assert f"{served} --max-loras 2 --max-lora-rank 8\n" in text
    assert "| system message |" in text and "| prompt template | chat | chat |" in text
    learned = "| learned | System 1, to answer at once: SFT | System 2, to work it out: GRPO |"
    assert learned in text and 'model.set_adapter("slow")  # or "fast"' in text
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/m").mkdir(parents=True)
    other = config.model_copy(update={"model": config.model.model_copy(update={"name": "models/m"})})
    text = card(other, both, "adapter", tmp_path / "out/v")
    assert "vllm serve ../../models/m --generation-config vllm" in text
    for mode in ("fast", "slow"):  # vLLM serves ranks up to 512
        file = tmp_path / "out/v" / mode / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 1024}))
    text = card(config, both, "adapter", tmp_path / "out/v")
    assert "vllm serve" not in text and "PeftModel.from_pretrained" in text
    ia3 = config.model_copy(update={"baseline": BaselineSection(method="ia3")})
    with pytest.raises(ConfigError, match="--views are served by vLLM, which cannot serve baseline ia3"):
        export.write(both, ia3, tmp_path / "w", "adapter")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("form", ["adapter", "merged", "views"])
def test_the_code_of_a_card_answers_as_the_adapter_does(
    trained, another, tmp_path, monkeypatch, capsys, form
):
    """Merged with the template plain, else with chat."""
    config, artifact = trained
    folder, system = tmp_path / "x", 'Say "it\'s"\n```\nin one line.'
    template = "plain" if form == "merged" else "chat"
    prompt = config.prompt.model_copy(update={"system": system, "template": template})
    config = config.model_copy(update={"prompt": prompt})
    trained_modes = {"sft": another, "rl": artifact} if form == "views" else {"rl": artifact}
    export.write(trained_modes, config, folder, "merged" if form == "merged" else "adapter")
    text = (folder / "README.md").read_text(encoding="utf-8")
    renderer = Renderer(load_tokenizer(config.model), prompt)
    (python,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(python.replace(f"max_new_tokens={config.rl.max_completion_length},", "max_new_tokens=8,"), {})
    ids = torch.tensor([renderer.ids(renderer.prompt(QUESTION))])
    model = load_adapted(config.model, artifact.path / "adapter")
    output = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    answer = renderer.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert capsys.readouterr().out == f"{answer}\n"


def test_a_view_is_used_with_its_template_arguments(trained):
    config, _ = trained
    modes = {1: {"enable_thinking": False}, 2: {"enable_thinking": True}}
    prompt = config.prompt.model_copy(update={"chat_template_kwargs_by_system": modes})
    config = config.model_copy(update={"prompt": prompt})
    for target, system in SYSTEMS.items():
        python = code(config, target, "", Path("x"), "")
        assert f"enable_thinking={modes[system]['enable_thinking']})" in python
    compile(python, "code", "exec")


def test_a_push_uploads_what_was_exported_or_the_command_says_why_not(
    begun, trained, lorapar, tmp_path, monkeypatch
):
    def upload(_, repo_id: str, folder_path: Path) -> SimpleNamespace:
        if repo_id == "mine":
            raise LocalTokenNotFoundError("no token")
        shutil.copytree(folder_path, tmp_path / "hub")
        return SimpleNamespace(repo_url=f"https://hub/{repo_id}")

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    command = ("export", ROOT / "configs/smoke.yaml", *flags(*begun.home, *SETTINGS), "--target", "sft")
    done = lorapar(*command, tmp_path / "x", "--push", "me/mine")
    assert done.code == 0 and "pushed to https://hub/me/mine" in done.out + done.err
    names = sorted(path.name for path in (tmp_path / "hub").iterdir())
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    for status, message, *options in (
        (69, "cannot push to mine: no token(.|\n)*hf auth", "--push", "mine"),
        (66, "sft is (missing|stale)", "--set", "sft.learning_rate=0.77"),  # stale if another test made it
        (78, "--views exports both modes as adapters: leave out --target", "--views"),
    ):
        done = lorapar(*command, tmp_path / str(status), *options)
        assert done.code == status and re.search(f"^error: {message}", done.err, re.MULTILINE)
        assert (tmp_path / str(status)).exists() == (status == 69)
