"""Killed at any optimizer step, the same command ends in the same bytes."""

import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_step, start_method
from results import untimed
from torch.utils.data import RandomSampler

from stages.errors import ConfigError
from stages.lora.adapter import adapter, baselines
from stages.lora.grpo.prompts import EpochSeededSampler
from stages.lora.training import curves, loop
from stages.lora.training.health import ProgressCallback
from stages.store import checkpoints
from stages.store.checkpoints import Checkpoints
from stages.store.digests import sha256_file

STEPS = 6
WHOLE = "undisturbed"
# 16 rows and 8 a step: two steps an epoch and more; accumulation 2, dropout, weight decay; half is warm-up.
SFT = [
    "sft.max_steps=6", "sft.num_train_epochs=9", "sft.lora_dropout=0.05", "sft.system2_share=0",
    "sft.save_steps=1", "sft.warmup_ratio=0.5",
]  # fmt: skip
RL = [
    "rl.start_from=init", "rl.max_steps=6", "rl.num_train_epochs=9", "rl.lora_dropout=0.05",
    "rl.save_steps=1", "rl.warmup_ratio=0.5",
]  # fmt: skip
SHARED = [*RL, "rl.lora_dropout=0"]  # with dropout no completion shares its prompt
MIXED = [*SHARED, "rl.system1_share=0.25"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def in_a_child(config, stage: str, *runs: tuple[int | None, Path | None]) -> int:
    """Make the stage once for each of `runs` in another process; its exit code. For `runs` see `_make`."""
    child = multiprocessing.get_context(start_method()).Process(target=_make, args=(config, stage, runs))
    child.start()
    child.join()
    return child.exitcode


def _make(config, stage: str, runs: tuple[tuple[int | None, Path | None], ...]) -> None:
    """Make the stage again and again, and what it starts from.

    runs: the optimizer step at whose end this process is killed, and the folder to which the run is moved if
    it is not. A run of the folder WHOLE keeps all of its checkpoints.
    """
    usual, clear, limit = ProgressCallback.on_step_end, Checkpoints.clear, checkpoints.SAVE_TOTAL_LIMIT
    torch.set_num_threads(1)
    curves.draw = lambda history, path: path.write_bytes(b"")
    if stage == "rl" and config.rl.start_from == "sft":
        make_step(config, "sft")
    for kill_at, folder in runs:

        def on_step_end(self, args, state, control, *, at=kill_at, **rest):
            if state.global_step == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return usual(self, args, state, control, **rest)

        keeps = folder is not None and folder.name == WHOLE
        ProgressCallback.on_step_end = on_step_end
        Checkpoints.clear = (lambda self: None) if keeps else clear
        checkpoints.SAVE_TOTAL_LIMIT = 99 if keeps else limit
        make_step(config, stage)
        (config.root / stage).rename(folder)


# What goes wrong with RL or SHARED goes wrong with MIXED, too, which has all of it and more.
QUICK = [("sft", SFT), ("rl", MIXED)]
SLOW = [
    ("sft", ["sft.save_steps=2"]), ("sft", ["sft.lora_dropout=0"]),
    ("sft", ["eval.targets=[sft]", "baseline.method=p_tuning"]), ("rl", [*RL, "rl.beta=0"]),
    ("rl", [*RL, "rl.beta=0.04", "rl.start_from=sft", "rl.kl_reference=sft"]),
    ("rl", [*SHARED, "rl.beta=0.04"]), ("rl", [*SHARED, "rl.prefix_sharing=off"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "settings", "steps"),
    [
        *((*case, [3]) for case in QUICK),
        *(pytest.param(*case, [4, 6], marks=pytest.mark.slow) for case in SLOW),
    ],
    ids=lambda value: value if isinstance(value, str) else value[-1],
)
def test_a_kill_at_any_step_changes_no_byte(own, stage, settings, steps, tmp_path):
    """Undisturbed once, then killed at each of the steps and run again, in one process more than steps.

    A process that has made what it should begins the next run, which is killed.
    """
    file = baselines.STATE if "baseline" in settings[-1] else adapter.ADAPTER
    steps = list(range(1, STEPS + 1)) if "LORAPAR_THOROUGH" in os.environ else steps
    config = own(*SFT, *settings)
    home = config.root / stage
    shutil.rmtree(home, ignore_errors=True)
    whole = tmp_path / WHOLE
    assert in_a_child(config, stage, (None, whole), (steps[0], None)) == -signal.SIGKILL
    artifact = (whole / "latest").resolve()
    wanted, history = sha256_file(artifact / "adapter" / file), untimed(artifact)
    saved = list(whole.glob("checkpoints/*/checkpoint-*"))
    passed = {sha256_file(path / file) for path in saved}
    assert len(passed | {wanted}) == len(saved) + 1 > 2, "training moved nothing"
    first_saved = min(int(path.name.removeprefix("checkpoint-")) for path in saved)
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        kept = sorted(path.name for path in home.glob("checkpoints/*/checkpoint-*"))
        # It is killed before the checkpoint of that step is written.
        assert bool(kept) == (step > first_saved) and len(kept) <= 2, kept
        again = tmp_path / f"killed at {step}"
        ended = in_a_child(config, stage, (None, again), *([(following, None)] if following else []))
        assert ended == (-signal.SIGKILL if following else 0)
        artifact = (again / "latest").resolve()
        assert untimed(artifact) == history
        assert not list(again.glob("checkpoints/*/*"))
        assert sha256_file(artifact / "adapter" / file) == wanted


def test_each_seed_and_epoch_has_an_order_of_its_own():
    def order(seed: int, epoch: float) -> list[int]:
        trainer = SimpleNamespace(state=SimpleNamespace(epoch=epoch), args=SimpleNamespace(seed=seed))
        rows = RandomSampler(range(99), generator=torch.Generator())
        return list(EpochSeededSampler(rows, trainer))

    assert len({tuple(order(seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16
    assert order(3, 1.9999999) == order(3, 2)


@pytest.fixture
def two(tmp_path):
    """Two sealed checkpoints of the same inputs."""
    kept = Checkpoints(tmp_path, "a")
    for step in (5, 10):
        seal(kept, step)
    return kept


def seal(kept: Checkpoints, step: int) -> None:
    folder = kept.folder / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "weights").write_text(f"weights of step {step}")
    kept.seal(folder)


def test_the_newest_sealed_checkpoint_counts_and_two_are_kept(two, tmp_path):
    assert two.newest().name == "checkpoint-10"
    seal(two, 15)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-15"]
    assert Checkpoints(tmp_path, "b").newest() is None  # those of other inputs are never used


@pytest.mark.parametrize(
    "harm",
    [
        ("weights", "weights of step 11"), ("weights", None), ("optimizer.json", "{}"),
        (checkpoints.SEAL, None), (checkpoints.SEAL, '{"of": "a", "fi'),
        (checkpoints.SEAL, '{"of": "a", "files": {}}'), (checkpoints.SEAL, "[" * 100_000),
    ],
    ids=["byte", "missing", "more", "no seal", "torn seal", "empty list", "deep seal"],
)  # fmt: skip
def test_a_checkpoint_that_is_not_whole_is_left_aside(two, tmp_path, harm):
    newest = tmp_path / "checkpoint-10"
    file, content = harm
    if content is None:
        (newest / file).unlink()
    else:
        (newest / file).write_text(content)
    (tmp_path / "checkpoint-5/.optimizer.json.swp").touch()  # an editor's, which harms nothing
    assert two.newest().name == "checkpoint-5"
    assert (tmp_path / "checkpoint-10.incomplete").is_dir()


def test_a_forced_build_clears_what_was_there_and_goes_on_with_its_own(two, tmp_path):
    two.start_over()
    assert two.newest() is None
    seal(two, 3)
    Checkpoints(tmp_path, "a").start_over()
    assert two.newest().name == "checkpoint-3"
    others = Checkpoints(tmp_path, "a", {"processes": "4"})
    others.start_over()
    assert others.newest() is None
    seal(others, 3)
    others.end_forced_build()  # what a kill leaves after this is of a build that is done
    others.start_over()
    assert others.newest() is None


def test_a_checkpoint_of_other_conditions_is_named_and_kept(tmp_path):
    ours = Checkpoints(tmp_path, "a", {"processes": "2", "dtype": "bfloat16"})
    seal(ours, 5)
    theirs = Checkpoints(tmp_path, "a", {"processes": "4", "dtype": "bfloat16"})
    with pytest.raises(ConfigError, match="made with processes 2, dtype bfloat16, .* has processes 4, dtype"):
        theirs.newest()
    assert ours.newest() == tmp_path / "checkpoint-5"


def test_slow_steps_are_saved_one_by_one(own, monkeypatch):
    """After SAVE_S without a checkpoint comes one."""
    sealed, usual = [], Checkpoints.seal
    monkeypatch.setattr(Checkpoints, "seal", lambda self, path: sealed.append(path.name) or usual(self, path))
    config = own("sft.max_steps=2", "sft.num_train_epochs=9", "sft.save_steps=25")
    usual_adapter = sha256_file(make_step(config, "sft").adapter / adapter.ADAPTER)
    assert sealed == []
    monkeypatch.setattr(loop, "SAVE_S", -1.0)
    forced = make_step(config, "sft", force=True)
    assert sealed == ["checkpoint-1", "checkpoint-2"]
    assert sha256_file(forced.adapter / adapter.ADAPTER) == usual_adapter
