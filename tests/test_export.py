"""An exported adapter or model answers as what was trained, and its card says what it is."""

import importlib.util
import itertools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, change_json, flags, make_steps
from huggingface_hub.errors import LocalTokenNotFoundError

from stages import export
from stages.config import MODES, BaselineSection, Config, ModesSection, prompt_under
from stages.errors import ConfigError, OutputError
from stages.models.base import load_adapted, load_base
from stages.models.tokenizer import load_tokenizer
from stages.prompts.renderer import Renderer
from stages.records import Example
from stages.report.card import QUESTION, card
from stages.store.artifacts import Artifact, Store

SETTINGS = ["sft.max_steps=3", "sft.learning_rate=0.1", "sft.num_train_epochs=9", "lora.lora_alpha=256"]


@pytest.fixture(scope="module")
def trained(begun):
    config = begun(*SETTINGS)
    return config, list(make_steps(config, "score", "partition", "sft").values())[-1][0]


def same_files(folder: Path, artifact: Artifact) -> None:
    weights, settings = "adapter_model.safetensors", "adapter_config.json"
    assert (folder / weights).read_bytes() == (artifact.path / "adapter" / weights).read_bytes()
    trained = json.loads((artifact.path / "adapter" / settings).read_text())
    base = str(Path(trained["base_model_name_or_path"]).absolute())
    assert json.loads((folder / settings).read_text()) == {**trained, "base_model_name_or_path": base}


def test_the_adapter_is_copied_byte_by_byte_with_a_card(trained, tmp_path):
    config, artifact = trained
    (artifact.path / "adapter").chmod(0o555)  # as in a run that nobody may write to
    (tmp_path / ".a.partial").mkdir()  # like a temporary folder, and a person's own
    (tmp_path / ".a.partial/mine").write_text("mine")
    export.write(artifact, config, tmp_path / "a", "adapter")
    (artifact.path / "adapter").chmod(0o755)
    assert (tmp_path / "a").stat().st_mode & 0o200
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.partial", "a"]
    assert (tmp_path / ".a.partial/mine").read_text() == "mine"
    same_files(tmp_path / "a", artifact)
    text = (tmp_path / "a/README.md").read_text()
    assert artifact.manifest["key"] in text and "| sft.learning_rate | 0.1 |" in text
    assert f'from_pretrained("{config.model.name}"' in text
    assert "base_model" not in text  # the model is a folder, and the hub takes only its own names
    with pytest.raises(OutputError, match="a exists"):
        export.write(artifact, config, tmp_path / "a", "adapter")


