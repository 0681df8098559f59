"""All six stages on a random two-layer model, in this process, and what the store promises about them."""

import io
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import LORAPAR, ROOT, Small, config_file, flags, make_steps
from results import history, moved_share

from stages.ask import TrainedModel
from stages.config import Config, ModesSection
from stages.engines import Completion
from stages.errors import ArtifactError, MissingInputError
from stages.pipeline.resolve import resolved
from stages.pipeline.state import state
from stages.pipeline.steps import plan_steps
from stages.records import read_jsonl, read_labels, write_jsonl
from stages.store.artifacts import Store
from stages.store.journal import SEAL, seal_of


@pytest.fixture(scope="session")
def whole(finished):
    """Its artifacts."""
    return {name: artifact for name, (artifact, _) in make_steps(finished()).items()}


def journals(config: Config, kind: str) -> list[Path]:
    """Those of votes or answers."""
    return sorted((Path(config.runs_dir) / kind).glob("*.jsonl"))


def lines_of(config: Config, kind: str) -> dict[str, list[bytes]]:
    return {path.name: path.read_bytes().splitlines(keepends=True) for path in journals(config, kind)}


@pytest.fixture
def copied(finished, tiny, demo_data, tmp_path):
    """A copy of the finished run."""
    shutil.copytree(finished().runs_dir, tmp_path / "runs", symlinks=True)
    return Small(tiny, demo_data, tmp_path)


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_frozen_elements_are_identical_in_the_files(finished, whole, stage):
    """Read back from disk, with weight decay 0.1 and a KL term: not one bit of a frozen element differs."""
    assert moved_share(finished(), stage) > 0.95
    summary = whole[stage].manifest["summary"]
    assert summary["frozen_drift"] == 0 and summary["active"] < summary["elements"]


def test_what_is_current_stays_and_a_stale_input_is_an_error_with_the_command(copied):
    """Whatever the batch size of inference, and after a rebuild with the same content."""
    config = copied("score.batch_size=2", "server.batch_size=4")
    made = make_steps(config, "classify:train", "partition", force=True)
    assert made["classify:train"][1] and made["partition:rl"][1]
    assert not any(now for _, now in make_steps(config).values())
    (other := Path(config.runs_dir, "other.jsonl")).write_text(
        '{"question": "1 + 1?", "answer": "2"}\n', "utf-8"
    )
    with pytest.raises(MissingInputError, match=r"classify:train is stale \(the rows of data.path changed\)"):
        make_steps(copied(f"data.path={other}"), "score")
    stale = r"partition:sft is stale \(partition.theta was 0.9, now 0.8\)"
    with pytest.raises(MissingInputError, match=stale) as caught:
        make_steps(copied("partition.theta=0.8"), "sft")
    assert caught.value.hint == "lorapar run CONFIG --to sft"


def test_a_rebuilt_input_makes_what_follows_stale(copied):
    config = copied()
    for journal in journals(config, "votes"):  # votes are not deterministic: these came out otherwise
        rows = [{**row, "system2": 1 - row["system2"]} for _, row in read_jsonl(journal)]
        for row in rows:
            row[SEAL] = seal_of({name: value for name, value in row.items() if name != SEAL})
        write_jsonl(journal, rows)
    assert make_steps(config, "classify:train", force=True)["classify:train"][1]
    states = {n: state(Store(config.root), s) for n, s in plan_steps(resolved(config)).items()}
    for name in ("score", "partition:rl"):
        assert (states[name].state, states[name].why) == ("stale", "classify:train was rebuilt")
    assert states["eval:base@demo"].state == "current"


def test_a_flipped_bit_stops_the_consumer_and_the_stage(copied, tmp_path):
    config = copied()
    file = config.root / "partition/latest-sft/masks.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    damaged = "partition:sft is damaged: sha256 of .*masks.safetensors differs"
    folder = file.parent.resolve()
    for name in ("partition", "sft"):
        with pytest.raises(ArtifactError, match=damaged) as caught:
            make_steps(config, name)
        assert caught.value.hint == f"move {folder} away and run the same command again"
    folder.rename(tmp_path / "away")
    assert [name for name, (_, now) in make_steps(config).items() if now] == ["partition:sft"]


