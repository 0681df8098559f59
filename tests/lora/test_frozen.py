"""Frozen elements, read back from the files: every launcher, optimizer and objective.

And what several processes agree on.
"""

import sys

import pytest
import torch
from conftest import ROOT, flags, make_step
from results import stored, trained_weights

from stages.lora.importance.masks import read_importance

COMMON = ["{}.weight_decay=0.1", "{}.learning_rate=0.01", "{}.max_steps=3", "{}.num_train_epochs=9"]
BOTH = [
    "rl.system1_share=0.25",
]
"""Steps of both systems, in which groups are drawn again."""


PAIR = torch.cuda.device_count() != 1
"""Two processes can run: on a GPU each needs one of its own."""
pair = pytest.mark.skipif(not PAIR, reason="two processes need two devices")


def settings(stage: str, *more: str) -> list[str]:
    return [text.format(stage) for text in (*COMMON, *more)]


def staged(stage: str, settings: list[str]) -> list[str]:
    config = str(ROOT / "configs/smoke.yaml")
    return [sys.executable, "-m", "lorapar_cli", stage, config, *flags(*settings), "--force"]


def made_by(small, overrides: list[str], stage: str, processes: int, backend: str = "ddp") -> None:
    """By the command, or where there is one process in this one, which has its libraries already."""
    config = small(*overrides)
    if processes == 1:
        make_step(config, stage, force=True)
    else:
        done = command(small.home, overrides, stage, processes, backend)
        assert done.returncode == 0, done.stderr
    assert stored(config, stage).manifest["provenance"]["processes"] == processes


@pair
@pytest.mark.slow
def test_two_processes_train_what_one_does(own):
    """SFT without dropout: the same rows in each step, so the same adapter to float tolerance; and scores."""
    changes = settings("sft", "sft.lora_dropout=0", "sft.learning_rate=0.001")
    config = own(*changes)
    ends, scores = [], []
    for processes in (1, 2):
        for stage in ("score", "sft"):
            if stage == "sft":
                make_step(config, "partition")
            made_by(own, changes, stage, processes)
        scores.append(read_importance(stored(config, "score").path / "importance.safetensors"))
        before, after, _ = trained_weights(config, "sft")
        ends.append({name: after[name] - before[name] for name in before})
    one, two = (torch.cat([x.flatten() for x in end.values()]) for end in ends)
    apart = float((one - two).norm() / one.norm())
    s1, s2 = (torch.cat([t.flatten() for part in s.values() for t in part.values()]) for s in scores)
    apart_scores = float((s1 - s2).norm() / s1.norm())
    assert float(one.norm()) > 0 and apart < 1e-3 and apart_scores < 1e-5


@pair
@pytest.mark.slow
def test_an_error_of_one_process_is_the_command_s(own):
    done = command(own.home, ["sft.batch_size=6", "sft.per_device_train_batch_size=2"], "sft", 2)
    assert done.returncode == 78
    assert done.stderr.rstrip().splitlines()[-2:] == [
        "error: 2 processes with micro batches of 2 cannot share 6 samples a step evenly",
        "  hint: lower per_device_train_batch_size or the number of processes",
    ]
