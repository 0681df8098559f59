"""Rows whose skill is to stay: what they need is trained by no stage, and what they lose is measured."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_step, make_steps, once
from results import artifacts, history

from stages.config import ScoreSection
from stages.errors import DataError, MissingInputError, UnusableResult
from stages.lora import examples
from stages.lora.adapter import adapter
from stages.lora.importance.masks import Masks, flatten_weights, read_importance
from stages.lora.importance.strategies import needed_set
from stages.lora.training import protected_kl
from stages.lora.training.curves import PROTECTED_KL
from stages.models.base import load_base
from stages.models.tokenizer import load_tokenizer
from stages.packing import losses
from stages.pipeline.resolve import resolved
from stages.pipeline.steps import plan_steps
from stages.plan.preflight import problems
from stages.prompts.renderer import IGNORED, Renderer
from stages.records import read_labels, read_samples
from stages.report import comparison

QUICK = ["rl.max_steps=2", "sft.max_steps=3", "score.examples=4", "rl.kl_probe_steps=1"]


@pytest.fixture(scope="session")
def old(demo_data: Path, common_folder: Path) -> str:
    """A setting that names 12 rows to protect."""
    lines = (demo_data / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    path = once(common_folder / "old.jsonl", lambda file: file.write_text("".join(lines[60:72])))
    return f"partition.protect={path}"


def test_keys_change_with_the_rows_and_not_without_them(begun, old, tmp_path):
    plain, no_rows, now = (
        plan_steps(resolved(begun(*more))) for more in ((), ("partition.protect_theta=0.5",), (old,))
    )
    assert {name: step.key for name, step in plain.items()} == {n: step.key for n, step in no_rows.items()}
    differ = [name for name in now if name not in plain or now[name].key != plain[name].key]
    assert [name for name in differ if not name.startswith("eval")] == [
        "score:protected", "partition:sft", "partition:rl", "sft", "rl",
    ]  # fmt: skip
    (tmp_path / "other.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n', encoding="utf-8")
    other = plan_steps(resolved(begun(f"partition.protect={tmp_path / 'other.jsonl'}")))
    assert other["score:protected"].key != now["score:protected"].key
    less = plan_steps(resolved(begun(old, "partition.protect_theta=0.5")))
    assert less["score:protected"].key == now["score:protected"].key
    assert less["partition:sft"].key != now["partition:sft"].key


def test_a_protected_element_is_the_same_to_the_bit_after_both_stages(begun, old):
    config = begun(*QUICK, old, "partition.strategy=all")
    made = artifacts(config, "score", "partition", "sft", "rl")
    scored = made["score:protected"]
    summary = scored.manifest["summary"]
    assert summary["protected"]["examples"] == 4
    assert summary["held_out"] == 3 and "without_response" not in summary
    assert not (scored.path / "init").exists()
    importance = read_importance(scored.path / "importance.safetensors")["protected"]
    needed = needed_set(flatten_weights(importance), 0.9, "the protected rows")
    start = flatten_weights(adapter.read(made["score"].adapter))
    for stage in ("sft", "rl"):
        end = flatten_weights(adapter.read(made[stage].adapter))
        assert torch.equal(start[needed], end[needed])
        active = Masks.load(made[f"partition:{stage}"].path / "masks.safetensors", stage).active
        assert torch.equal(flatten_weights(active), ~needed)
        summary = made[f"partition:{stage}"].manifest["summary"]
        assert summary["protected"] == int(needed.sum()) == summary["elements"] - summary["active"]
    assert (start != end)[~needed].float().mean() > 0.9


def test_drift_by_hand_after_every_second_step_and_the_last(monkeypatch):
    """Of p = (1/2, 1/2) at the start and q = (9/10, 1/10) now: Σ p log p/q, and not the other way round."""
    start, policy = (torch.tensor([p]).log() for p in ([0.5, 0.5], [0.9, 0.1]))
    assert protected_kl._divergence(start, policy) == pytest.approx(0.5108, abs=1e-4)
    trainer = SimpleNamespace(_metrics={"train": {PROTECTED_KL: []}})
    watch = protected_kl.ProtectedKl(trainer, None, [], 2)
    monkeypatch.setattr(watch, "divergence", lambda: state.global_step)
    for step in (1, 2, 3):
        state = SimpleNamespace(global_step=step, max_steps=3)
        watch.on_step_end(None, state, None)
    assert trainer._metrics["train"][PROTECTED_KL] == [2, 3]


@pytest.mark.slow
def test_drift_is_logged_and_changes_no_result(begun, old):
    """With θ 0 masks and adapters are those of a run without protected rows, although drift is logged."""
    measured = [old, "partition.protect_theta=0"]
    stages = ("score", "partition", "sft", "rl")
    plain, made = (artifacts(begun(*QUICK, *more), *stages) for more in ([], measured))
    for stage in ("sft", "rl"):
        first, second = (adapter.read(run[stage].adapter) for run in (plain, made))
        assert all(torch.equal(first[name], second[name]) for name in first)
        steps = history(made[stage])
        # The first step of RL may earn nothing and move nothing; then rounding is left.
        assert steps[-1][PROTECTED_KL] > 1e-5 and all(row[PROTECTED_KL] > -1e-6 for row in steps)
        assert made[stage].manifest["summary"]["protected_kl"] == steps[-1][PROTECTED_KL]
        assert "protected_kl" not in plain[stage].manifest["summary"]

    config = begun()
    rows = read_labels(made["score:protected"].path / "held_out.jsonl")
    renderer = Renderer(load_tokenizer(config.model), config.prompt)
    batch = losses.collate([renderer.row(row.example) for row in rows], 0, torch.device("cpu"))

    def log_probs(stage: str) -> torch.Tensor:
        model = adapter.attach(load_base(config.model), config.lora, made[stage].adapter).eval()
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
        return logits[batch.labels[:, 1:] != IGNORED].double().log_softmax(-1)

    start, sft, rl = (log_probs(stage) for stage in ("score", "sft", "rl"))
    for before, after, stage in ((start, sft, "sft"), (sft, rl, "rl")):
        divergence = float((before.exp() * (before - after)).sum(-1).mean())
        measured = made[stage].manifest["summary"]["protected_kl"]
        assert measured == pytest.approx(divergence, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "1 + 1?", "gold": "2"}', "none of 1 rows of partition.protect, .* has a response"),
        ('{"question": "1 + 1?", "answer": "' + "long " * 200 + '"}', "longer than data.max_length"),
    ],
)
def test_rows_that_cannot_be_scored_are_said_before_a_vote(smoke, tmp_path, text, message):
    (tmp_path / "old.jsonl").write_text(text, encoding="utf-8")
    config = resolved(smoke(f"partition.protect={tmp_path / 'old.jsonl'}"))
    [problem] = problems(config, list(plan_steps(config).values()))
    assert problem.stopped == ("score:protected",)
    with pytest.raises(DataError, match=message):
        raise problem.error


def test_protected_rows_without_a_response_are_counted(tmp_path):
    answered = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(8)]
    path = tmp_path / "old.jsonl"
    path.write_text("\n".join(map(json.dumps, [*answered, {"question": "9 + 1?", "gold": 10}])))
    scored, held_out, without_response = examples.protected(str(path), ScoreSection(), 0)
    assert (len(scored), len(held_out), without_response) == (6, 2, 1)
    path.write_text(json.dumps(answered[0]))  # of few rows all are scored, and no drift is logged
    assert [len(rows) for rows in examples.protected(str(path), ScoreSection(), 0)[:2]] == [1, 0]


def test_errors(smoke, begun, old, tmp_path):
    with pytest.raises(MissingInputError, match="no data file .*gone.jsonl"):
        plan_steps(resolved(smoke(f"partition.protect={tmp_path / 'gone.jsonl'}")))
    config = begun(*QUICK, old, "partition.protect_theta=1")
    make_steps(config, "score")
    with pytest.raises(UnusableResult, match="no element is active in sft") as caught:
        make_step(config, "partition:sft")
    assert "lower partition.protect_theta" in str(caught.value.hint)


@pytest.mark.slow
def test_the_page_says_what_was_gained_and_lost(begun, old, monkeypatch):
    both = ("sft.rounds=2", "eval.targets=[base, sft, sft2, rl]")
    config = resolved(begun(*QUICK, old, "partition.strategy=all", *both))
    made = artifacts(config)
    right = {"base": 4, "sft": 6, "sft2": 4, "rl": 2}  # of 16 items; a random model answers nothing

    def samples_with_right_answers(path: Path) -> list:
        [target] = [target for target in right if made[f"eval:{target}@demo"].path == path.parent]
        return [replace(one, correct=i < right[target]) for i, one in enumerate(read_samples(path))]

    monkeypatch.setattr("stages.report.comparison.read_samples", samples_with_right_answers)
    [grid] = comparison.protection(config, made)
    assert grid.head == ["", "items", "base, %", "sft", "sft2", "rl"]
    assert [row[:2] for row in grid.rows] == [["demo", "16"], ["drift on held-out protected rows", "3"]]
    changes = [cell.partition(" ")[0] for cell in grid.rows[0][2:]]
    assert changes == ["25.0", "+12.5", "+0.0", "-12.5"]
    assert float(grid.rows[1][3]) > 0 and "% are protected; sft trains" in grid.caption
    assert comparison.protection(resolved(begun(*QUICK)), made) == []