def test_show_tells_what_is_stale_and_hides_what_is_damaged(copied, lorapar, tmp_path):
    config = copied()
    file = config_file(config, tmp_path)
    answers = lorapar("show", file, "eval:rl", "--samples", "--limit", "2")
    assert answers.code == 0 and answers.out.count("--- ") == 2 and "is stale" not in answers.err
    other = lorapar("show", file, "--by", "knid")
    assert other.code == 78 and "error: no item has a field 'knid'" in other.err
    assert "kind" in other.err.splitlines()[1]
    samples = config.root / "eval/latest-rl@demo/samples.jsonl"
    samples.write_text(samples.read_text(encoding="utf-8").replace('"correct": false', '"correct": true'))
    forged = lorapar("show", file, "eval:rl", "--samples")
    assert forged.code == 78 and "eval:rl@demo is damaged: " in forged.err and not forged.out
    (config.root / "sft/latest").resolve().rename(tmp_path / "away")
    gone = lorapar("show", file, "sft")
    assert gone.code == 66 and "sft is missing" in gone.err
    stale = lorapar("show", file, "eval:sft", "--samples", "--limit", "1")
    assert stale.code == 0 and "eval:sft@demo is stale: sft is missing" in stale.err and stale.out
    results = lorapar("show", file)
    assert "not shown, as not current: eval:sft@demo, eval:rl@demo; lorapar status " in results.err
    (config.root / "partition/latest-sft/manifest.json").write_text("{}")
    broken = lorapar("show", file, "partition:sft")
    assert broken.code == 78 and "partition:sft is damaged: " in broken.err


def test_votes_are_rounded_so_that_the_batch_they_are_asked_in_changes_no_label(whole):
    labels = read_labels(whole["classify:train"].path / "labels.jsonl")
    votes = [vote for label in labels for vote in label.votes.values()]
    assert votes and all(vote == round(vote, 6) for vote in votes)


def test_answers_of_an_evaluation_are_journalled(copied):
    """A torn line is asked again and nothing else; base, init, sft and rl have a journal each."""
    config = copied()
    before = lines_of(config, "answers")
    assert len(before) == 4 and all(len(lines) == 16 for lines in before.values())
    shutil.rmtree(Store(config.root).folder("eval", plan_steps(resolved(config))["eval:rl@demo"].key))
    for path in journals(config, "answers"):
        path.write_bytes(b"".join(before[path.name][:10]) + b'{"question": "torn')
    make_steps(config, "eval:rl@demo")
    after = lines_of(config, "answers")
    assert all(after[name][:10] == lines[:10] for name, lines in before.items())
    assert sorted(len(lines) for lines in after.values()) == [11, 11, 11, 16]  # the torn ones were not opened
    assert any(sorted(after[name]) == sorted(lines) for name, lines in before.items())


def test_an_answer_is_asked_for_once_whatever_is_done_with_it(copied, monkeypatch):
    """Another run, other labels, another limit: no model is loaded to vote or answer again."""
    other = ("run=another", "eval.benchmarks.demo.label=false", "eval.benchmarks.demo.limit=12")
    monkeypatch.setattr("stages.engines.in_process.load_merged", lambda *_: pytest.fail("a model was loaded"))
    made = make_steps(copied(*other), "classify", "eval:base@demo")
    assert len(made) == 2 and all(now for _, now in made.values())


VOTERS = [
    {"engine": "transformers", "persona": persona} for persona in ("steps", "effort", "simplicity", "judge")
]


@pytest.mark.parametrize(
    ("kind", "steps", "change"),
    [
        ("votes", ["classify:train"],
         [f"classify.voters={json.dumps(VOTERS)}", "data.limit=8", "classify.show_answer=true"]),
        ("answers", ["score", "eval:init@demo"], ["lora.r=2"]),
        ("answers", ["score", "eval:init@demo"], ["eval.benchmarks.demo.max_new_tokens=9"]),
    ],
)  # fmt: skip
def test_another_voter_adapter_or_length_is_asked_anew_and_alone(copied, kind, steps, change):
    config = copied(*change)
    before = lines_of(config, kind)
    assert make_steps(config, *steps)[steps[-1]][1]
    after = lines_of(config, kind)
    assert len(after) == len(before) + 1 and all(after[name] == lines for name, lines in before.items())


def test_force_asks_again(copied, monkeypatch):
    config = copied()
    generate, same = "stages.engines.in_process.generate", Completion([65], True)
    monkeypatch.setattr(generate, lambda _, __, prompts, *rest: enumerate([same] * len(prompts)))
    assert make_steps(config, "eval:base@demo", force=True)["eval:base@demo"][1]
    rows = [row for _, row in read_jsonl(config.root / "eval/latest-base@demo/samples.jsonl")]
    assert len({row["output"] for row in rows}) == 1