def test_the_merged_model_loads_by_itself_and_answers_alike(trained, tmp_path):
    """Also beside sampling settings that greedy decoding does not read."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config, artifact = trained
    shutil.copytree(config.model.name, tmp_path / "base")
    settings = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}
    (tmp_path / "base/generation_config.json").write_text(json.dumps(settings))
    model = config.model.model_copy(update={"name": str(tmp_path / "base")})
    export.write(artifact, config.model_copy(update={"model": model}), tmp_path / "m", "merged")
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
        export.write(artifact, config, tmp_path / "a", "adapter")
    assert not list(tmp_path.iterdir())
    for name in ("adapter/new", "../new"):
        with pytest.raises(OutputError, match="would lie among the artifacts of a run"):
            export.write(artifact, config, artifact.path / name, "adapter")
    assert Store(artifact.path.parents[1]).integrity_error(artifact) is None


def test_the_card_says_how_vllm_serves_it(trained, tmp_path, monkeypatch):
    config, artifact = trained
    export.write(artifact, config, tmp_path / "out/a", "adapter")
    text = (tmp_path / "out/a/README.md").read_text(encoding="utf-8")
    how = "--generation-config vllm --dtype float32 --max-model-len 4096"
    served = f"api_server --model {config.model.name} {how} --enable-lora --lora-modules {config.run}=."
    assert f"{served} --max-loras 1 --max-lora-rank 8 --chat-template chat_template.jinja\n" in text
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/m").mkdir(parents=True)
    (tmp_path / "deep/down").mkdir(parents=True)
    (tmp_path / "deep/down/out").symlink_to(tmp_path / "out")
    other = config.model_copy(update={"model": config.model.model_copy(update={"name": "models/m"})})
    for folder in ("out/a", "deep/down/out/a"):
        text = card(other, artifact, "adapter", tmp_path / folder)
        assert "api_server --model ../../models/m --generation-config vllm" in text
    change_json(tmp_path / "out/a/adapter_config.json", r=1024)  # vLLM serves ranks up to 512
    text = card(config, artifact, "adapter", tmp_path / "out/a")
    assert "api_server" not in text and "PeftModel.from_pretrained" in text
    tuned = config.model_copy(update={"baseline": BaselineSection(method="prompt_tuning")})
    with pytest.raises(ConfigError, match="--merged: prompt_tuning trains a prompt"):
        export.write(artifact, tuned, tmp_path / "w", "merged")
    assert not (tmp_path / "w").exists()


SAY = ("At once.", 'Say "it\'s"\n```\nin {{ one }} line.', "As you like: 數 {% raw %}.")
MESSAGES = ModesSection(**{mode: {"system": text} for mode, text in zip(MODES, SAY, strict=True)})


@pytest.mark.parametrize("form", ["adapter", "merged", "modes"])
def test_the_code_of_a_card_answers_as_the_adapter_does(trained, tmp_path, monkeypatch, capsys, form):
    """Merged with the template plain, else with chat."""
    config, artifact = trained
    folder, template = tmp_path / "x", "plain" if form == "merged" else "chat"
    prompt = config.prompt.model_copy(update={"system": SAY[1], "template": template})
    modes = MESSAGES if form == "modes" else None
    config = config.model_copy(update={"prompt": prompt, "modes": modes})
    export.write(artifact, config, folder, "merged" if form == "merged" else "adapter")
    text = (folder / "README.md").read_text(encoding="utf-8")
    renderer = Renderer(load_tokenizer(config.model), prompt_under(prompt, modes, "auto"))
    (python,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(python.replace(f"max_new_tokens={config.rl.max_completion_length},", "max_new_tokens=8,"), {})
    ids = torch.tensor([renderer.ids(renderer.prompt(QUESTION))])
    model = load_adapted(config.model, artifact.path / "adapter")
    output = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    answer = renderer.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert capsys.readouterr().out == f"{answer}\n"


SWITCH = {
    "fast": {"chat_template_kwargs": {"enable_thinking": False}},
    "slow": {"system": "Think.", "chat_template_kwargs": {"enable_thinking": True}},
    "auto": {"chat_template_kwargs": {"enable_thinking": True, "note": None}},
}
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{{ note if note is defined and note }}{% endif %}"
)


@pytest.mark.parametrize("modes", [MESSAGES, ModesSection(**SWITCH), None], ids=["said", "switch", "none"])
@pytest.mark.parametrize("system", [None, "Be kind."])
def test_the_exported_template_writes_what_training_rendered(trained, tmp_path, modes, system):
    """Token for token, also earlier turns, and a system message of the chat's own for that of the prompt."""
    config, artifact = trained
    tokenizer = load_tokenizer(config.model)
    if modes and modes.fast.chat_template_kwargs:
        shutil.copytree(config.model.name, tmp_path / "base")
        tokenizer.chat_template = THINKS
        tokenizer.save_pretrained(tmp_path / "base")
        model = config.model.model_copy(update={"name": str(tmp_path / "base")})
        config = config.model_copy(update={"model": model})
    prompt = config.prompt.model_copy(update={"system": system})
    config = config.model_copy(update={"prompt": prompt, "modes": modes})
    export.write(artifact, config, tmp_path / "x", "adapter")
    from transformers import AutoTokenizer

    exported = AutoTokenizer.from_pretrained(tmp_path / "x")
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    asked = {"role": "user", "content": "And 2 + 2?"}
    example = Example("", asked["content"], "", None, turns=(("1 + 1?", "2"),))
    for mode, own in itertools.product(MODES if modes else ("auto",), (None, "In French.")):
        trained_prompt = prompt.model_copy(update={"system": own or system})
        renderer = Renderer(tokenizer, prompt_under(trained_prompt, modes, mode))
        messages = [*([{"role": "system", "content": own}] if own else []), *turns, asked]
        named = {} if mode == "auto" else {"mode": mode}
        ids = exported.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **named)
        assert ids["input_ids"] == renderer.ids(renderer.prompt(asked["content"], example=example))
    with pytest.raises(Exception, match="mode is one of"):
        exported.apply_chat_template([asked], mode="quick")


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
    names = {path.name for path in (tmp_path / "hub").iterdir()}
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"} <= names
    for status, message, *options in (
        (69, "cannot push to mine: no token(.|\n)*hf auth", "--push", "mine"),
        (66, "sft is (missing|stale)", "--set", "sft.learning_rate=0.77"),  # stale if another test made it
        (78, "--target base: expected one of sft, rl", "--target", "base"),
    ):
        done = lorapar(*command, tmp_path / str(status), *options)
        assert done.code == status and re.search(f"^error: {message}", done.err, re.MULTILINE)
        assert (tmp_path / str(status)).exists() == (status == 69)


