"""The stage table, keys, and what a whole run does."""

import inspect
import json
from pathlib import Path

import pytest
from conftest import CONFIGS, labels_of, make_step, make_steps, needs_vllm

from stages.config import Config
from stages.pipeline.resolve import load, resolved
from stages.pipeline.run import pending_stages
from stages.pipeline.stage import all_stages, section
from stages.pipeline.steps import ancestors, plan_steps
from stages.plan.preflight import problems
from stages.plan.texts import Texts
from stages.records import write_jsonl
from stages.store.artifacts import Store


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """Data and models that are not here have a name and no digest."""
    outside = "stages.pipeline.outside"
    monkeypatch.setattr(f"{outside}.of_model", lambda model, cache: model.revision)
    monkeypatch.setattr(f"{outside}.of_source", lambda source, cache: source.revision)


def keys(config: Config) -> dict[str, str]:
    return {name: step.key for name, step in plan_steps(resolved(config)).items()}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_row_binds_to_its_function(path):
    """A stage function takes the context and exactly its sections."""
    config = load(path)
    for stage in all_stages():
        for planned in stage.steps(config):
            sections = (*planned.sections, *stage.unkeyed_sections)
            names = [section(config, place)[0] for place in sections]
            inspect.signature(stage.function()).bind(None, **dict.fromkeys(names))


TO_RL = {"classify:train", "score", "partition:sft", "partition:rl", "sft", "rl"}
ALL = {*TO_RL, "classify:demo", *(f"eval:{target}@demo" for target in ("base", "init", "sft", "rl"))}


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ("partition.beta=0.5", {"partition:rl", "rl", "eval:rl@demo"}),
        ("rl.sandbox.seconds=9", set()),
        ("eval.sandbox.seconds=9", set()),
        ("server.vllm={dtype: float16}", set()),  # nothing is served by it
        ("eval.untrained_items=5", {"eval:base@demo", "eval:init@demo"}),
        ("sft.learning_rate=0.5", {"sft", "rl", "eval:sft@demo", "eval:rl@demo"}),
        ("eval.benchmarks.demo.max_new_tokens=9", {name for name in ALL if name.startswith("eval")}),
    ],
)
def test_a_setting_changes_the_keys_of_what_reads_it_and_no_others(smoke, change, changed):
    one, two = keys(smoke()), keys(smoke(change))
    assert set(one) == set(two) == ALL
    assert {name for name in ALL if one[name] != two[name]} == changed


@pytest.mark.parametrize(
    ("step", "settings", "unread", "read"),
    [
        ("sft", ["classify.strategy=known"], "classify.voters=[{}]", "classify.known=x"),
        ("sft", ["classify.strategy=random"], "classify.quorum=1", "classify.seed=1"),
        ("sft", ["partition.strategy=all"], "partition.theta=.5", "partition.strategy=random"),
        ("sft", ["partition.strategy=topk"], "partition.theta=.5", "partition.density=.3"),
        ("sft", ["partition.strategy=importance"], "partition.density=.3", "partition.theta=.5"),
        # the sandbox where code is run, and the server where it answers
        ("rl", ["rl.rewards={code_tests: 1}"], "eval.sandbox.seconds=9", "rl.sandbox.seconds=9"),
        ("eval:base@humaneval", ["eval.benchmarks={humaneval: {path: x.jsonl}}"],
         "rl.sandbox.seconds=9", "eval.sandbox.seconds=9"),
        pytest.param(
            "eval:base@demo", ["eval.engine=vllm", "eval.benchmarks.demo.label=false"],
            "server.vllm={max_num_seqs: 3}", "server.vllm={quantization: fp8}", marks=needs_vllm,
        ),
    ],
)  # fmt: skip
def test_a_step_is_keyed_by_what_it_reads(smoke, step, settings, unread, read):
    same, other, key = (keys(smoke(*settings, *change))[step] for change in ([unread], [read], []))
    assert same == key != other


def test_the_type_of_a_voter_counts_and_that_of_the_machine_does_not(smoke, monkeypatch):
    def key(dtype: str) -> str:
        return keys(smoke(f"model.dtype={dtype}"))["classify:train"]

    auto = key("auto")
    monkeypatch.setattr("stages.models.dtype.native_bfloat16", lambda: False)
    assert key("auto") == auto and len({auto, key("float32"), key("bfloat16")}) == 3


