"""What a run will cost, told before: time, memory, lengths, and what does not fit."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, make_steps

from lorapar_cli import plan as plan_command
from stages.config import LaunchSection
from stages.labelling import personas
from stages.lora.adapter import adapter
from stages.models.base import load_base
from stages.pipeline import launch
from stages.pipeline.resolve import resolved
from stages.pipeline.steps import plan_steps
from stages.plan import cost_model, profiler, prompt_lengths
from stages.plan.cost import Cost, MemoryEstimate
from stages.plan.cost_model import CostModel, Work, per_text
from stages.plan.estimate import Estimate, knobs
from stages.plan.lengths import Lengths, Span, sampled
from stages.plan.profiler import GAIN, Measurement, Profiler
from stages.runtime import resources
from stages.store import estimates
from stages.store.estimates import PlannedCost

STEPS = ("classify:train", "score", "sft", "rl", "eval:sft@demo")
SETS = ("data.limit=16", "eval.benchmarks.demo.limit=4", "eval.targets=[base, sft, rl]")


@pytest.fixture
def asked(smoke, lorapar):
    """Runs `lorapar plan` on the smoke config with few rows; returns what it prints, and the config."""
    config = smoke(*SETS)
    paths = {
        "model.name": config.model.name,
        "data.path": config.data.path,
        "eval.benchmarks.demo.path": config.eval.benchmarks["demo"].path,
        "runs_dir": config.runs_dir,
    }

    def run(*more: str):
        settings = [*(f"{name}={value}" for name, value in paths.items()), *SETS]
        flags = [part for setting in settings for part in ("--set", setting)]
        return lorapar("plan", ROOT / "configs/smoke.yaml", *flags, *more), config

    return run


@pytest.fixture
def no_room(monkeypatch):
    """The base does not fit: nothing is measured, and the lengths are told."""

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(profiler, "load_base", full)


@pytest.fixture
def told(asked, monkeypatch):
    """Runs `lorapar plan` with this estimate of every step: seconds, activations in MiB, and more."""

    def run(*flags: str, seconds: float | None = 60.0, mib: float = 10.0, **more):
        def estimate(_, steps):
            memory = MemoryEstimate(weights=20, activations=mib)
            costs = {
                step.name: Cost(seconds, None if step.stage.name == "partition" else memory) for step in steps
            }
            return Estimate(costs, more.pop("spans", []), room=100, **more)

        monkeypatch.setattr(plan_command, "estimate", estimate)
        return asked(*flags)[0]

    return run


def test_time_memory_and_lengths_are_told_and_kept(asked, monkeypatch):
    threads = torch.get_num_threads()
    done, config = asked("--json")
    assert torch.get_num_threads() == threads
    told = json.loads(done.out)
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
    made = make_steps(config, "classify", "score")
    took, before = estimates.actual_and_planned(made["score"][0].manifest["provenance"])
    assert before.seconds > 0 and before.mib > 0 and took.seconds > 0 and took.mib > 0
    # With other settings, what was made is stale, and what was not is still missing.
    monkeypatch.setattr(
        plan_command, "estimate", lambda _, steps: Estimate({s.name: Cost() for s in steps}, [])
    )
    states = {
        name: row["state"]
        for name, row in json.loads(asked("--json", "--set", "lora.r=2")[0].out)["steps"].items()
    }
    assert (states["classify:train"], states["score"]) == ("current", "stale")
    assert {states[name] for name in ("partition:sft", "sft", "rl", "eval:rl@demo")} == {"missing"}


def test_only_the_table_and_the_total_are_printed_without_a_flag(told):
    lengths = Lengths.of([3, 5])
    short = Span("row", 2, lengths, "data.max_length", 9, "drop")
    out = told(spans=[short]).out
    assert out.splitlines()[0].split() == ["step", "state", "takes", "about", "memory"]
    assert re.search(r"^sft +missing +1 min +0.0 GiB$", out, re.MULTILINE)
    assert out.endswith(
        "\n\nabout 10 minutes; half as much or twice as much would be no surprise\n"
        "there are 0.1 GiB of memory\n"
    )
    assert "activations" not in out and "longest" not in out
    more = told("--verbose", spans=[short]).out
    assert re.search(r"^classify:train, .* 20 +0 +10 +0 +0 +30$", more, re.MULTILINE)
    assert re.search(r"^row +2 +4 +3 +5 +5 +data.max_length 9 +0$", more, re.MULTILINE)


def test_what_is_cut_or_does_not_fit_is_printed_with_what_to_lower(told):
    lengths = Lengths.of([3, 5])
    spans = [Span("row", 2, lengths, "data.max_length", 4, "drop"), Span("prompt", 2, lengths, "x", 9, "cut")]
    out = told(spans=spans, mib=90.0).out
    assert re.search(r"^row .* data.max_length 4 +1: drop$", out, re.MULTILINE) and "prompt " not in out
    assert re.search(r"^MiB +weights", out, re.MULTILINE)
    assert (
        "sft does not fit: lower sft.per_device_train_batch_size, or set sft.gradient_checkpointing\n" in out
    )


def test_briefly_it_is_one_line(told):
    assert told("--brief").out == "about 10 minutes here\n"
    assert told("--brief").err == ""
    assert told("--brief", seconds=None).out == "how long it takes is not known here\n"
    too_large = told("--brief", mib=90.0).out.splitlines()
    assert too_large[0] == "about 10 minutes here" and too_large[1].startswith("classify:train does not fit")


def test_a_busy_machine_is_named(told, monkeypatch):
    monkeypatch.setattr(resources, "usable_cores", lambda: 2)
    line = "this machine is busy with other work: 1.4 of 2 cores; alone it would take about 10 minutes\n"
    assert told("--brief", busy_cores=1.4).out == line
    assert line in told(busy_cores=1.4).out
    assert json.loads(told("--json", busy_cores=1.4).out)["busy_cores"] == 1.4


def test_what_is_not_known_is_said_beside_the_total():
    some = {"a": Cost(30.0), "b": Cost(None)}
    assert plan_command._about(Estimate(some, [])) == "about 30 seconds, and what is not known,"
    assert plan_command._about(Estimate({"b": Cost(None)}, [])) == "how long it takes is not known"
    assert plan_command._in_words(7200) == "2.0 hours"


def test_lengths_are_told_where_the_base_does_not_fit(asked, no_room, caplog):
    done, _ = asked("--set", "rl.max_completion_length=3")
    assert "16: cut" in done.out and "how long it takes is not known" in done.out
    assert "nothing could be measured" in caplog.text


def test_prompts_that_are_longer_than_a_server_reads_are_counted(asked, no_room):
    """Of a benchmark, and of a voter that is the base."""
    voter = "classify.voters=[{persona: role_play, engine: vllm}]"
    sets = ("eval.engine=vllm", "server.max_model_len=64", "eval.benchmarks.demo.max_new_tokens=24", voter)
    done, _ = asked(*(part for setting in sets for part in ("--set", setting)))
    assert re.search(r"prompt of demo .*server.max_model_len, less 24: 40\s+\d+: fail", done.out)
    assert re.search(r"vote on train, role_play .*server.max_model_len, less 8: 56\s+16: fail", done.out)


def test_voters_with_worked_examples_of_a_person_s_own(asked, no_room, tmp_path):
    """More of them than lorapar brings; they make the questions longer."""
    rows = [{"question": f"What is {i}?", "answer": f"{i}", "system": 1 + i % 2} for i in range(32)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    voter = f"{{engine: transformers, persona: steps, shots: 32, shots_path: {tmp_path / 'mine.jsonl'}}}"
    tokens = json.loads(asked("--set", f"classify.voters=[{voter}]", "--json")[0].out)["tokens"]
    assert tokens["vote on train, steps"]["median"] > 500


@pytest.fixture
def model(smoke):
    """The cost model of the smoke config; a token takes a second of one thread, and 2 MiB."""

    def make(*sets: str) -> CostModel:
        config = resolved(smoke(*SETS, *sets))
        made = CostModel(config, list(plan_steps(config).values()))
        measured = Measurement(10, 10.0, 20.0)
        made.profiler = SimpleNamespace(  # type: ignore[assignment]
            votes=lambda _: measured,
            scoring=lambda _: measured,
            training=lambda *_: measured,
            generation=lambda _: (measured, Measurement(10, 20.0, 20.0)),
            fits=lambda _: True,
            room=10**6, loading_s=3.0, libraries_mib=500.0, weights_mib=100.0,
            layers_mib=60.0, copy_mib=100.0, token_bytes=2**10, adapter_elements=2**20,
        )  # fmt: skip
        return made

    return make


def test_the_work_of_each_step_is_counted(model):
    """Against sums over all rows, of which the sample has each once."""
    made = model("rl.beta=0", "sft.lora_dropout=0")
    work = {step.name: made.work(step) for step in made.steps}
    rows = made.training_rows("sft")
    lengths = sorted((len(row.input_ids) for row in rows), reverse=True)
    prompts = [cost_model.prompt_length(row) for row in rows]
    answers = [min(12, len(row.labels) - prompt) for row, prompt in zip(rows, prompts, strict=True)]
    assert len(rows) == 16
    assert work["score"].thread_s == pytest.approx(sum(lengths))  # 8 rows of each system
    assert work["score"].memory.activations == 2 * sum(lengths[:8])
    beginning = profiler.common_prefix_length([row.input_ids for row in rows])
    # 2 steps of 8 rows (8.8 are of System 1 or of the cold start), in micro batches of 4 that compute
    # a common beginning once
    assert work["sft"].thread_s == pytest.approx(16 * (sum(lengths) / 16 - 0.75 * beginning))
    # 2 steps of 4 prompts with 4 completions, of which each is written with a quarter more and learned from
    prompt, answer = sum(prompts) / 16, sum(answers) / 16
    learning, sampling = 4 * prompt + 16 * answer, 4 * prompt + 16 * answer * 1.25 * 2
    assert work["rl"].thread_s == pytest.approx(2 * (learning + sampling))
    assert work["rl"].memory.weights == 100 + 4 + 100 and work["rl"].memory.optimizer == 16
    assert work["rl"].memory.activations == pytest.approx(2 * (2 * max(prompts) + 8 * 12))
    # 4 items, of which the base writes 12 tokens each; the check of an adapter reads them again, twice
    ids = prompt_lengths.prompts(made.config, made.tokenizer, "demo", made.rows["demo"])
    read = per_text(ids, 4)
    assert work["eval:base@demo"].thread_s == pytest.approx(4 * (read + 12 * 1.25 * 2))
    mean = min(12, made.responses.mean)
    again = 4 * 2 * (sum(map(len, ids)) / 4 + mean)
    assert work["eval:sft@demo"].thread_s == pytest.approx(4 * (read + mean * 1.25 * 2) + again)
    assert (work["eval:base@demo"].loads, work["eval:sft@demo"].loads) == (1, 2)
    assert work["eval:base@demo"].memory.cache == 4 * (max(map(len, ids)) + 12) / 1024
    assert work["partition:sft"] == cost_model.NOTHING


def test_votes_are_counted_by_voter(model, monkeypatch):
    def seconds(*voters: str) -> float:
        made = model(f"classify.voters=[{', '.join(voters)}]")
        return made.work(made.steps[0]).thread_s

    steps, effort = (f"{{engine: transformers, persona: {name}}}" for name in ("steps", "effort"))
    assert seconds(steps, effort) == pytest.approx(seconds(steps) + seconds(effort))
    calibrating = len(personas.held_out(None))
    with_them = seconds(steps)
    monkeypatch.setattr(cost_model, "held_out", lambda _: [])
    assert with_them == pytest.approx(seconds(steps) * (16 + calibrating) / 16)


def test_known_labels_cost_no_votes_and_untrained_models_may_answer_fewer_items(model):
    made = model("eval.benchmarks.demo.label=known", "eval.untrained_items=1")
    work = {step.name: made.work(step) for step in made.steps}
    assert work["classify:demo"] == cost_model.NOTHING and work["classify:train"].thread_s > 0
    assert not any("demo, steps" in span.what for span in prompt_lengths.spans(made))
    all_items = {step.name: model().work(step) for step in made.steps if step.stage.name == "eval"}
    [first] = prompt_lengths.prompts(made.config, made.tokenizer, "demo", made.rows["demo"][:1])
    assert work["eval:base@demo"].thread_s == pytest.approx(len(first) + 12 * 1.25 * 2)
    assert work["eval:sft@demo"] == all_items["eval:sft@demo"]


def test_a_kl_term_is_a_third_more_of_learning_and_a_baseline_is_not_known(model):
    def rl(*sets: str) -> Work | None:
        made = model(*sets)
        return made.work(next(step for step in made.steps if step.name == "rl"))

    plain = rl("rl.beta=0").thread_s
    more = rl("rl.beta=0.04").thread_s - plain
    made = model()
    learning = 2 * (4 * made.rl_prompts.within(512) + 16 * made.responses.within(12))
    assert more == pytest.approx(learning / 3)
    assert rl("baseline.method=dora", "eval.targets=[base]") is None


def test_memory_that_runs_out_is_a_step_that_does_not_fit(model):
    def full(*_):
        raise MemoryError

    made = model()
    made.profiler.scoring = full
    step = next(step for step in made.steps if step.name == "score")
    cost = made.cost(step, made.work(step), 1.0)
    assert cost.seconds is None
    assert Estimate({"score": cost}, [], room=made.profiler.room).too_large == ["score"]


def test_a_stage_starts_once_for_all_its_steps_and_each_loads_the_model(model):
    made = model()
    steps = {step.name: step for step in made.steps}
    names = ("eval:base@demo", "eval:sft@demo", "sft")
    seconds = [made.cost(steps[name], Work(4.0, loads=2), speedup=2.0).seconds for name in names]
    assert seconds == [cost_model.FORK_S + 2 + 6, 2 + 6, cost_model.FORK_S + 2 + 6]


def test_a_vllm_server_starts_once_for_all_voters_and_once_for_each_target(model):
    made = model("classify.voters=[{engine: vllm}]", "eval.engine=vllm")
    names = ["classify:train", "classify:demo", "score:", "eval:base@a", "eval:base@b", "eval:sft@a"]
    waits = []
    for stage, _, variant in (name.partition(":") for name in names):
        waits.append(made._server_s(SimpleNamespace(stage=SimpleNamespace(name=stage), variant=variant)))
    assert waits == [cost_model.SERVER_S, 0, 0, cost_model.SERVER_S, 0, cost_model.SERVER_S]


def test_a_divided_base_takes_less_room_and_several_gpus_less_time(model, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    made = model("sft.launch={backend: fsdp2, processes: 2}", "rl.launch={backend: fsdp2, processes: 2}")
    steps = {step.name: step for step in made.steps}
    work = made.work(steps["sft"])
    assert work.memory.weights == 100 + 4 - 30
    monkeypatch.setattr("stages.runtime.fork_server.can_fork", lambda: False)  # as it is beside a GPU
    assert made.cost(steps["sft"], work, 1.0).seconds == cost_model.START_S + work.thread_s / 2 + 3
    whole = model("rl.launch={backend: single}")
    whole = whole.work({step.name: step for step in whole.steps}["rl"])
    # Without the merged copy. Sampling has whole layers, but takes less than the training passes here.
    assert whole.memory.weights - made.work(steps["rl"]).memory.weights == 100 + 30


@pytest.mark.parametrize(
    ("given", "gpus", "found"),
    [
        ({}, 4, (1, 1.0)),
        ({"backend": "ddp"}, 4, (4, 1.0)),
        ({"backend": "fsdp2", "processes": 2}, 4, (2, 0.5)),
        ({"backend": "fsdp2", "processes": 2}, 0, (1, 0.5)),
        ({"config": "mine.yaml", "backend": "fsdp2"}, 4, (1, 1.0)),
    ],
)
def test_gpus_share_the_work_and_processes_the_layers(monkeypatch, given, gpus, found):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert launch.gpu_split(LaunchSection(**given)) == found


@pytest.fixture
def rested(monkeypatch):
    """A profiler that began at second 0, without a model; `now` has what the system says since."""
    made = object.__new__(Profiler)
    made._begun, made._on_gpu, made._last = (0.0, 0.0, 1000.0), False, None
    made.now = {"wall": 10.0, "own": 8.0, "worked": 1008.0}
    monkeypatch.setattr(resources, "busy_seconds", lambda: made.now["worked"])
    monkeypatch.setattr(resources, "reset_peak", lambda: None)
    monkeypatch.setattr(resources, "peak_of_scarce", lambda: 0)
    clock = SimpleNamespace(
        perf_counter=lambda: made.now["wall"],
        process_time=lambda: made.now["own"],
        thread_time=lambda: made.now["own"],
    )
    monkeypatch.setattr(profiler, "time", clock)
    return made


def test_a_machine_is_busy_if_others_keep_its_cores_busy(rested):
    assert rested.busy_cores() is None
    rested.now["worked"] += 14
    assert rested.busy_cores() == pytest.approx(1.4)
    rested.now["worked"] = None
    assert rested.busy_cores() is None


def test_what_threads_gain_is_measured_unless_others_have_the_cores(rested):
    def work() -> None:
        rested.now["wall"] += 2.0

    rested._last = work, 3.0
    assert rested.speedup(2) == 1.5 and rested.speedup(1) == 1.0
    rested.now["worked"] += 20
    assert rested.speedup(2) == pytest.approx(2**GAIN)


@pytest.mark.parametrize(
    ("each", "most", "on_gpu", "tried"),
    [(0.01, 64, False, [6, 6]), (0.2, 64, False, [6]), (0.01, 4, False, [4, 4]), (0.01, 64, True, [64])],
)
def test_a_batch_has_enough_tokens(rested, each, most, on_gpu, tried, monkeypatch):
    """Of 50 tokens a row. What others do on the machine takes wall time, and does not count on a CPU."""
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    rested._on_gpu, sizes = on_gpu, []

    def work(number: int) -> None:
        sizes.append(number)
        rested.now["own"] += each * number
        rested.now["wall"] += 20 * each * number

    measured = rested._measured(work, lambda number: 50 * number, most)
    assert sizes == tried
    seconds = each * tried[-1] * (20 if on_gpu else 1)
    assert (measured.tokens, measured.seconds) == (50 * tried[-1], pytest.approx(seconds))


def test_memory_is_told_by_tokens():
    assert Measurement(100, 1.0, 30.0).mib_of(250) == 75 and Measurement(100, 1.0, 30.0).mib_of(50) == 30


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


def test_inside_the_adapter_drops_out_and_afterwards_it_does_not(smoke):
    model = adapter.initial(load_base(smoke().model), smoke().lora, 0)
    text = torch.tensor([[1, 2, 3]])

    def same() -> bool:
        return torch.equal(model.train()(input_ids=text).logits, model(input_ids=text).logits)

    with adapter.dropping_out(model, 0.5):
        assert not same()
    assert same()


def test_what_vllm_has_of_the_gpu_is_named_first(smoke):
    assert knobs("rl", smoke()).startswith("rl.per_device_train_batch_size")
    assert knobs("rl", smoke("rl.rollouts.engine=vllm_colocate")).startswith(
        "rl.rollouts.gpu_memory_utilization, or"
    )
    assert knobs("eval:rl@demo", smoke()) == "server.batch_size"


def test_estimates_survive_damage_and_a_store_that_cannot_be_written(tmp_path):
    estimates.save(tmp_path, {"a": PlannedCost(seconds=1, mib=2)})
    estimates.save(tmp_path, {"b": PlannedCost(seconds=3, mib=None)})
    assert estimates.load(tmp_path, "a") == PlannedCost(seconds=1, mib=2)
    assert estimates.load(tmp_path, "b").mib is None and estimates.load(tmp_path, "c") is None
    (tmp_path / estimates.NAME).write_text('{"a": 7}')
    assert estimates.load(tmp_path, "a") is None
    estimates.save(tmp_path / estimates.NAME, {"a": PlannedCost()})  # a file, not a folder


def test_lengths():
    found = Lengths.of([5, 1, 9, 3])
    assert (found.median, found.p99, found.longest, found.mean) == (3, 9, 9, 4.5)
    assert found.beyond(5) == 1 and found.within(4) == 3


def test_the_longest_texts_are_always_in_a_sample(model):
    rows = model().rows["train"]
    chosen = sampled(rows, 2)
    assert len(chosen) == 16 and sampled(rows, 0)[0] == max(rows, key=lambda r: len(r.prompt + r.response))
