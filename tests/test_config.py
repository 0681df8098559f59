import re
from pathlib import Path

import pytest
import yaml
from conftest import CONFIGS, ROOT

from stages.config import Config, SftSection
from stages.config.fields import cache_key_fields
from stages.config.listing import annotated
from stages.config.yaml import on_one_line
from stages.errors import ConfigError, MissingInputError
from stages.pipeline.resolve import load


def written(tmp_path: Path, text: str, model: str = "model: {name: x}\n") -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(model + text, encoding="utf-8")
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, list(overrides))
    return str(caught.value)


PAPER = {
    "lora": {
        "r": 8, "lora_alpha": 64, "init": "normal", "compensated": False,
        "target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
    },
    "data": {"max_length": 512, "too_long": "truncate"},
    "classify": {"strategy": "vote", "quorum": 0.5, "min_agreement": 0},
    "score": {"scorer": "taylor2", "examples": 100, "batch_size": 8},
    "partition": {"strategy": "importance", "theta": 0.9, "alpha": 1, "beta": 1},
    "sft": {
        "start_from": "init", "data": "system1", "system2_share": 0, "system1_targets": "full",
        "num_train_epochs": 1, "max_steps": None, "batch_size": 32, "learning_rate": 2e-4,
        "lr_scheduler_type": "cosine", "warmup_ratio": 0.03, "weight_decay": 0,
        "max_grad_norm": 1, "lora_dropout": 0.05,
    },
    "rl": {
        "start_from": "sft", "data": "system2", "system1_share": 0,
        "prompts_per_step": 32, "num_generations": 8, "num_train_epochs": 1, "max_steps": None,
        "max_prompt_length": 128, "max_completion_length": 256,
        "too_long": "truncate_left", "temperature": 0.9, "top_k": 50, "beta": 0.04, "kl_reference": "base",
        "loss_type": "grpo", "learning_rate": 5e-6, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1,
        "weight_decay": 0.1, "max_grad_norm": 0.1, "lora_dropout": 0,
    },
}  # fmt: skip
"""What the paper and its script state; the presets name what differs from the defaults."""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_is_valid_and_presets_are_pinned_and_the_paper_s(path):
    config = load(path)
    if path.parent == ROOT / "configs/paper":
        for name, values in PAPER.items():
            section = getattr(config, name)
            assert {key: getattr(section, key) for key in values} == values
        templates = [section.prompt.template for section in (config.score, config.sft, config.rl)]
        assert templates == ["bare", "bare", "chat"] and config.seed == 41
    if {"paper", "gpu"} & set(path.parts):
        sources = [config.model, config.data, *config.eval.benchmarks.values()]
        sources += config.classify.voters if config.classify.strategy == "vote" else []
        assert all(re.fullmatch("[0-9a-f]{40}", source.revision) for source in sources)


def test_a_config_over_another(tmp_path):
    """Sections merge, lists are replaced, false takes an entry away, and `--set` wins over both files."""
    (tmp_path / "sub").mkdir()
    written(
        tmp_path,
        "sft: {learning_rate: 1, num_train_epochs: 3}\n"
        "classify: {voters: [{persona: judge}, {persona: steps}]}\n"
        "rl: {rewards: {correctness: 1, integer: .2}}\neval: {benchmarks: {gsm8k: {}, mmlu: {}}}\n",
    )
    above = tmp_path / "sub/above.yaml"
    above.write_text(
        "extends: ../config.yaml\nsft: {learning_rate: 2}\nclassify: {voters: [{persona: effort}]}\n"
        "rl: {rewards: {integer: false}}\neval: {benchmarks: {gsm8k: false}}\n"
    )
    config = load(above, ["sft.num_train_epochs=5"])
    assert (config.sft.learning_rate, config.sft.num_train_epochs, config.sft.weight_decay) == (2, 5, 0)
    assert [voter.persona for voter in config.classify.voters] == ["effort"]
    assert config.rl.rewards == {"correctness": 1} and list(config.eval.benchmarks) == ["mmlu"]
    assert "at least 1 item" in message(above, "rl.rewards={correctness: false}")
    above.write_text("extends: above.yaml\n")
    assert message(above) == f"{above} extends itself"
    assert message(written(tmp_path, "run: a\n", model="")) == "model is missing"
    with pytest.raises(MissingInputError, match="no config file"):
        load(tmp_path / "none.yaml")