def test_only_ancestors_of_what_is_asked_for_are_made(smoke):
    config = resolved(smoke("eval.targets=[sft]"))
    steps = plan_steps(config)
    made = TO_RL - {"partition:rl", "rl"} | {"classify:demo", "eval:sft@demo"}
    assert "rl" in steps and set(ancestors(steps, None)) == made
    pending = pending_stages(steps, Store(config.root), None)
    todo = {task.stage.name: [step.title for step in task.steps] for task in pending}
    assert todo.pop("classify") == ["train", "demo"]
    assert todo == {"score": ["score"], "partition": ["sft"], "sft": ["sft"], "eval": ["sft@demo"]}
    for start, trained in (("sft", {"sft", "rl"}), ("init", {"rl"})):
        alone = resolved(smoke("eval.benchmarks={}", "eval.targets=[base, rl]", f"rl.start_from={start}"))
        assert set(ancestors(plan_steps(alone), None)) & {"sft", "rl"} == trained
    assert set(ancestors(steps, "rl")) == TO_RL


def test_votes_and_answers_of_another_type_are_others(smoke, monkeypatch):
    """The same checkpoint under `auto`, on a CPU that multiplies bfloat16 and on one that does not."""
    small = ("data.limit=8", "eval.benchmarks.demo.limit=2", "eval.targets=[base]")
    found = []
    for run, dtype in (("one", "float32"), ("two", "bfloat16")):
        for place in ("models.base", "models.dtype"):
            monkeypatch.setattr(f"stages.{place}.resolve", lambda model, dtype=dtype: dtype)
        config = smoke(*small, "model.dtype=auto", f"run={run}")
        made = make_steps(config, "classify:demo", "eval:base@demo")
        folders = (Path(config.runs_dir) / kind for kind in ("votes", "answers"))
        found.append([len(list(folder.glob("*.jsonl"))) for folder in folders])
        assert made["eval:base@demo"][0].manifest["provenance"]["dtype"] == dtype
    assert 0 not in found[0] and found[1] == [2 * number for number in found[0]]


def test_untrained_models_may_answer_fewer_items_and_get_worked_examples(smoke, tmp_path):
    shots = tmp_path / "shots.jsonl"
    write_jsonl(shots, ({"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in (70, 80)))
    few = ("eval.benchmarks.demo.limit=6", "eval.benchmarks.demo.label=false", "eval.targets=[base, sft]")
    more = ("eval.untrained_shots=2", "eval.untrained_items=2", f"eval.benchmarks.demo.shots_path={shots}")
    metrics = []
    for config in (smoke(*few), smoke(*few, *more)):
        file = make_step(config, "eval:base@demo").path / "metrics.json"
        metrics.append(json.loads(file.read_text()))
    assert [of["all"]["n"] for of in metrics] == [6, 2]
    prompts = [of["first_prompt"] for of in metrics]
    shown = [("#### 71" in prompt, "#### 81" in prompt) for prompt in prompts]
    assert shown == [(False, False), (True, True)]
    before, after = keys(smoke(*few)), keys(smoke(*few, *more))
    assert {name for name in before if before[name] != after[name]} == {"eval:base@demo"}


@pytest.mark.slow
def test_a_whole_run_learns_from_both_kinds(smoke, tmp_path, demo_data):
    """Half of the rows have their answer alone: RL has them as prompts, score and SFT do not."""
    rows = [json.loads(line) for line in (demo_data / "train.jsonl").read_text().splitlines()][:48]
    slow, fast = ([row for row in rows if row["intended"] == system] for system in (2, 1))
    for row in (*slow[::2], *fast[::2]):
        row["gold"] = row.pop("answer").rpartition("#### ")[2]
    fast[1]["answer"] = "Some."  # cannot be verified, so it is not replayed
    write_jsonl(tmp_path / "mixed.jsonl", rows)
    settings = (f"data.path={tmp_path / 'mixed.jsonl'}", "classify.strategy=known", "classify.known=intended")
    settings += ("score.examples=4", "sft.max_steps=1", "rl.max_steps=1", "rl.system1_share=0.25")
    settings += ("eval.targets=[sft]",)
    config = resolved(smoke(*settings))
    assert problems(Texts(config), list(plan_steps(config).values())) == []
    made = make_steps(config, "classify", "score", "partition", "sft", "rl")
    summaries = {name: artifact.manifest["summary"] for name, (artifact, _) in made.items()}
    without = {1: len(fast[::2]), 2: len(slow[::2])}
    assert len(labels_of(config)) == 48
    assert summaries["score"]["without_response"] == without[1] + without[2]
    rl = {"prompts": len(slow), "replayed_prompts": len(fast) - 1, "unrewardable_prompts": 1}
    assert rl.items() <= summaries["rl"].items()
    assert len(Texts(config).training_rows(config.sft)) == 48 - without[1] - without[2]