def test_serve_says_where_it_is_or_what_is_lacking(begun, trained, lorapar, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setattr("stages.engines.vllm.run_server", lambda *_: 0)
    sft = (*begun.home, *SETTINGS, "eval.targets=[sft]")
    for code, vllm, message, *options in (
        (78, None, "(?s)lorapar serve needs vLLM, which is not installed.*hint:"),
        (78, object(), "(?s)--host 0.0.0.0 would let anyone ask.*hint:", "--host", "0.0.0.0"),
        (66, object(), "(?s)sft is (missing|stale).*hint:", "--set", "sft.learning_rate=0.77"),
        (0, object(), r"vLLM, which says when smoke answers at http://\[::1\]:8000/v1;", "--host", "::1"),
    ):
        monkeypatch.setattr("importlib.util.find_spec", lambda n, spec=vllm: spec if n == "vllm" else find(n))
        done = lorapar("serve", ROOT / "configs/smoke.yaml", *flags(*sft), *options)
        assert done.code == code and re.search(message, done.err), done.err


def published(**sections: dict) -> Config:
    model = {"name": "org/m", "revision": "b" * 40} | sections.pop("model", {})
    return Config.model_validate({"model": model, **sections})


@pytest.fixture
def by_hand(tmp_path: Path) -> Artifact:
    """An artifact whose adapter is in this folder."""
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    manifest = {
        "key": "abc",
        "stage": "rl",
        "summary": {"active": 4, "elements": 10, "active_share": 0.4, "steps": 3},
        "identity": {"config": {"baseline": None, "lora": {"r": 8}, "rl": {"beta": 0.04, "prompt": {}}}},
        "provenance": {"versions": {"lorapar": "1"}, "dtype": "bfloat16"},
    }
    return Artifact(tmp_path, manifest)


def test_the_card_shows_all_results_with_intervals(by_hand, tmp_path):
    part = {"n": 1000, "accuracy": 0.276, "interval": [0.246, 0.306]}
    measured = {"all": part, "system2": part | {"n": 400}, "system1": {"n": 0, "accuracy": None}}
    (tmp_path / "metrics.json").write_text(json.dumps(measured))
    text = card(published(), by_hand, "adapter", tmp_path, [Artifact(tmp_path, {"variant": "rl@gsm8k"})])
    assert text.startswith("---\nbase_model: org/m\n")
    assert f'from_pretrained("org/m", revision="{"b" * 40}"' in text
    assert r"| rl on gsm8k, all | 27.6 \[24.6, 30.6\] | 1000 |" in text
    assert r"| rl on gsm8k, System 2 | 27.6 \[24.6, 30.6\] | 400 |" in text and "8k, System 1" not in text
    assert "accuracy, %" not in card(published(), by_hand, "adapter", tmp_path)


def test_the_card_names_what_it_is_and_what_it_was_trained_on(by_hand, tmp_path):
    text = card(published(partition={"beta": 1}), by_hand, "adapter", tmp_path)
    assert "# m after LoRA-PAR\n" in text and "| partition.theta | 0.9 |" in text
    assert "| partition.beta | 1.0 |" in text and "| rl.beta | 0.04 |" in text and "rl.prompt" not in text
    assert "| elements trained | 4 of 10 (40.0%) |" in text and "to the bit" in text
    assert "--lora-modules default=. --max-loras 1 --max-lora-rank 8" in text
    for strategy, title in (("all", "LoRA"), ("random", "LoRA-PAR (random)")):
        text = card(published(partition={"strategy": strategy}), by_hand, "adapter", tmp_path)
        assert f"# m after {title}\n" in text
    assert "4 bits" not in card(published(), by_hand, "merged", tmp_path)


def test_the_card_of_a_base_in_4_bits(by_hand, tmp_path):
    quantized = published(model={"load_in_4bit": True})
    adapter, merged = (card(quantized, by_hand, form, tmp_path) for form in ("adapter", "merged"))
    assert "api_server" not in adapter and "api_server --model . " in merged
    assert "--served-model-name default\n" in merged
    assert "load_in_4bit=True" in adapter and "load_in_4bit" not in merged.partition("| learned")[0]
    assert "| base in | NF4, bfloat16 |" in adapter
    assert "Trained and evaluated on the base in 4 bits" in merged and "to the bit" not in merged
