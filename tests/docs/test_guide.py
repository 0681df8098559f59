"""README and the guide: short, their links lead somewhere, their YAML is valid, their names exist.

Every command that they show is run in a folder like that of a person who follows them. The model is a random
one of two layers, and the config that `init` writes is made small. Commands whose block says what they need
(a GPU, a server, a cluster) are not run.
"""

import dataclasses
import io
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import reference
import yaml
from conftest import CONFIGS, ROOT, TABLES, Done, Small, make_steps
from guide import PAGES, README, anchors, blocks, commands, own_reward
from peft import LoraConfig
from trl import GRPOConfig, SFTConfig

from stages.config import Config
from stages.config.listing import json_schema, setting_names
from stages.pipeline.resolve import load
from stages.pipeline.stage import all_stages
from stages.pipeline.stage import stage as described
from stages.sweep.file import TableFile


def test_the_readme_is_one_page() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.count("\n") <= 100
    assert len(text.split()) <= 900


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_site() -> None:
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if f"- {page}\n" not in site] == []
    [shim] = yaml.safe_load(site)["extra"]["polyfills"]  # without it the search would load another host's
    assert "iframe-worker" in shim and (ROOT / "docs" / shim).is_file()


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: f"{block.page}-{block.text[:20]!r}")
def test_yaml_of_the_guide_is_valid(block, tmp_path: Path) -> None:
    if block.title == "slurm.yaml":  # the settings of submitit
        return
    settings = yaml.safe_load(block.text)
    if "title" in settings:
        assert list(TableFile.model_validate(settings).mistakes()) == []
        return
    (tmp_path / "rewards.py").write_text(own_reward(), encoding="utf-8")
    if "rewards_file" in settings.get("rl", {}):
        settings["rl"]["rewards_file"] = str(tmp_path / "rewards.py")
    if base := settings.get("extends"):
        (tmp_path / base).write_text("{}", encoding="utf-8")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"model": {"name": "model"}, **settings}), encoding="utf-8")
    load(path, [])


def test_settings_named_in_the_guide_exist() -> None:
    names = set(setting_names(Config))
    sections = set(Config.model_fields)
    names |= {"rl.group", "rl.max_step"}  # in errors.md: an old name, and a typing error
    for page in PAGES:
        for name in re.findall(r"`([a-z0-9_]+(?:\.[a-z0-9_]+)+)[`:]", page.read_text(encoding="utf-8")):
            if name.split(".")[0] in sections and not name.endswith((".py", ".yaml")):
                assert name in names, page.name


def test_names_of_other_libraries_exist() -> None:
    """The first column of `from-trl.md`, but for what is no field of a config class."""
    fields = {
        field.name for kind in (GRPOConfig, SFTConfig, LoraConfig) for field in dataclasses.fields(kind)
    }
    others = {"model_name_or_path", "dtype", "load_in_4bit", "dataset_name", "reward_funcs"}
    text = (ROOT / "docs/reference/from-trl.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    names = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert len(names) > 30
    assert [name for name in names if name not in fields | others] == []


def test_editors_know_every_config() -> None:
    schemas = {"config": json_schema(), "table": json_schema(TableFile)}
    validators = {kind: jsonschema.Draft202012Validator(schema) for kind, schema in schemas.items()}
    for path in (*CONFIGS, *TABLES):
        kind = "table" if path in TABLES else "config"
        first = path.read_text(encoding="utf-8").splitlines()[0]
        schema = path.parent / first.removeprefix("# yaml-language-server: $schema=")
        assert schema.resolve() == ROOT / f"docs/reference/{kind}.schema.json"
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        # YAML 1.1, which PyYAML reads, takes `on` for true; editors do not.
        text = json.dumps(content).replace('"true":', '"on":')
        validators[kind].validate(json.loads(text))


@pytest.mark.parametrize("wrong", [{"rl": {"max_step": 3}}, {"data": {"too_long": "cut"}}])
def test_editors_see_mistakes(wrong) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, json_schema())


def test_artifacts_have_the_files_that_the_reference_lists(begun: Small) -> None:
    missing = {
        stage.name: {name for name, text in stage.files.items() if "Only in" not in text}
        for stage in all_stages()
    }
    for name, (artifact, _) in make_steps(begun()).items():
        stage = name.partition(":")[0]
        listed = {path.name + "/" * path.is_dir() for path in artifact.path.iterdir()} - {"manifest.json"}
        assert listed <= set(described(stage).files), name
        missing[stage] -= listed
        assert {field for row in reference.MANIFEST for field in row.split(", ")} <= set(artifact.manifest)
    assert not any(missing.values())


def test_every_command_is_run_or_says_what_it_needs() -> None:
    """Those without a title are run below."""
    rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for page, title, command in commands():
        program, *words = command.split()
        assert title.startswith(("needs ", "takes ")) or program in ("lorapar", "make"), (page, command)
        assert program != "make" or words[0] in rules, (page, command)


SMALL = yaml.safe_load("""
lora: {r: 4}
score: {examples: 4}
classify: {voters: [{persona: steps, engine: transformers, shots: 2}], system2_share: 0.5, accept_weak: true}
sft: {max_steps: 2, batch_size: 4, per_device_train_batch_size: 4}
rl: {max_steps: 1, prompts_per_step: 2, num_generations: 2, per_device_train_batch_size: 4,
     max_completion_length: 8}
""")


@pytest.fixture
def home(tiny: Path, demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a person: rows, labels and a reward of their own beside lorapar's configs."""
    for name, rows in (("rows", "train"), ("test", "test")):
        lines = (demo_data / f"{rows}.jsonl").read_text(encoding="utf-8").splitlines()[:48]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    questions = [yaml.safe_load(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    labels = [f'"{row["question"]}",{row["intended"]}' for row in questions]
    (tmp_path / "labels.csv").write_text("\n".join(["question,system", *labels]) + "\n", encoding="utf-8")
    (tmp_path / "rewards.py").write_text(own_reward(), encoding="utf-8")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copy(ROOT / "configs/smoke.yaml", tmp_path / "configs/demo.yaml")
    (tmp_path / "models").symlink_to(tiny.parent)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/demo").symlink_to(demo_data)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("How many?\n"))  # what a person types to `lorapar ask`
    return tmp_path


def make_small(path: Path) -> None:
    """Put the settings of SMALL into the config that `init` wrote."""
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    for section, changes in SMALL.items():
        settings[section] = {**settings.get(section, {}), **changes}
    for benchmark in settings["eval"]["benchmarks"].values():
        benchmark |= {"limit": 8, "max_new_tokens": 8}
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")


@pytest.mark.slow
def test_commands_of_readme_and_guide(home: Path, tiny: Path, lorapar: Callable[..., Done]) -> None:
    typed = [(page, text) for page, title, text in commands() if not title]
    assert len(typed) > 35
    for text, page in dict((text, page) for page, text in typed).items():
        words = [str(tiny) if "/SmolLM2" in word else word for word in shlex.split(text)]
        if words[0] == "make":
            shown = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
            assert shown.returncode == 0, (page, text, shown.stderr)
            continue
        if "other.yaml" in words:  # a second run, with RL of its own
            (home / "other.yaml").write_text(
                "extends: rows.yaml\nrl: {learning_rate: 1.0e-4}\n", encoding="utf-8"
            )
            assert lorapar("run", "other.yaml").code == 0
        done = lorapar(*words[1:])
        assert done.code == 0, (page, text, done.err[-1500:])
        if words[1] == "init":
            make_small(home / "rows.yaml")
    assert (home / "report/report.html").exists()
    assert (home / "adapter/README.md").exists()
