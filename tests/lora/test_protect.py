"""Rows whose skill is to stay: no stage trains the elements that they need."""

import pytest
import torch
from results import artifacts

from stages.errors import UnusableResult
from stages.lora.adapter import adapter
from stages.lora.importance.masks import Masks, flatten_weights, read_importance
from stages.lora.importance.strategies import needed_set
from stages.pipeline.resolve import resolved
from stages.pipeline.steps import plan_steps
from stages.plan.preflight import problems
from stages.plan.texts import Texts

QUICK = ("rl.max_steps=2", "sft.max_steps=2", "score.examples=4", "partition.strategy=all")


@pytest.fixture
def old(demo_data, tmp_path) -> str:
    """A setting that names 12 rows to protect."""
    lines = (demo_data / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "old.jsonl").write_text("".join(lines[60:72]), encoding="utf-8")
    return f"partition.protect={tmp_path / 'old.jsonl'}"


def test_a_protected_element_is_the_same_to_the_bit_after_both_stages(begun, old):
    steps = artifacts(begun(*QUICK, old), "score", "partition", "sft", "rl")
    importance = read_importance(steps["score:protected"].path / "importance.safetensors")
    assert list(importance) == ["protected"]
    needed = needed_set(flatten_weights(importance["protected"]), 0.9, "the protected rows")
    start = flatten_weights(adapter.read(steps["score"].adapter))
    for stage in ("sft", "rl"):
        end = flatten_weights(adapter.read(steps[stage].adapter))
        assert torch.equal(start[needed], end[needed])
        active = Masks.load(steps[f"partition:{stage}"].path, stage).active
        assert torch.equal(flatten_weights(active), ~needed)
        assert steps[f"partition:{stage}"].manifest["summary"]["protected"] == int(needed.sum())
    assert (start != end)[~needed].float().mean() > 0.9


def test_keys_change_with_the_rows_and_the_share(begun, old):
    plain, ours, less = (
        plan_steps(resolved(begun(*more))) for more in ((), (old,), (old, "partition.protect_theta=0.5"))
    )
    assert plain["score"].key == ours["score"].key and "score:protected" not in plain
    assert ours["score:protected"].key == less["score:protected"].key
    assert len({steps["partition:sft"].key for steps in (plain, ours, less)}) == 3


def test_errors_of_the_file_and_of_too_large_a_share(begun, smoke, old, tmp_path):
    with pytest.raises(UnusableResult, match="no element is active in sft") as caught:
        artifacts(begun(*QUICK, old, "partition.protect_theta=1"), "score", "partition:sft")
    assert "lower partition.protect_theta" in str(caught.value.hint)
    (tmp_path / "old.jsonl").write_text('{"question": "1 + 1?", "gold": "2"}\n', encoding="utf-8")
    config = resolved(smoke(old))
    [problem] = problems(Texts(config), list(plan_steps(config).values()))
    assert problem.startswith("score:protected: ")
