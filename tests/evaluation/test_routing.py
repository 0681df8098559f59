"""Answers that are routed between two modes, and what a routing is worth."""

import json
import re
from dataclasses import replace

import pytest
from conftest import make_steps

from stages.errors import ArtifactError, ConfigError
from stages.evaluation import routing
from stages.pipeline.resolve import resolved
from stages.pipeline.state import state
from stages.pipeline.steps import plan_steps
from stages.records import Sample, read_labels, read_samples
from stages.report import run_page
from stages.store.artifacts import Store


def _answer(id: str, correct: bool, tokens: int, number: int = 0) -> Sample:
    outcome = "correct" if correct else "wrong"
    return Sample(id, number, 1, "", "", "1", "1", "1", correct, correct, outcome, {"tokens": tokens})


FAST = [_answer("a", True, 2), _answer("b", False, 3), _answer("c", True, 4), _answer("d", False, 5)]
SLOW = [_answer("a", True, 20), _answer("b", True, 30), _answer("c", False, 40), _answer("d", False, 50)]


def test_an_oracle_takes_the_right_mode_and_of_equals_the_cheaper():
    auto = routing.select_answers({"fast": FAST, "slow": SLOW}, dict.fromkeys("abcd", "fast"))
    worth = routing.compare({"fast": FAST, "slow": SLOW, "auto": auto})
    assert {name: (row["accuracy"], row["tokens"], row["slow_share"]) for name, row in worth.items()} == {
        "fast": (0.5, 3.5, 0.0), "slow": (0.5, 35.0, 1.0),
        "auto": (0.5, 3.5, 0.0), "oracle": (0.75, 10.25, 0.25), "label": (0.5, 3.5, 0.0),
    }  # fmt: skip
    for other in ([*SLOW[:3], _answer("e", True, 2)], [*SLOW[:3], _answer("d", True, 2, number=1)]):
        with pytest.raises(ArtifactError, match="the answers of fast and slow are not to the same items"):
            routing.select_answers({"fast": FAST, "slow": other}, dict.fromkeys("abcd", "slow"))


@pytest.fixture(scope="module")
def answered(begun):
    """The small run with both modes and `auto` evaluated."""
    config = resolved(begun("eval.targets=[sft, rl, auto]"))
    return config, make_steps(config, "sft", "rl", "eval")


def test_auto_answers_each_item_as_the_mode_it_chose(answered):
    _, made = answered
    samples = {
        target: {s.id: s for s in read_samples(made[f"eval:{target}@demo"][0].path / "samples.jsonl")}
        for target in ("sft", "rl", "auto")
    }
    stage = {"fast": "sft", "slow": "rl"}
    for id, sample in samples["auto"].items():
        mode = sample.extra["mode"]
        assert replace(samples[stage[mode]][id], extra=sample.extra) == sample
    metrics = json.loads((made["eval:auto@demo"][0].path / "metrics.json").read_text())
    assert list(metrics["routing"]) == ["fast", "slow", "auto", "oracle", "label"]
    assert metrics["routing"]["auto"]["n"] == metrics["all"]["n"] == 16
    assert metrics["router"]["persona"] == "steps" and 0 < metrics["router"]["threshold"] < 1
    assert metrics["router"]["examples"] == 48  # all labelled rows, fewer than 64 of each system


def test_the_page_compares_the_routings_and_speaks_of_slow_first(answered):
    config, _ = answered
    steps = plan_steps(config)
    page = run_page.page(config, steps, "lorapar run", "lorapar serve")
    rows = re.findall(r"<t[hd][^>]*>(fast|slow|auto|oracle|label)</t[hd]>", page)
    assert rows[-5:] == ["fast", "slow", "auto", "oracle", "label"]
    assert "persona steps" in page and "48 labelled training rows" in page
    assert "demo: slow answers" in page and "auto answers" not in page


ASKS = "persona: steps, shots: 8"
OTHERS = ["persona: steps, shots: 2", "persona: effort, shots: 8", "model: teacher, base_url: http://h:1"]