@pytest.mark.parametrize(
    ("init", "reference"), [("pissa", "sft"), pytest.param("normal", "base", marks=pytest.mark.slow)]
)
def test_kl_references_and_inits(copied, init, reference):
    brief = ("rl.max_steps=1", "sft.max_steps=1", "score.examples=2")
    config = copied(f"lora.init={init}", f"rl.kl_reference={reference}", *brief)
    made = make_steps(config, "score", "partition", "sft", "rl")
    for stage in ("sft", "rl"):
        summary = made[stage][0].manifest["summary"]
        assert summary["frozen_drift"] == 0 and summary["moved"] > 0.9 * summary["active"]
    # At the first step the policy is the SFT adapter: no distance from itself, some from the base.
    assert (abs(history(made["rl"][0])[0]["kl"]) < 1e-6) is (reference == "sft")


def test_samples_and_metrics(whole):
    folder = whole["eval:sft@demo"].path
    metrics = json.loads((folder / "metrics.json").read_text())
    rows = [row for _, row in read_jsonl(folder / "samples.jsonl")]
    assert metrics["all"]["n"] == metrics["system1"]["n"] + metrics["system2"]["n"] == len(rows) == 16
    assert metrics["first_prompt"].startswith("<|im_start|>system\nWork it out")
    assert metrics["stop"] == ["<|im_end|>"]
    assert metrics["bos_tokens_in_it"] == metrics["first_prompt"].count("<|im_start|>")
    outcomes = ("correct", "wrong", "unparsed", "truncated", "refused")
    assert sum(metrics["all"][name] for name in outcomes) == 16
    assert set(metrics["by_kind"]) == {row["extra"]["kind"] for row in rows}


def test_a_setting_of_a_later_version_is_named_as_the_difference(finished):
    """Even where its value is None, as most new settings have."""
    config = resolved(finished())
    newer = replace(plan_steps(config)["partition:rl"], key="0" * 12)
    newer.identity["config"]["partition"]["later"] = None
    assert state(Store(config.root), newer).why == "partition.later was not there, now None"


@pytest.mark.slow
def test_a_run_makes_the_same_weights_as_its_stages_alone(own, tmp_path):
    config = own("sft.max_steps=2", "rl.max_steps=1")
    path = config_file(config, tmp_path)

    def weights(*commands: list[str]) -> list[bytes]:
        for command in commands:
            subprocess.run([*LORAPAR, *command, str(path)], cwd=ROOT, check=True, capture_output=True)
        folders = (config.root / stage / "latest" for stage in ("sft", "rl"))
        return [(folder / "adapter/adapter_model.safetensors").read_bytes() for folder in folders]

    together = weights(["run", "--to", "rl"])
    assert weights(["sft", "--force"], ["rl", "--force"]) == together


def test_ask_answers_each_mode_as_the_evaluation_did(finished, whole):
    """Text by text, as far as the shorter limit of the two goes."""
    model = TrainedModel(finished(), whole["rl"])
    labels = read_labels(whole["classify:demo"].path / "labels.jsonl")
    questions = {row.example.id: row.example.prompt for row in labels}
    lines = (whole["eval:rl@demo"].path / "samples.jsonl").read_text("utf-8").splitlines()
    for row in map(json.loads, lines[:3]):
        (answer,) = model.answers(questions[row["id"]])
        shorter = min(len(answer.text), len(row["output"].strip()))
        assert answer.text[:shorter] == row["output"].strip()[:shorter]
        assert answer.tokens == min(row["extra"]["tokens"], model.limit) > 0
        assert answer.complete == (answer.tokens < model.limit)
    modes = ModesSection(fast={"system": "Be quick."}, slow={"system": "Think."})
    asked = TrainedModel(finished().model_copy(update={"modes": modes}), whole["rl"]).answers("Why?")
    assert [answer.mode for answer in asked] == ["fast", "slow", "auto"]


def test_ask_takes_a_question_or_one_after_the_other(finished, lorapar, monkeypatch):
    given = [ROOT / "configs/smoke.yaml", *flags(*finished.home)]
    assert lorapar("ask", *given, "How many?").out.count("tokens") == 1
    monkeypatch.setattr("sys.stdin", io.StringIO("How many?\n\nWhy?\n"))
    lines = lorapar("ask", *given).out.splitlines()
    assert lines[0] == "How many?" and "Why?" in lines and sum("tokens" in line for line in lines) == 2
