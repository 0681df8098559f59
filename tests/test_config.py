import operator
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


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, list(overrides))
    return str(caught.value)


PAPER = {
    "lora": {"r": 8, "lora_alpha": 64, "init": "normal", "compensated": False},
    "lora.target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
    "data": {"max_length": 512, "too_long": "truncate"},
    "classify": {"strategy": "vote", "rule": "majority", "quorum": 0.5, "min_agreement": 0},
    "score": {"scorer": "taylor2", "examples": 100, "batch_size": 8},
    "partition": {"strategy": "importance", "theta": 0.9, "alpha": 1, "beta": 1},
    "sft": {
        "rounds": 1, "start_from": "init", "data": "system1", "system2_share": 0, "system1_targets": "full",
        "num_train_epochs": 1, "max_steps": None, "batch_size": 32, "learning_rate": 2e-4,
        "lr_scheduler_type": "cosine", "warmup_ratio": 0.03, "weight_decay": 0,
        "max_grad_norm": 1, "lora_dropout": 0.05,
    },
    "rl": {
        "start_from": "sft", "data": "system2", "system1_share": 0, "prompts_per_step": 32,
        "num_generations": 8,
        "num_train_epochs": 1, "max_steps": None, "max_prompt_length": 128, "max_completion_length": 256,
        "too_long": "truncate_left", "temperature": 0.9, "top_k": 50, "beta": 0.04, "kl_reference": "base",
        "loss_type": "grpo", "learning_rate": 5e-6, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1,
        "weight_decay": 0.1, "max_grad_norm": 0.1, "lora_dropout": 0,
    },
}  # fmt: skip
"""What the paper and its script state; the presets name what differs from the defaults."""


@pytest.mark.parametrize("path", sorted((ROOT / "configs/paper").glob("*.yaml")), ids=lambda p: p.stem)
def test_paper_configs_have_the_paper_s_values(path):
    config = load(path)
    for name, wanted in PAPER.items():
        section = operator.attrgetter(name)(config)
        if isinstance(wanted, dict):
            section = {key: getattr(section, key) for key in wanted}
        assert section == wanted
    templates = [section.prompt.template for section in (config.score, config.sft, config.rl)]
    assert templates == ["bare", "bare", "chat"] and config.seed == 41