VOTER = "classify.voters.0"
GSM8K = "eval.benchmarks.gsm8k"
MISTAKES = {
    "classify.voters=[{base_url: 'http://a/v1'}]": f"{VOTER}: base_url needs model, the name it",
    "classify.voters=[{engine: openai}]": f"{VOTER}: engine openai needs base_url",
    "classify.voters=[{engine: vllm, model: m, base_url: 'http://a/v1'}]": "base_url is for engine openai",
    "classify.voters=[{samples: 3}]": f"{VOTER}: 3 samples of a greedy voter are all the same",
    "classify.voters=[{revision: v1}]": f"{VOTER}: revision v1 needs model, and cannot be used with base_url",
    "classify.voters=[{person: judge}]": f"unknown setting {VOTER}.person (did you mean {VOTER}.persona?)",
    "sft.lr=1e-3": "unknown setting sft.lr (did you mean sft.learning_rate?)",
    "lr=1e-3": "unknown setting lr (did you mean sft.learning_rate or rl.learning_rate?)",
    "classify.voters=[{model: m, base_url: 'ftp://x/'}]": "is not a URL: expected http",
    "classify.voters=[{model: m, base_url: 'https://me:secret@host/v1'}]": "has a password in it",
    f"{GSM8K}.kind=gsm9k": f"{GSM8K}.kind: unknown benchmark 'gsm9k'; choose from: demo, gsm8k,",
    f"{GSM8K}.samples=4": f"{GSM8K}: samples 4 of a greedy answer are all the same; set temperature",
    f"{GSM8K}.kind=jsonl": f"{GSM8K}: path is missing: a file or a hub id",
    f"{GSM8K}.mode=likelihood": "mode likelihood is for mmlu alone, got kind gsm8k",
    'rl.rewards_file="\\ud800"': "has half of a surrogate pair",
    "eval.benchmarks={train: {kind: demo}}": "eval.benchmarks: 'train' cannot be the name of a benchmark",
    "eval.engine=openai": "eval: engine openai gives no tokens to grade",
    "sft={batch_size: 10, per_device_train_batch_size: 4}": "4 does not divide batch_size 10",
    "rl.rewards={correctness: 0, integer: 0.0}": "rl: rewards: every weight is 0",
    "rl={start_from: init, kl_reference: sft}": "rl: kl_reference sft goes with start_from sft",
    "sft=3": "sft: expected settings below it, got 3",
    "sft": "--set sft: expected section.key=value",
    "run.x.y=1": "--set run.x.y=1: run is a value, not a section",
    "rl.learning_rate=.nan": "rl.learning_rate: input should be a finite number, got nan",
    "seed=4294967296": "seed: at most 4294967295 in size",
    "server.vllm=&a {a: *a}": "server.vllm: expected text, numbers, lists and mappings",
    "server.vllm=" + "[" * 600 + "]" * 600: "is nested too deeply",
    "run=!!python/object/apply:os.system ['exit']": "is not YAML",
}
BASE = "run: a\neval:\n  # every setting is commented out\npartition:\n"


@pytest.mark.parametrize(("override", "text"), MISTAKES.items(), ids=lambda text: text[:30])
def test_mistakes(tmp_path, override, text):
    path = written(tmp_path, BASE)
    assert load(path).run == "a" and text in message(path, override)


def test_a_key_that_is_there_twice_is_refused_and_a_merged_one_is_not(tmp_path):
    path = written(tmp_path, "sft: {max_steps: 1}\nrl: {max_steps: 2}\nsft: {seed: 3}\n")
    assert message(path) == f"{path} is not YAML: 'sft' appears twice, in lines 2 and 4"
    merged = "sft: &a {learning_rate: 0.1, max_steps: 2}\nrl: {<<: *a, max_steps: 3}\n"
    config = load(written(tmp_path, merged))
    assert (config.sft.max_steps, config.rl.learning_rate, config.rl.max_steps) == (2, 0.1, 3)


def test_a_benchmark_brings_its_settings_and_its_pinned_data(tmp_path):
    text = "eval: {benchmarks: {mmlu: {limit: 5}, own: {kind: mmlu, path: mine.jsonl}}}\n"
    benchmarks = load(written(tmp_path, text)).eval.benchmarks
    mmlu, own = benchmarks["mmlu"], benchmarks["own"]
    assert (mmlu.path, mmlu.subset, mmlu.limit, len(mmlu.revision)) == ("cais/mmlu", "all", 5, 40)
    assert (own.path, own.subset, own.revision) == ("mine.jsonl", None, "main")
    assert (own.shots, own.mode) == (5, "likelihood")


def test_numbers_are_read_as_yaml_1_2_reads_them(tmp_path):
    """PyYAML, which has YAML 1.1, finds texts there, and no model says that a number is meant."""
    path = written(tmp_path, "server: {vllm: {a: 1e3}}\n")
    vllm = load(path, ["server.vllm.b=[9e-1, -2.5E+3, .5e1, 1.e2, 7]"]).server.vllm
    assert vllm == {"a": 1000, "b": [0.9, -2500, 5, 100, 7]}
    assert load(path, ["seed=1e3", "sft.learning_rate=2e-4"]).seed == 1000
    for text in ("1e", "1e3x", "'1e3'"):
        assert load(path, [f"run={text}"]).run == text.strip("'")
    assert on_one_line(["1e3", 1e3]) == "['1e3', 1000.0]"


def test_names_of_models_and_data_are_in_no_key(tmp_path):
    path = written(tmp_path, "")
    config, other = load(path), load(path, ["model.name=y", "data.path=z"])
    assert cache_key_fields(config.model) == cache_key_fields(other.model)
    assert cache_key_fields(config.data) == cache_key_fields(other.data)


def test_annotated_defaults_are_the_defaults():
    tree = yaml.safe_load("\n".join(annotated()))
    tree["model"]["name"] = "x"
    assert Config.model_validate(tree) == Config.model_validate({"model": {"name": "x"}})
    common, advanced = "\n".join(annotated(SftSection)).split("# advanced\n")
    assert "\nbatch_size:" in common and "\nweight_decay:" in advanced


def test_an_override_of_one_place_leaves_others_that_share_it(tmp_path):
    """An alias is one object in several places, and so is a section below a merge key."""
    path = written(
        tmp_path,
        "prompt: &p {template: plain, answer_format: hash}\n"
        "sft: {prompt: *p}\nrl: {prompt: *p}\n"
        "eval: {benchmarks: {a: &a {kind: demo, path: a, prompt: {template: plain}}, b: {<<: *a}}}\n",
    )
    found = load(path, ["rl.prompt.answer_format=xml", "eval.benchmarks.b.prompt.template=chat"])
    formats = [section.answer_format for section in (found.prompt, found.sft.prompt, found.rl.prompt)]
    assert formats == ["hash", "hash", "xml"]
    assert [found.eval.benchmarks[name].prompt.template for name in "ab"] == ["plain", "chat"]
