"""Killed at any optimizer step, the same command ends in the same bytes."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import make_step

from stages.lora.adapter import adapter, baselines
from stages.lora.training.health import ProgressCallback
from stages.store import checkpoints
from stages.store.checkpoints import Checkpoints
from stages.store.digests import sha256_file

STEPS = 6
# 16 rows and 8 a step: two steps an epoch and more; accumulation 2, dropout, weight decay; half is warm-up.
SFT = [
    "sft.max_steps=6", "sft.num_train_epochs=9", "sft.lora_dropout=0.05",
    "sft.system2_share=0", "sft.save_steps=1",
    "sft.warmup_ratio=0.5",
]  # fmt: skip
RL = [
    "rl.start_from=init",
    "rl.max_steps=6",
    "rl.num_train_epochs=9",
    "rl.lora_dropout=0.05",
    "rl.save_steps=1",
    "rl.warmup_ratio=0.5",
]
SHARED = [*RL, "rl.lora_dropout=0"]  # with dropout no completion shares its prompt
MIXED = [
    *SHARED,
    "rl.system1_share=0.25",
    "rl.dynamic_sampling=2",
    "rl.kl_probe_prompts=4",
    "rl.kl_probe_steps=2",
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def in_a_child(config, stage: str, kill_at: int | None) -> int:
    """Run the stage in another process, killed at the end of optimizer step `kill_at`; its exit code."""
    how = "spawn" if torch.cuda.is_available() else "fork"  # a fork is quick, and no GPU survives it
    child = multiprocessing.get_context(how).Process(target=_make, args=(config, stage, kill_at))
    child.start()
    child.join()
    return child.exitcode


def _make(config, stage: str, kill_at: int | None) -> None:
    usual = ProgressCallback.on_step_end

    def on_step_end(self, args, state, control, **rest):
        if state.global_step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return usual(self, args, state, control, **rest)

    ProgressCallback.on_step_end = on_step_end
    torch.set_num_threads(1)
    make_step(config, stage)


def untimed(folder: Path) -> list[dict]:
    """The history of a run without what only a clock knows."""
    return [
        {k: v for k, v in row.items() if "time" not in k and "per_second" not in k}
        for row in json.loads((folder / "history.json").read_text())
    ]


def killed_at(config, stage: str, steps: list[int], monkeypatch, file: str = adapter.ADAPTER) -> str:
    """Undisturbed once, then killed at each of the steps and run again.

    Asserts equal bytes of `file` and equal losses.
    """
    home = config.root / stage
    shutil.rmtree(home, ignore_errors=True)
    if stage == "rl" and config.rl.start_from == "sft":
        assert in_a_child(config, "sft", None) == 0
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "SAVE_TOTAL_LIMIT", 99)
        patch.setattr(checkpoints.Checkpoints, "clear", lambda self: None)
        assert in_a_child(config, stage, None) == 0
    artifact = (home / "latest").resolve()
    wanted, history = sha256_file(artifact / "adapter" / file), untimed(artifact)
    if stage == "rl" and config.rl.dynamic_sampling:
        assert sum(step["resampled/groups"] for step in history) > 0
    passed = {sha256_file(path) for path in home.glob(f"checkpoints/*/checkpoint-*/{file}")}
    assert len(passed | {wanted}) == len(list(home.glob("checkpoints/*/checkpoint-*"))) + 1 > 2, (
        "training moved nothing"
    )
    same = 0
    for step in steps:
        shutil.rmtree(home)
        assert in_a_child(config, stage, step) == -signal.SIGKILL
        kept = sorted(path.name for path in home.glob("checkpoints/*/checkpoint-*"))
        assert len(kept) <= 2, kept
        assert in_a_child(config, stage, None) == 0
        again = (home / "latest").resolve()
        assert untimed(again) == history
        assert not list(home.glob("checkpoints/*/*"))
        same += sha256_file(again / "adapter" / file) == wanted
    assert same == len(steps)
    return f"{stage}: killed at {len(steps)} steps, {same} byte-identical"


@pytest.mark.parametrize(
    ("stage", "settings"),
    [("sft", SFT), ("sft", [*SFT, "sft.padding_free=off"]), ("rl", RL), ("rl", SHARED), ("rl", MIXED)],
    ids=["sft", "sft padded", "rl", "rl with shared prompts", "rl of both systems"],
)
def test_a_kill_in_mid_epoch_changes_no_byte(own, stage, settings, monkeypatch):
    killed_at(own(*SFT, *settings), stage, [3], monkeypatch)


@pytest.mark.parametrize(
    "method", ["p_tuning", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ia3", "dora"))]
)
def test_a_baseline_goes_on_as_exactly(own, method, monkeypatch):
    config = own(*SFT, f"baseline.method={method}", "baseline.encoder_hidden=16", "eval.targets=[sft]")
    killed_at(config, "sft", [3], monkeypatch, baselines.STATE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("sft", SFT),
        ("sft", [*SFT, "sft.save_steps=2"]),
        ("rl", [*RL, "rl.beta=0"]),
        ("rl", [*RL, "rl.beta=0.04", "rl.start_from=sft", "rl.kl_reference=sft"]),
        ("rl", [*RL, "rl.num_iterations=2"]),
        ("sft", [*SFT, "sft.lora_dropout=0"]),
        ("sft", [*SFT, "sft.padding_free=off"]),
        ("rl", [*SHARED, "rl.beta=0.04", "rl.num_iterations=2"]),
        ("rl", [*SHARED, "rl.prefix_sharing=off"]),
    ],
    ids=[
        "sft",
        "sft every 2",
        "rl beta 0",
        "rl beta 0.04",
        "rl 2 iterations",
        "sft with shared beginnings",
        "sft padded",
        "rl with shared prompts",
        "rl without",
    ],
)
def test_a_kill_at_every_step_changes_no_byte(own, stage, settings, monkeypatch, capsys):
    steps = list(range(1, STEPS + 1)) if "LORAPAR_THOROUGH" in os.environ else [4, 6]
    said = killed_at(own(*SFT, *settings), stage, steps, monkeypatch)
    with capsys.disabled():
        print(f"\n  {said}", end="")


@pytest.fixture
def two(tmp_path):
    """Two sealed checkpoints of the same inputs."""
    kept = Checkpoints(tmp_path, "a")
    for step in (5, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_text(f"weights of step {step}")
        kept.seal(folder)
    return kept


def test_the_newest_sealed_checkpoint_counts_and_two_are_kept(two, tmp_path):
    assert two.newest().name == "checkpoint-10"
    third = tmp_path / "checkpoint-15"
    third.mkdir()
    two.seal(third)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-15"]


@pytest.mark.parametrize(
    "harm", ["byte", "missing", "no seal", "torn seal", "empty list", "more", "deep seal"]
)
def test_a_checkpoint_that_is_not_whole_is_left_aside(two, tmp_path, harm):
    newest = tmp_path / "checkpoint-10"
    if harm == "byte":
        (newest / "weights").write_text("weights of step 11")
    elif harm == "missing":
        (newest / "weights").unlink()
    elif harm == "no seal":
        (newest / checkpoints.SEAL).unlink()
    elif harm == "empty list":
        (newest / checkpoints.SEAL).write_text('{"of": "a", "files": {}}')
    elif harm == "more":
        (newest / "optimizer.json").write_text("{}")
    elif harm == "deep seal":
        (newest / checkpoints.SEAL).write_text("[" * 100_000)
    else:
        (newest / checkpoints.SEAL).write_text('{"of": "a", "fi')
    assert two.newest().name == "checkpoint-5"
    assert (tmp_path / "checkpoint-10.incomplete").is_dir()


def test_checkpoints_of_other_inputs_are_never_used(two, tmp_path):
    assert Checkpoints(tmp_path, "b").newest() is None
