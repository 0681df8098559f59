"""Every command that README and the guide show, run in a folder like that of a person who follows them.

The model is a random one of two layers, and the config that `init` writes is made small. Commands whose block
says what they need (a GPU, a server, a cluster) are not run.
"""

import io
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Done
from guide import commands, own_reward

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
        done = lorapar(*words[1:])
        assert done.code == 0, (page, text, done.err[-1500:])
        if words[1] == "init":
            make_small(home / "rows.yaml")
    assert (home / "report/report.html").exists()
    assert (home / "adapter/README.md").exists()
