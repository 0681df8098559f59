"""What a run will cost, told before: lengths, time, memory, and what does not fit."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, make_steps

from lorapar_cli import planning
from stages import footprint
from stages.config import LaunchSection
from stages.language.prompts import Row
from stages.lora import adapter
from stages.models.base import load_base
from stages.pipeline import launch
from stages.pipeline.cost import Cost, Memory
from stages.pipeline.estimate import knobs
from stages.pipeline.lengths import Lengths
from stages.pipeline.probe import Piece, Probe
from stages.pipeline.work import STARTS, Work
from stages.store import estimates
from stages.store.estimates import Told

STEPS = ("classify:train", "score", "sft", "rl", "eval:sft@demo")


@pytest.fixture
def asked(smoke, lorapar):
    """Runs `lorapar plan` on the smoke config with few rows; returns what it prints, and the config."""
    sets = ("data.limit=16", "eval.benchmarks.demo.limit=4", "eval.targets=[base, sft, rl]")
    config = smoke(*sets)
    paths = {
        "model.name": config.model.name,
        "data.path": config.data.path,
        "eval.benchmarks.demo.path": config.eval.benchmarks["demo"].path,
        "runs_dir": config.runs_dir,
    }

    def run(*more: str):
        settings = [*(f"{name}={value}" for name, value in paths.items()), *sets]
        flags = [part for setting in settings for part in ("--set", setting)]
        return lorapar("plan", ROOT / "configs/smoke.yaml", *flags, *more), config

    return run


def test_time_memory_and_lengths_are_told_and_kept(asked):
    told = json.loads(asked("--json")[0].out)
    assert {row["state"] for row in told["steps"].values()} == {"missing", "stale"}
    for name in STEPS:
        assert told["steps"][name]["seconds"] > 0
        assert 0 < told["steps"][name]["mib"] < told["memory_mib"]
        parts = told["steps"][name]["of_mib"]
        assert sum(parts.values()) == pytest.approx(told["steps"][name]["mib"])
        assert parts["libraries"] > parts["weights"] > 0
        assert (parts["optimizer"] > 0) == (name in ("sft", "rl"))
    rows = told["tokens"]["row"]
    assert (
        rows["rows"] == rows["sample"] == 16
        and 0 < rows["median"] <= rows["p99"] <= rows["longest"] <= rows["limit"]
    )
    asked_of = told["tokens"]["prompt of demo"]
    assert asked_of["rows"] == 4 and asked_of["longer"] == 0 and asked_of["limit"] > asked_of["longest"]
    assert any(what.startswith("vote on train, ") for what in told["tokens"])
    done, config = asked()
    assert done.out.startswith("step") and "together about" in done.out and "does not fit" not in done.out
    made = make_steps(config, "classify", "score")
    provenance = made["score"][0].manifest["provenance"]
    took, before = estimates.spent(provenance)
    assert before.seconds > 0 and before.mib > 0 and took.seconds > 0 and took.mib > 0


def test_voters_with_worked_examples_of_a_person_s_own(asked, tmp_path):
    """More of them than lorapar brings; they make the questions longer."""
    rows = [{"question": f"What is {i}?", "answer": f"{i}", "system": 1 + i % 2} for i in range(32)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    voter = f"{{engine: transformers, persona: steps, shots: 32, shots_path: {tmp_path / 'mine.jsonl'}}}"
    done, _ = asked("--set", f"classify.voters=[{voter}]", "--json")
    assert done.code == 0 and json.loads(done.out)["steps"]["classify:train"]["seconds"] > 0


def test_longer_rows_and_what_does_not_fit_are_named(asked, monkeypatch):
    monkeypatch.setattr(footprint, "room", lambda: 50)
    done, _ = asked("--set", "rl.max_completion=3")
    assert "16: cut" in done.out
    monkeypatch.setattr("stages.pipeline.lengths.SAMPLE", 8)
    monkeypatch.setattr("stages.pipeline.lengths.LONGEST", 0)
    assert " 8 of 16 " in asked("--set", "rl.max_completion=3")[0].out
    assert "sft does not fit: lower sft.micro_batch, or set sft.gradient_checkpointing" in done.out


def test_prompts_that_are_longer_than_a_server_reads_are_counted(asked):
    """Of a benchmark, and of a voter that is the base."""
    voter = "classify.voters=[{persona: role_play, engine: vllm}]"
    sets = ("eval.engine=vllm", "server.max_model_len=64", "eval.benchmarks.demo.max_new_tokens=24", voter)
    done, _ = asked(*(part for setting in sets for part in ("--set", setting)))
    assert re.search(r"prompt of demo .*server.max_model_len, less 24: 40\s+\d+: fail", done.out)
    assert re.search(r"vote on train, role_play .*server.max_model_len, less 8: 56\s+16: fail", done.out)


def test_what_fills_the_memory_of_a_process_with_fewer_libraries():
    of = Memory(1000, weights=200, optimizer=100, cache=50, libraries=400)
    assert of.activations == 250
    less = of.without(150, 900)
    assert (less.whole, less.libraries, less.activations) == (850, 250, 250)
    assert of.without(0, 1200).whole == 1200


def test_what_vllm_has_of_the_gpu_is_named_first(smoke):
    assert knobs("rl", smoke()).startswith("rl.micro_batch")
    assert knobs("rl", smoke("rl.rollouts.engine=vllm_colocate")).startswith("rl.rollouts.gpu_memory, or")
    assert knobs("eval:rl@demo", smoke()) == "server.batch_size"


def test_what_a_baseline_costs_is_not_told(asked):
    told = json.loads(asked("--set", "baseline.method=dora", "--json")[0].out)["steps"]
    assert told["sft"] == {"state": "stale", "seconds": None, "mib": None, "of_mib": None}
    assert told["eval:sft@demo"]["seconds"] > 0
    said = asked("--set", "baseline.method=dora")[0].out
    assert re.search(r"together about .*, and what is not known; half as much", said)


def test_a_total_of_nothing_that_is_known_is_none():
    assert planning._together([None, None]) == "how long it takes is not known"
    assert planning._together([30, None]).startswith("together about 30 s, and what is not known;")


def test_a_command_starts_once_for_all_steps_of_its_stage_and_each_loads_the_model(smoke):
    work = object.__new__(Work)
    work.config = smoke()
    work.probe = SimpleNamespace(loading=Piece(2, 10), trainer=Piece(4, 5), layers_mib=30.0)
    work.starting, work.started, work.served = 8, set(), set()
    work._answers = work._sft = lambda _: Cost(1.0, Memory(20.0))
    stages = ("eval", "eval", "sft")
    steps = [SimpleNamespace(stage=SimpleNamespace(name=name), variant="") for name in stages]
    assert [work.cost(step).seconds for step in steps] == [1 + 2 + 8, 1 + 2, 1 + 2 + 4 + 8]


@pytest.mark.parametrize(
    ("number", "of", "lengths"),
    [(3, 40, [40, 39, 38]), (3, 90, [40, 39, 38]), (3, 10, [38, 34, 30]), (3, 1, [20, 20, 20])],
)
def test_the_longest_of_rows_that_are_drawn(smoke, number, of, lengths):
    """Of ten of forty the longest is about the second or third of all."""
    work = object.__new__(Work)
    work.config, work.rows = smoke(), {"train": [None] * 40}
    work.rendered = {"sft": [Row(str(n), [1] * n, [1] * n) for n in range(1, 41)]}
    assert [len(row.input_ids) for row in work._longest("sft", number, of)] == lengths


@pytest.fixture
def probe(monkeypatch):
    """A probe to which a row takes as many seconds and MiB as `of_a_row` says; `sizes` are those tried."""
    made = object.__new__(Probe)
    made.room, made.loading, made.sizes = 1000, Piece(9.0, 100.0), []
    monkeypatch.setattr(footprint, "forget", lambda: None)
    monkeypatch.setattr(footprint, "peak", lambda: 100 + made.of_a_row[1] * made.sizes[-1])

    def timed(call):
        call()
        return made.of_a_row[0] * made.sizes[-1]

    monkeypatch.setattr("stages.pipeline.probe._timed", timed)
    return made


@pytest.mark.parametrize(
    ("seconds", "mib", "tried"),
    [
        (0.01, 1, [1, 2, 4, 8, 16, 32, 64]),
        (0.15, 1, [1, 2, 4, 8, 16, 32]),
        (0.01, 20, [1, 2, 4, 8, 16, 32]),
        (9, 1, [1, 2]),
        (11, 1, [1]),
    ],
)
def test_a_piece_that_is_too_long_or_too_large_is_told_from_parts(probe, seconds, mib, tried):
    probe.of_a_row = seconds, mib
    found = probe._grown(probe.sizes.append, 64)
    assert sorted(set(probe.sizes)) == tried
    assert found == Piece(pytest.approx(64 * seconds), pytest.approx(100 + 64 * mib))


def test_rows_that_belong_together_are_tried_together(probe):
    probe.of_a_row = 0.001, 1
    probe._grown(probe.sizes.append, 40, step=8)
    assert sorted(set(probe.sizes)) == [8, 16, 32, 40]


def test_what_is_not_tried_is_told_by_its_tokens(probe):
    """The longest come first: by rows it would be 100 + 20 + 3 × 20."""
    probe.of_a_row = 5, 20
    found = probe._grown(probe.sizes.append, 4, lengths=[20, 20, 10, 5])
    assert sorted(set(probe.sizes)) == [1, 2] and found == Piece(pytest.approx(13.75), pytest.approx(155))


def test_inside_the_adapter_drops_out_and_afterwards_it_does_not(smoke):
    model = adapter.initial(load_base(smoke().model), smoke().lora, 0)
    text = torch.tensor([[1, 2, 3]])

    def same() -> bool:
        return torch.equal(model.train()(input_ids=text).logits, model(input_ids=text).logits)

    with adapter.dropping_out(model, 0.5):
        assert not same()
    assert same()


def test_of_more_than_may_be_tried_the_rest_is_told_from_these(probe):
    probe.of_a_row = 0.01, 1
    found = probe._grown(probe.sizes.append, 100, most=8)
    assert sorted(set(probe.sizes)) == [1, 2, 4, 8]
    assert found == Piece(pytest.approx(1), pytest.approx(200))


def test_memory_that_runs_out_ends_the_trials_but_of_one_row_it_is_an_error(probe):
    probe.of_a_row = 0.01, 1

    def room_for(most):
        def work(n):
            if n > most:
                raise MemoryError
            probe.sizes.append(n)

        return work

    assert probe._grown(room_for(20), 64) == Piece(pytest.approx(0.64), pytest.approx(164))
    with pytest.raises(MemoryError):
        probe._grown(room_for(0), 64)


def test_estimates_survive_damage_and_a_store_that_cannot_be_written(tmp_path):
    estimates.tell(tmp_path, {"a": Told(seconds=1, mib=2)})
    estimates.tell(tmp_path, {"b": Told(seconds=3, mib=None)})
    assert estimates.told(tmp_path, "a") == Told(seconds=1, mib=2)
    assert estimates.told(tmp_path, "b").mib is None and estimates.told(tmp_path, "c") is None
    (tmp_path / estimates.NAME).write_text('{"a": 7}')
    assert estimates.told(tmp_path, "a") is None
    estimates.tell(tmp_path / estimates.NAME, {"a": Told()})  # a file, not a folder


def test_lengths():
    found = Lengths.of([5, 1, 9, 3])
    assert (found.median, found.p99, found.longest, found.mean) == (3, 9, 9, 4.5)
    assert found.beyond(5) == 1 and found.within(4) == 3


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
    assert launch.shares(LaunchSection(**given)) == found


def test_a_divided_base_takes_less_room_and_several_gpus_less_time(smoke, monkeypatch):
    work = object.__new__(Work)
    work.config = smoke("sft.launch={backend: fsdp2, processes: 2}")
    work.probe = SimpleNamespace(loading=Piece(2, 10), trainer=Piece(4, 5), layers_mib=30.0)
    work.starting, work.started, work.served = 8, set(), set()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    work._sft = lambda _: Cost(60.0, work._divided(Memory(100.0, weights=40.0), work.config.sft.launch))
    found = work.cost(SimpleNamespace(stage=SimpleNamespace(name="sft"), variant=""))
    assert found == Cost(60 / 2 + 2 + 4 + 8, Memory(85.0, weights=25.0))
    assert work._divided(Memory(100.0), LaunchSection(backend="ddp")) == Memory(100.0)


def test_sampling_has_whole_layers_and_no_copy_where_the_base_is_divided(asked):
    """One process holds the base twice; of two, each holds at the most one."""
    found = {}
    for backend in ("single", "fsdp2"):
        launched = f"rl.launch={{backend: {backend}, processes: 2}}"
        told = json.loads(asked("--set", launched, "--set", "rl.micro_batch=4", "--json")[0].out)
        found[backend] = told["steps"]["rl"]["of_mib"]["weights"]
    assert found["fsdp2"] < found["single"]


def test_a_base_for_which_there_is_no_room_leaves_the_lengths(asked, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr("stages.pipeline.probe.load_base", full)
    told = json.loads(asked("--json")[0].out)
    assert told["steps"]["sft"]["seconds"] is None and told["tokens"]["row"]["rows"] == 16


def test_a_vllm_server_starts_once_for_all_voters_and_once_for_each_target(smoke):
    work = object.__new__(Work)
    work.config, work.served = smoke("classify.voters=[{engine: vllm}]", "eval.engine=vllm"), set()
    names = ["classify:train", "classify:demo", "score:", "eval:base@a", "eval:base@b", "eval:sft@a"]
    waits = []
    for stage, _, variant in (name.partition(":") for name in names):
        waits.append(work._server(SimpleNamespace(stage=SimpleNamespace(name=stage), variant=variant)))
    assert waits == [STARTS, 0, 0, STARTS, 0, STARTS]