def test_another_question_to_the_base_makes_auto_stale_whatever_gave_the_labels(smoke):
    """And so does another seed, which draws other rows for the threshold."""
    keys = []
    for voter, seed in [(ASKS, 0), (ASKS, 5), *((other, 0) for other in (*OTHERS, f"{ASKS}, words: [a, b]"))]:
        more = ("classify.strategy=random", f"classify.voters=[{{{voter}}}]", f"classify.seed={seed}")
        steps = plan_steps(resolved(smoke("eval.targets=[sft, rl, auto]", *more)))
        keys.append((steps["eval:auto@demo"].key, steps["eval:rl@demo"].key))
    assert len({auto for auto, _ in keys}) == 6 and len({rl for n, (_, rl) in enumerate(keys) if n != 1}) == 1


def test_a_mode_asks_everything_in_its_own_way(smoke, begun):
    """Whatever the items' labels, which the base's prompts follow. Other runs keep their keys."""
    says = "prompt.by_system={1: Be quick., 2: Think.}"
    keys = [plan_steps(resolved(smoke(*more)))["eval:sft@demo"].identity for more in ((), (says,))]
    assert [identity["outside"].get("asked") for identity in keys] == [None, "by mode"]
    config = resolved(begun(says, "eval.targets=[base, sft, rl]", "eval.untrained_items=16"))
    systems = {1: "Be quick.", 2: "Think."}
    made = make_steps(config, "score", "partition", "sft", "rl", "eval")
    for target, system in (("base", None), ("sft", 1), ("rl", 2)):
        for sample in read_samples(made[f"eval:{target}@demo"][0].path / "samples.jsonl"):
            assert systems[system or sample.system] in sample.prompt


CHOICE = "prompt.choice=Say fast or slow."
TUNE = "eval.benchmarks.tune={path: data/demo/tune.jsonl, kind: demo, max_new_tokens: 4, label: false}"


def test_a_choice_that_sft_has_taught_and_a_cascade_decide_together(begun, tmp_path, monkeypatch):
    """SFT gets a row for each labelled question; the threshold is found on rows that both modes answered."""
    rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(6)]
    file = tmp_path / "tune.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    tune = TUNE.replace("data/demo/tune.jsonl", str(file))
    router = "eval.router={by: [choice, cascade], tune: tune}"
    config = resolved(begun("eval.targets=[base, sft, rl, auto]", CHOICE, tune, router))
    made = make_steps(config, "score", "partition", "sft", "rl", "eval")
    steps = plan_steps(config)
    assert set(steps["eval:auto@demo"].inputs) >= {"sft", "eval:sft@tune", "eval:rl@tune"}
    assert "eval:base@tune" not in steps and "eval:auto@tune" not in steps
    labelled = state(Store(config.root), steps["classify:train"]).artifact.path / "labels.jsonl"
    labels = [row for row in read_labels(labelled) if row.system]
    system1 = sum(row.system == 1 for row in labels)
    cold_start = round(config.sft.system2_share * system1)
    assert made["sft"][0].manifest["summary"]["rows"] == system1 + cold_start + len(labels)
    metrics = json.loads((made["eval:auto@demo"][0].path / "metrics.json").read_text())
    router = metrics["router"]
    assert router["by"] == ["choice", "cascade"] and router["method"] == "answers" and router["examples"] == 6
    modes = {mode: metrics["routing"][mode] for mode in ("fast", "slow", "auto")}
    # One token for the choice, and the fast answer before a slow one.
    spent = 1 + modes["fast"]["tokens"] + modes["auto"]["slow_share"] * modes["slow"]["tokens"]
    assert modes["auto"]["tokens"] <= spent + 1e-6
    page = run_page.page(config, steps, "lorapar run", "lorapar serve")
    assert "the best for 6 items that neither mode was trained on" in page


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["eval.router={by: [cascade]}"], "needs rows to find its threshold on; set tune"),
        (["eval.router={tokens: 0.5}"], "needs rows to find its threshold on; set tune"),
        (["eval.router={by: [choice]}"], "choice asks under prompt.choice what SFT learns under it; set it"),
        (
            ["eval.targets=[sft, rl, auto]", "eval.router={tune: x}"],
            "router.tune x is none of benchmarks: demo",
        ),
    ],
)
def test_a_router_that_cannot_decide_is_refused(smoke, settings, message):
    with pytest.raises(ConfigError, match=message):
        smoke(*settings)
