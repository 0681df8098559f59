"""What a run will cost, told before: time, memory, lengths, and what does not fit."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, flags, make_steps, needs_vllm

from lorapar_cli import plan as plan_command
from stages.errors import ConfigError
from stages.labelling import personas
from stages.models import base
from stages.models.base import load_base
from stages.pipeline.resolve import resolved
from stages.pipeline.stage import stage
from stages.pipeline.steps import plan_steps
from stages.plan import cost_model, profiler
from stages.plan.cost_model import NOTHING, UNKNOWN, CostModel
from stages.plan.estimate import Cost, Estimate, MemoryEstimate, memory_remedies
from stages.plan.lengths import Lengths, Span, sampled
from stages.plan.profiler import Measurement, per_text
from stages.plan.prompt_lengths import Texts, prompt_length, spans
from stages.prompts.renderer import IGNORED
from stages.records import read_jsonl, write_jsonl
from stages.runtime import resources
from stages.store import estimates
from stages.store.estimates import PlannedCost

STEPS = ("classify:train", "score", "sft", "rl", "eval:sft@demo")
SETS = ("data.limit=16", "eval.benchmarks.demo.limit=4", "eval.targets=[base, sft, rl]")


@pytest.fixture
def asked(lorapar, smoke_flags):
    """Runs `lorapar plan` on the smoke config with few rows; returns what it prints."""
    return lambda *more: lorapar("plan", ROOT / "configs/smoke.yaml", *smoke_flags, *flags(*SETS), *more)


@pytest.fixture
def no_room(monkeypatch):
    """The base does not fit: nothing is measured, and the lengths are told."""

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(profiler, "load_base", full)


@pytest.fixture
def told(asked, monkeypatch):
    """Runs `lorapar plan` with this estimate of every step: seconds, activations in MiB, and more."""

    def run(*options: str, seconds: float | None = 60.0, mib: float = 10.0, **more):
        def estimate(_, steps):
            memory = MemoryEstimate(weights=20, activations=mib)
            costs = {
                step.name: Cost(seconds, None if step.stage.name == "partition" else memory) for step in steps
            }
            return Estimate(costs, more.pop("spans", []), room=100, **more)

        monkeypatch.setattr(plan_command, "estimate", estimate)
        monkeypatch.setattr(plan_command, "check_for_failures", lambda *_, **__: None)
        return asked(*options)

    return run


def test_time_memory_and_lengths_are_told_and_kept(asked, smoke, monkeypatch):
    threads = torch.get_num_threads()
    told = json.loads(asked("--json").out)
    assert torch.get_num_threads() == threads
    assert {row["state"] for row in told["steps"].values()} == {"missing"}
    for name in STEPS:
        assert told["steps"][name]["seconds"] > 0
        assert 0 < told["steps"][name]["mib"] < told["memory_mib"]
        parts = told["steps"][name]["of_mib"]
        assert sum(parts.values()) == pytest.approx(told["steps"][name]["mib"])
        assert parts["libraries"] > parts["weights"] > 0
        assert (parts["optimizer"] > 0) == (name in ("sft", "rl"))
        assert parts["cache"] > 0 or name != "eval:sft@demo"
    rows = told["tokens"]["row"]
    assert rows["rows"] == rows["sample"] == 16
    assert 0 < rows["median"] <= rows["p99"] <= rows["longest"] <= rows["limit"]
    prompts = told["tokens"]["prompt of demo"]
    assert prompts["rows"] == 4 and prompts["longer"] == 0 and prompts["limit"] > prompts["longest"]
    assert any(what.startswith("vote on train, ") for what in told["tokens"])
    made = make_steps(smoke(*SETS), "classify", "score")
    took, before = estimates.actual_and_planned(made["score"][0].manifest["provenance"])
    assert before.seconds > 0 and before.mib > 0 and took.seconds > 0 and took.mib > 0
    # With other settings, what was made is stale, and what was not is still missing.
    nothing_known = Estimate(dict.fromkeys(told["steps"], Cost()), [])
    monkeypatch.setattr(plan_command, "estimate", lambda *_: nothing_known)
    rows = json.loads(asked("--json", "--set", "lora.r=2").out)["steps"]
    states = {name: row["state"] for name, row in rows.items()}
    assert (states["classify:train"], states["score"]) == ("current", "stale")
    assert {states[name] for name in ("partition:sft", "sft", "rl", "eval:rl@demo")} == {"missing"}


def test_only_the_table_and_the_total_are_printed_without_a_flag(told):
    lengths = Lengths([3, 5])
    short = Span("row", 2, lengths, "data.max_length", 9, "drop")
    out = told(spans=[short]).out
    assert out.splitlines()[0].split() == ["step", "state", "takes", "about", "memory"]
    assert re.search(r"^sft +missing +1 min +0.0 GiB$", out, re.MULTILINE)
    total = "about 10 min; half as much or twice as much would be no surprise"
    assert out.endswith(f"\n\n{total}\nthere are 0.1 GiB of memory\n")
    assert "activations" not in out and "longest" not in out
    more = told("--verbose", spans=[short]).out
    assert re.search(r"^classify:train, .* 20 +0 +10 +0 +0 +30$", more, re.MULTILINE)
    assert re.search(r"^row +2 +4 +3 +5 +5 +data.max_length 9 +0$", more, re.MULTILINE)


def test_what_is_cut_or_does_not_fit_is_printed_with_what_to_lower(told):
    lengths = Lengths([3, 5])
    spans = [Span("row", 2, lengths, "data.max_length", 4, "drop"), Span("prompt", 2, lengths, "x", 9, "cut")]
    out = told(spans=spans, mib=90.0).out
    assert re.search(r"^row .* data.max_length 4 +1: drop$", out, re.MULTILINE) and "prompt " not in out
    assert re.search(r"^MiB +weights", out, re.MULTILINE)
    assert (
        "sft does not fit: lower sft.per_device_train_batch_size, or set sft.gradient_checkpointing\n" in out
    )


def test_briefly_it_is_one_line(told):
    briefly = told("--brief")
    assert (briefly.out, briefly.err) == ("about 10 min here\n", "")
    assert told("--brief", seconds=None).out == "how long it takes is not known here\n"
    too_large = told("--brief", mib=90.0).out.splitlines()
    assert too_large[0] == "about 10 min here" and too_large[1].startswith("classify:train does not fit")


def test_a_busy_machine_is_named(told, monkeypatch):
    monkeypatch.setattr(resources, "usable_cores", lambda: 2)
    line = "this machine is busy with other work: 1.4 of 2 cores; alone it would take about 10 min\n"
    assert told("--brief", busy_cores=1.4).out == line
    assert line.replace("\n", "; half as much") in told(busy_cores=1.4).out
    assert json.loads(told("--json", busy_cores=1.4).out)["busy_cores"] == 1.4


def test_what_is_not_known_is_said_beside_the_total():
    some = {"a": Cost(30.0), "b": Cost(None)}
    assert plan_command._about(Estimate(some, [])) == "about 30 s plus what is not known"


def test_lengths_are_told_where_the_base_does_not_fit(asked, no_room, caplog):
    done = asked("--set", "rl.max_completion_length=3")
    assert "16: cut" in done.out and "how long it takes is not known" in done.out
    assert "nothing could be measured" in caplog.text


@needs_vllm
def test_prompts_that_are_longer_than_a_server_reads_are_refused(asked):
    """Of a benchmark, and of a voter that is the base."""
    voter = "classify.voters=[{persona: role_play, engine: vllm}]"
    sets = ("eval.engine=vllm", "server.max_model_len=64", "eval.benchmarks.demo.max_new_tokens=24", voter)
    done = asked(*flags(*sets))
    longer = r": \d+ of \d+ are longer than {} tokens \(server.max_model_len, less {}\)"
    assert done.code == 65
    assert re.search("prompt of demo" + longer.format(40, 24), done.err)
    assert re.search("vote on train, role_play" + longer.format(56, 8), done.err)


def test_voters_with_worked_examples_of_a_person_s_own(asked, no_room, tmp_path):
    """More of them than lorapar brings; they make the questions longer."""
    rows = [{"question": f"What is {i}?", "answer": f"{i}", "system": 1 + i % 2} for i in range(32)]
    write_jsonl(tmp_path / "mine.jsonl", rows)
    voter = f"{{engine: transformers, persona: steps, shots: 32, shots_path: {tmp_path / 'mine.jsonl'}}}"
    tokens = json.loads(asked("--set", f"classify.voters=[{voter}]", "--json").out)["tokens"]
    assert tokens["vote on train, steps"]["median"] > 500


@pytest.fixture
def model(smoke):
    """The cost model of the smoke config and its steps; a token takes a second of one thread, and 2 MiB."""

    def make(*sets: str, **more) -> tuple[CostModel, dict]:
        config = resolved(smoke(*SETS, *sets))
        measured = Measurement(10, 10.0, 20.0)
        made = SimpleNamespace(
            measure_votes=lambda _: measured,
            measure_training=lambda *_, **__: measured,
            measure_generation=lambda *_: (measured, Measurement(10, 20.0, 20.0)),
            supports_packing=lambda _: True,
            kv_cache_mib=lambda rows, length: rows * length / 1024,
            room=10**6, loading_s=0.0, libraries_mib=500.0, weights_mib=100.0, speedup=1.0,
            layers_mib=60.0, copy_mib=100.0, colocated_mib=lambda *_: 7000.0,
            adapter_elements=2**20, on_gpu=False,
        )  # fmt: skip
        vars(made).update(more)
        return CostModel(config, Texts(config), made), plan_steps(config)

    return make


def costs(model: tuple[CostModel, dict]) -> dict[str, Cost]:
    return {name: model[0].cost(step) for name, step in model[1].items()}


def test_the_work_of_each_step_is_counted(model):
    """Against sums over all rows, of which the sample has each once."""
    made = model("rl.beta=0", "sft.lora_dropout=0")
    found, texts = costs(made), made[0].texts
    rows = texts.training_rows("sft")
    lengths = sorted((len(row.input_ids) for row in rows), reverse=True)
    prompts = [prompt_length(row) for row in rows]
    answers = [min(12, len(row.labels) - prompt) for row, prompt in zip(rows, prompts, strict=True)]
    assert len(rows) == 16
    assert found["score"].seconds == pytest.approx(sum(lengths))  # 8 rows of each system
    assert found["score"].memory.activations == 2 * sum(lengths[:8])
    beginning = profiler.common_prefix_length([row.input_ids for row in rows])
    # 2 steps of 8 rows (8.8 are of System 1 or of the cold start), in micro batches of 4 that compute
    # a common beginning once
    assert found["sft"].seconds == pytest.approx(16 * (sum(lengths) / 16 - 0.75 * beginning))
    assert found["sft"].memory.activations == pytest.approx(2 * (sum(lengths[:4]) - 3 * beginning))
    # half of the rows are of System 2: one step of them
    second = costs(model("sft.lora_dropout=0", "sft.rounds=2"))["sft:system2"]
    assert second.seconds == pytest.approx(found["sft"].seconds / 2)
    assert second.memory == found["sft"].memory
    # 2 steps of 4 prompts with 4 completions, of which each is written with a quarter more and learned from
    prompt, answer = sum(prompts) / 16, sum(answers) / 16
    learning, sampling = 4 * prompt + 16 * answer, 4 * prompt + 16 * answer * 1.25 * 2
    assert found["rl"].seconds == pytest.approx(2 * (learning + sampling))
    assert found["rl"].memory.weights == 100 + 4 + 100 and found["rl"].memory.optimizer == 16
    assert found["rl"].memory.activations == pytest.approx(2 * (2 * max(prompts) + 8 * 12))
    # 4 items, of which the base writes 12 tokens each
    ids = texts.prompts("demo")
    read = per_text(ids, 4)
    assert found["eval:base@demo"].seconds == pytest.approx(4 * (read + 12 * 1.25 * 2))
    mean = min(12, texts.responses.mean)
    assert found["eval:sft@demo"].seconds == pytest.approx(4 * (read + mean * 1.25 * 2))
    assert found["eval:base@demo"].memory.cache == 4 * (max(map(len, ids)) + 12) / 1024
    assert found["partition:sft"] == NOTHING


def test_rows_without_a_response_cost_score_and_sft_nothing(model, asked, no_room, tmp_path):
    """Half of them, and all of them."""
    path = model()[0].config.data.path
    rows = [row for _, row in read_jsonl(Path(path))[:16]]
    golds = [row["answer"].partition("#### ")[2] for row in rows]
    bare = [{"question": row["question"], "gold": gold} for row, gold in zip(rows, golds, strict=True)]
    answered = [{"question": row["question"], "answer": row["answer"]} for row in rows[8:]]
    files = {name: tmp_path / f"{name}.jsonl" for name in ("half", "answered", "bare")}
    for file, lines in zip(files.values(), (bare[:8] + answered, answered, bare), strict=True):
        write_jsonl(file, lines)
    half, alone = (costs(model(f"data.path={files[name]}")) for name in ("half", "answered"))
    lengths = [model(f"data.path={files[name]}")[0].response_tokens(96) for name in ("answered", "bare")]
    assert lengths[0] < 96 == lengths[1]  # no response says how long answers are
    assert half["sft"].seconds == alone["sft"].seconds > 0
    assert half["score"].seconds == alone["score"].seconds > 0
    sets = [f"data.path={files['bare']}", "partition.strategy=all", "rl.start_from=init"]
    sets += ["eval.targets=[base, rl]"]
    done = asked(*flags(*sets), "--json")
    assert done.code == 0 and not {"row", "response"} & json.loads(done.out)["tokens"].keys()


def test_votes_are_counted_by_voter(model, monkeypatch):
    def seconds(*voters: str) -> float:
        return costs(model(f"classify.voters=[{', '.join(voters)}]"))["classify:train"].seconds

    steps, effort = (f"{{engine: transformers, persona: {name}}}" for name in ("steps", "effort"))
    assert seconds(steps, effort) == pytest.approx(seconds(steps) + seconds(effort))
    calibrating = len(personas.held_out(None))
    with_them = seconds(steps)
    monkeypatch.setattr(personas, "held_out", lambda _: [])
    assert with_them == pytest.approx(seconds(steps) * (16 + calibrating) / 16)


def test_known_labels_cost_no_votes_and_untrained_models_may_answer_fewer_items(model):
    made = model("eval.benchmarks.demo.label=known", "eval.untrained_items=1")
    found, texts = costs(made), made[0].texts
    assert found["classify:demo"] == NOTHING and found["classify:train"].seconds > 0
    assert not any("demo, steps" in span.name for span in spans(texts, list(made[1].values())))
    mean = per_text(texts.prompts("demo"), 1)
    assert found["eval:base@demo"].seconds == pytest.approx(mean + 12 * 1.25 * 2)
    assert found["eval:sft@demo"] == costs(model())["eval:sft@demo"]


def test_rl_is_measured_at_its_limits(model):
    """Shorter batches scaled up would count a chunk of logits, which has a limit, more than once."""
    batches = []
    measure = lambda rows, *_, **__: batches.append(rows) or Measurement(10, 10.0, 20.0)  # noqa: E731
    costs(model("rl.max_prompt_length=20", "rl.too_long=truncate_left", measure_training=measure))
    batch = batches[-1]
    assert [len(row.input_ids) for row in batch] == [20 + 12] * 8
    assert all(row.labels == [IGNORED] * 20 + row.input_ids[20:] for row in batch)
    for group in batch[:4], batch[4:]:  # 4 completions to a prompt
        assert profiler.common_prefix_length([row.input_ids for row in group]) == 20


def test_a_kl_term_is_a_third_more_of_learning_and_a_baseline_is_not_known(model):
    plain = costs(model("rl.beta=0"))["rl"].seconds
    more = costs(model("rl.beta=0.04"))["rl"].seconds - plain
    texts = model()[0].texts
    learning = 2 * (4 * texts.rl_prompts.within(512) + 16 * texts.responses.within(12))
    assert more == pytest.approx(learning / 3)
    twice = costs(model("rl.beta=0", "rl.num_iterations=2"))["rl"].seconds
    assert twice == pytest.approx(learning * 4 / 3 + (plain - learning) / 2)
    baseline = costs(model("baseline.method=dora", "eval.targets=[base]"))
    assert baseline["rl"] == baseline["sft"] == UNKNOWN


def test_a_vllm_that_sleeps_does_not_stand_beside_training(model, caplog):
    def memory(*sets: str, **more) -> MemoryEstimate:
        return costs(model("rl.rollouts.engine=vllm_colocate", *sets, **more))["rl"].memory

    share, sleeps = "rl.rollouts.gpu_memory_utilization=0.3", "rl.rollouts.enable_sleep_mode=true"
    awake = memory(share)
    assert awake.cache == pytest.approx(300_000) and awake.activations > 0
    assert memory(share, sleeps) == replace(awake, activations=0.0)
    assert memory(share, sleeps, room=100) == replace(awake, cache=0.0)
    assert memory(on_gpu=True).cache == 7000

    def does_not_fit(*_):
        raise ConfigError("its weights twice", "transformers")

    assert memory(on_gpu=True, colocated_mib=does_not_fit).total > 10**6
    assert "its weights twice; choose transformers" in caplog.text


def test_weights_that_do_not_fit_are_told_and_not_loaded(asked, smoke, monkeypatch):
    def fail(*_):
        raise AssertionError

    config = smoke(*SETS)
    parameters = load_base(config.model).parameters()
    assert base.weights_mib(config.model) == sum(p.nbytes for p in parameters) / resources.MIB
    monkeypatch.setattr(profiler, "load_base", fail)
    monkeypatch.setattr(base, "weights_mib", lambda _: 10**9)
    out = asked().out
    for step in ("score", "sft", "rl", "eval:sft@demo"):
        assert f"\n{step} does not fit: set model.load_in_4bit, or choose a smaller model\n" in out
    assert "partition:sft does not fit" not in out


def test_memory_that_runs_out_is_a_step_that_does_not_fit(model):
    def full(*_, **__):
        raise MemoryError

    made = model(measure_training=full)
    cost = costs(made)["score"]
    assert cost.seconds is None
    predicted = Estimate({"score": cost}, [], room=10**6)
    remedies = memory_remedies(made[0].config, [made[1]["score"]], predicted)
    assert remedies == {"score": "lower score.batch_size"}


def test_threads_share_the_work_and_each_step_loads_the_model(model):
    one, two = (costs(model(speedup=speedup, loading_s=3.0)) for speedup in (1.0, 2.0))
    for name, loads in (("sft", 1), ("eval:base@demo", 1), ("eval:sft@demo", 2)):
        assert one[name].seconds - 3 * loads == pytest.approx(2 * (two[name].seconds - 3 * loads))
        assert one[name].seconds > 3 * loads


@needs_vllm
def test_a_vllm_server_starts_once_for_all_voters_and_once_for_each_target(model):
    plain = costs(model("classify.voters=[{engine: transformers}]"))
    path = model()[0].config.eval.benchmarks["demo"].path
    more = f"eval.benchmarks.more={{kind: demo, path: {path}, limit: 4, max_new_tokens: 12}}"
    served = costs(model("classify.voters=[{engine: vllm}]", "eval.engine=vllm", more))
    waits = {name: served[name].seconds - cost.seconds for name, cost in plain.items()}
    for name in ("classify:train", "eval:base@demo", "eval:sft@demo"):
        assert waits[name] == pytest.approx(cost_model.SERVER_S), name
    assert waits["classify:demo"] == waits["score"] == 0
    assert served["eval:base@more"].seconds == pytest.approx(plain["eval:base@demo"].seconds)


def test_a_divided_base_takes_less_room_and_several_gpus_less_time(model, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    divided = costs(
        model("sft.launch={backend: fsdp2, processes: 2}", "rl.launch={backend: fsdp2, processes: 2}")
    )
    whole = costs(model())
    assert divided["sft"].memory.weights == 100 + 4 - 30
    assert divided["sft"].seconds == pytest.approx(whole["sft"].seconds / 2)
    all_gpus = costs(model("sft.launch={backend: ddp}"))["sft"]
    assert all_gpus.seconds == pytest.approx(whole["sft"].seconds / 4)
    assert all_gpus.memory.weights == whole["sft"].memory.weights
    # Without the merged copy. Sampling has whole layers, but takes less than the training passes here.
    assert whole["rl"].memory.weights - divided["rl"].memory.weights == 100 + 30
    # Scoring by RL's gradients is a step of `score`, and starts as such.
    scored = [
        costs(model("rl.rescore=grpo_sign", f"{stage}.launch={{backend: fsdp2, processes: 2}}"))["score:rl"]
        for stage in ("rl", "score")
    ]
    assert scored[0].seconds == pytest.approx(2 * scored[1].seconds)
    assert [cost.memory.weights for cost in scored] == [100 + 4 + 100, 100 + 4 - 30]


def test_others_work_is_read_for_our_cores(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    stat.write_text(
        "cpu 9 9 9 9 9 9 9 9 9 9\ncpu0 100 20 30 7 7 1 2 47 0 0\ncpu1 5 0 0 0 0 0 0 0 0 0\nintr 5\n"
    )
    monkeypatch.setattr(resources, "_STAT", stat)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    monkeypatch.setattr("os.sysconf", lambda _: 100)
    assert resources.busy_seconds() == 2.0
    monkeypatch.setattr(resources, "_STAT", tmp_path / "none")
    assert resources.busy_seconds() is None


def test_what_vllm_has_of_the_gpu_is_named_first(smoke):
    hint = stage("rl").memory_hint
    assert hint(smoke(), "").startswith("rl.per_device_train_batch_size")
    colocated = hint(smoke("rl.rollouts.engine=vllm_colocate"), "")
    assert colocated.startswith("rl.rollouts.gpu_memory_utilization, or")
    assert stage("eval").memory_hint(smoke(), "rl@demo") == "server.batch_size"


def test_estimates_survive_damage_and_a_store_that_cannot_be_written(tmp_path):
    estimates.save(tmp_path, {"a": PlannedCost(seconds=1, mib=2)})
    estimates.save(tmp_path, {"b": PlannedCost(seconds=3, mib=None)})
    assert estimates.load(tmp_path, "a") == PlannedCost(seconds=1, mib=2)
    assert estimates.load(tmp_path, "b").mib is None and estimates.load(tmp_path, "c") is None
    (tmp_path / estimates.NAME).write_text('{"a": 7}')
    assert estimates.load(tmp_path, "a") is None
    estimates.save(tmp_path / estimates.NAME, {"a": PlannedCost()})  # a file, not a folder


def test_the_longest_texts_are_always_in_a_sample(model):
    rows = model()[0].texts.rows["train"]
    chosen = sampled(rows, 2)
    assert len(chosen) == 16 and sampled(rows, 0)[0] == max(rows, key=lambda r: len(r.prompt + r.response))