PRESETS = sorted(path for name in ("paper", "gpu") for path in (ROOT / "configs" / name).rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_is_valid_and_presets_pin_every_model_and_data_set_to_a_commit(path):
    config = load(path)
    if path not in PRESETS:
        return
    pinned = [config.model, config.data, *config.eval.benchmarks.values()]
    pinned += config.classify.voters if config.classify.strategy == "vote" else []
    assert all(re.fullmatch("[0-9a-f]{40}", source.revision) for source in pinned)


def test_a_config_over_another(tmp_path):
    """Sections merge, lists are replaced, the file's own settings win, and `--set` over both."""
    (tmp_path / "sub").mkdir()
    voters = "classify: {voters: [{persona: judge}, {persona: steps}]}\n"
    written(tmp_path, f"model: {{name: x}}\nsft: {{learning_rate: 1, num_train_epochs: 3}}\n{voters}")
    above = tmp_path / "sub/above.yaml"
    voters = "classify: {voters: [{persona: effort}]}\n"
    above.write_text(f"extends: ../config.yaml\nsft: {{learning_rate: 2}}\n{voters}")
    found = load(above, ["sft.num_train_epochs=5"])
    assert (found.sft.learning_rate, found.sft.num_train_epochs, found.sft.weight_decay) == (2, 5, 0)
    assert [voter.persona for voter in found.classify.voters] == ["effort"]
    above.write_text("extends: above.yaml\n")
    assert message(above) == f"{above} extends itself"
    assert message(written(tmp_path, "run: a\n")) == "model is missing"
    with pytest.raises(MissingInputError, match="no config file"):
        load(tmp_path / "none.yaml")


def test_false_takes_away_an_entry_of_the_extended_file(tmp_path):
    base = written(
        tmp_path,
        "model: {name: x}\nrl: {rewards: {correctness: 1, brief: .2}}\n"
        "eval: {benchmarks: {gsm8k: {}, mmlu: {}}}\n",
    )
    above = tmp_path / "above.yaml"
    above.write_text(
        f"extends: {base.name}\nrl: {{rewards: {{brief: false}}}}\neval: {{benchmarks: {{gsm8k: false}}}}\n"
    )
    found = load(above)
    assert found.rl.rewards == {"correctness": 1} and list(found.eval.benchmarks) == ["mmlu"]
    assert "at least 1 item" in message(above, "rl.rewards={correctness: false}")


VOTER = "classify.voters.0"
GSM8K = "eval.benchmarks.gsm8k"
MISTAKES = {
    "classify.voters=[{base_url: 'http://a/v1'}]": f"{VOTER}: base_url needs model, the name it",
    "classify.voters=[{engine: openai}]": f"{VOTER}: engine openai needs base_url",
    "classify.voters=[{engine: vllm, model: m, base_url: 'http://a/v1'}]": (
        f"{VOTER}: base_url is for engine openai, not vllm"
    ),
    "classify.voters=[{samples: 3}]": f"{VOTER}: 3 samples of a greedy voter are all the same",
    "classify.voters=[{revision: v1}]": f"{VOTER}: revision v1 needs model, and cannot be used with base_url",
    "classify.voters=[{person: judge}]": f"unknown setting {VOTER}.person (did you mean {VOTER}.persona?)",
    "classify.voters=[{model: m, base_url: 'ftp://x/'}]": "is not a URL: expected http",
    "classify.voters=[{model: m, base_url: 'https://me:secret@host/v1'}]": (
        "has a password in it, which artifacts and pages would show: use api_key_env"
    ),
    f"{GSM8K}.limt=3": f"unknown setting {GSM8K}.limt (did you mean {GSM8K}.limit?)",
    f"{GSM8K}.kind=gsm9k": f"{GSM8K}.kind: unknown benchmark 'gsm9k'; choose from: demo, gsm8k,",
    f"{GSM8K}.samples=4": f"{GSM8K}: samples 4 of a greedy answer are all the same; set temperature",
    f"{GSM8K}.kind=jsonl": "eval.benchmarks: gsm8k needs a path: a file or a hub id",
    f"{GSM8K}.mode=likelihood": "mode likelihood is for mmlu alone, got kind gsm8k",
    'rl.rewards_file="\\ud800"': "has half of a surrogate pair",
    "eval.benchmarks={train: {kind: demo}}": "eval.benchmarks: 'train' cannot be the name of a benchmark",
    "eval.targets=[sft3]": "eval.targets.0: ",
    "eval.engine=openai": "eval.engine: a remote server gives no tokens to grade",
    "partition.strategy=best": "partition.strategy: unknown strategy 'best'; choose from: all, importance,",
    "sft={batch_size: 10, per_device_train_batch_size: 4}": (
        "sft: per_device_train_batch_size 4 does not divide batch_size 10"
    ),
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
BASE = """
run: a
model: {name: x}
eval:
  # of which every setting is commented out
partition:
"""


@pytest.mark.parametrize(("override", "text"), MISTAKES.items(), ids=lambda text: text[:30])
def test_mistakes(tmp_path, override, text):
    path = written(tmp_path, BASE)
    assert load(path).run == "a"
    said = message(path, override)
    assert text in said and "constrained" not in said


def test_a_key_that_is_there_twice_is_refused_and_a_merged_one_is_not(tmp_path):
    text = (
        "model: {name: x}\nsft: {learning_rate: 0.1}\nrl: {num_train_epochs: 2}\nsft: {num_train_epochs: 3}\n"
    )
    path = written(tmp_path, text)
    assert message(path) == f"{path} is not YAML: 'sft' appears twice, in lines 2 and 4"
    merged = (
        "model: {name: x}\nsft: &train {learning_rate: 0.1, num_train_epochs: 2}\n"
        "rl: {<<: *train, num_train_epochs: 3}\n"
    )
    config = load(written(tmp_path, merged))
    assert (config.sft.num_train_epochs, config.rl.learning_rate, config.rl.num_train_epochs) == (2, 0.1, 3)


def test_a_benchmark_brings_its_settings_and_its_pinned_data(tmp_path):
    path = written(
        tmp_path,
        "model: {name: x}\neval: {benchmarks: {mmlu: {limit: 5}, own: {kind: mmlu, path: mine.jsonl}}}\n",
    )
    benchmarks = load(path).eval.benchmarks
    mmlu = benchmarks["mmlu"]
    assert (mmlu.path, mmlu.subset, mmlu.limit) == ("cais/mmlu", "all", 5)
    assert len(benchmarks["mmlu"].revision) == 40
    own = benchmarks["own"]
    assert (own.path, own.subset, own.revision) == ("mine.jsonl", None, "main")
    assert (own.shots, own.mode) == (5, "likelihood")


@pytest.mark.parametrize(
    ("text", "number"),
    [("9e-1", 0.9), ("1e3", 1000.0), ("-2.5E+3", -2500.0), (".5e1", 5.0), ("1.e2", 100.0), ("7", 7)],
)
def test_numbers_are_read_as_yaml_1_2_reads_them(tmp_path, text, number):
    """PyYAML, which has YAML 1.1, finds texts there, and no model says that a number is meant."""
    path = written(tmp_path, f"model: {{name: x}}\nserver: {{vllm: {{a: {text}}}}}\n")
    vllm = load(path, [f"server.vllm.b=[{text}]"]).server.vllm
    assert vllm == {"a": number, "b": [number]} and type(vllm["a"]) is type(number)
    assert load(path, ["seed=1e3", "sft.learning_rate=2e-4"]).seed == 1000
    for other in ("1e", "1e3x", "'1e3'"):
        assert load(path, [f"run={other}"]).run == other.strip("'")
    assert on_one_line(["1e3", 1e3]) == "['1e3', 1000.0]"


def test_identity_leaves_out_what_does_not_change_a_result(tmp_path):
    path = written(tmp_path, "model: {name: x}\n")
    one, two = load(path), load(path, ["score.batch_size=3", "model.name=y", "data.path=z"])
    for section in ("score", "model", "data"):
        assert cache_key_fields(getattr(one, section)) == cache_key_fields(getattr(two, section))
    assert cache_key_fields(one.score) != cache_key_fields(load(path, ["score.examples=3"]).score)


def test_annotated_defaults_are_the_defaults():
    text = "\n".join(annotated())
    tree = yaml.safe_load(text)
    tree["model"]["name"] = "x"
    assert Config.model_validate(tree) == Config.model_validate({"model": {"name": "x"}})
    lines = list(annotated(SftSection))
    names = [line.partition(":")[0] for line in lines if not line.startswith(" ")]
    common, advanced = names[: names.index("# advanced")], names[names.index("# advanced") + 1 :]
    assert {"learning_rate", "batch_size"} <= set(common) and {"weight_decay", "warmup_ratio"} <= set(
        advanced
    )


def test_an_override_of_one_place_leaves_others_that_share_it(tmp_path):
    """An alias is one object in several places, and so is a section below a merge key."""
    path = written(
        tmp_path,
        "model: {name: x}\nprompt: &p {template: plain, answer_format: hash}\n"
        "sft: {prompt: *p}\nrl: {prompt: *p}\n"
        "eval: {benchmarks: {a: &a {kind: demo, path: a, prompt: {template: plain}}, b: {<<: *a}}}\n",
    )
    found = load(path, ["rl.prompt.answer_format=xml", "eval.benchmarks.b.prompt.template=chat"])
    formats = [section.answer_format for section in (found.prompt, found.sft.prompt, found.rl.prompt)]
    assert formats == ["hash", "hash", "xml"]
    assert [found.eval.benchmarks[name].prompt.template for name in "ab"] == ["plain", "chat"]
