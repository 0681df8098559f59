"""Tables of many runs: what is refused, what cells share, how a sweep goes on, and what a cell shows."""

import csv
import itertools
import json
import os
import re
import signal
import subprocess
from dataclasses import asdict, astuple
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import LORAPAR, ROOT, make_steps

from stages.data.demo import write
from stages.errors import ConfigError
from stages.lora.importance.masks import Masks, flatten_weights
from stages.lora.importance.strategies import S1_ONLY, SHARED
from stages.pipeline.resolve import load
from stages.records import Sample, write_jsonl
from stages.report import table_page
from stages.store.digests import sha256_file
from stages.sweep import steps
from stages.sweep.file import read
from stages.sweep.results import results
from stages.sweep.table import Contrast, table

FILE = """
title: A small table
base: base.yaml
set: {sft.max_steps: 1, rl.max_steps: 1, score.examples: 2, eval.targets: [base, sft, rl]}
rows:
  "θ .9": {partition.theta: 0.9}
  "θ .5": {partition.theta: 0.5}
  "β 0": {partition.theta: 0.9, partition.beta: 0}
seeds: [1, 2]
columns:
  SFT: sft@demo
  "SFT, System 2": sft@demo.system2
  RL: rl@demo
  active: partition:sft.active_share
paper: {"θ .9": {SFT: 27.6}}
compare: {against: "θ .9", on: SFT}
"""


@pytest.fixture(scope="module")
def small(tiny, demo_data, common_folder, tmp_path_factory) -> Path:
    """A table on the smoke config."""
    folder = tmp_path_factory.mktemp("table")
    base = folder / "base.yaml"
    base.write_text(
        f"extends: {ROOT / 'configs/smoke.yaml'}\nruns_dir: {common_folder / 'table'}\n"
        f"model: {{name: {tiny}}}\nclassify: {{strategy: random}}\n"
        f"data: {{path: {demo_data / 'train.jsonl'}, limit: 48}}\n"
        f"eval: {{benchmarks: {{demo: {{path: {demo_data / 'test.jsonl'}}}}}}}\n"
    )
    path = folder / "small.yaml"
    path.write_text(FILE)
    return path


def changed(path: Path, *pairs: tuple[str, str]) -> Path:
    text = path.read_text(encoding="utf-8")
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    other = path.with_name("changed.yaml")
    other.write_text(text)
    return other


@pytest.mark.parametrize("path", sorted((ROOT / "configs/tables").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_tables_of_the_project_are_sound_and_can_be_made_on_the_demo(path, tiny, demo_data):
    benchmark = "eval.benchmarks.demo"
    files = {"data.path": "train", f"{benchmark}.path": "test", f"{benchmark}.shots_path": "train"}
    data = [f"{name}={demo_data / file}.jsonl" for name, file in files.items()]
    plain = ("modes=null", "eval.targets=[base, sft, rl]")  # the paper has no modes
    overrides = [f"model.name={tiny}", *plain, *data]
    planned = table(path, base=ROOT / "configs/demo.yaml", overrides=overrides, seeds=[1])
    assert all(cell.columns for cell in planned.cells)
    shown = {(cell.row, name) for cell in planned.cells for name in cell.columns}
    published = {(row, name) for row, values in planned.file.paper.items() for name in values}
    assert {(row, name) for row, name in published if row in planned.rows} <= shown
    if path.stem == "labels-demo":
        return  # its base has a model and data that are not in a fresh clone
    planned = table(path)
    assert set(planned.rows) == set(planned.file.rows)
    assert planned.file.chosen_on and planned.file.paper


def test_another_base_takes_the_place_of_all_configs(small):
    base = small.with_name("base.yaml")
    planned = table(ROOT / "configs/tables/importance.yaml", base=base)
    assert planned.rows == ["GSM8K", "Dolly", "CodeAlpaca"] and {c.base for c in planned.cells} == {base}
    every, of_one = (len(steps.build_graph(cells)) for cells in (planned.cells, planned.cells_of("GSM8K")))
    assert every == of_one  # each artifact once
    assert f"All rows are of {base}" in table_page.legend(results(planned))


def test_a_table_over_another(small, tmp_path):
    """Rows, columns and published values merge; false takes a row away. A base is beside what names it."""
    path = tmp_path / "above.yaml"
    path.write_text(
        f"extends: {small}\ntitle: Above\nbase: {small.with_name('base.yaml')}\n"
        'rows: {"θ .5": false, "θ .7": {partition.theta: 0.7}}\npaper: {"θ .7": {RL: 30}}\n'
    )
    planned = table(path)
    assert planned.rows == ["θ .9", "β 0", "θ .7"] and planned.file.title == "Above"
    assert planned.file.paper == {"θ .9": {"SFT": 27.6}, "θ .7": {"RL": 30}}
    path.write_text(f"extends: {path}\n")
    with pytest.raises(ConfigError, match="extends itself"):
        read(path)
    path.write_text(f"extends: {ROOT / 'configs/tables/importance.yaml'}\n")
    bases = {cell.row: cell.base.resolve() for cell in table(path).cells}
    assert bases["GSM8K"] == ROOT / "configs/paper/gsm8k-llama2-7b.yaml"
    assert bases["Dolly"] == ROOT / "configs/paper/table4/mmlu-dolly.yaml"


def test_rows_are_chosen_by_name_or_pattern_and_may_lack_columns(small):
    row = "{eval.targets: [sft], columns: {active: null}}"
    [cell] = table(changed(small, ("rows:\n", f"rows:\n  short: {row}\n")), only=["short"], seeds=[1]).cells
    assert cell.columns.keys() == {"SFT", "SFT, System 2"}
    assert table(small, only=["θ*"]).rows == ["θ .9", "θ .5"]
    assert table(small, only=["β 0", "*.5"]).rows == ["θ .5", "β 0"]
    assert [cell.seed for cell in table(small, only=["β 0"], seeds=[2, 3, 2]).cells] == [2, 3]
    for written, seed in (("", 0), ("seeds: 7\n", 7)):  # without one it is the base's
        assert {cell.seed for cell in table(changed(small, ("seeds: [1, 2]\n", written))).cells} == {seed}
    for choice, said in (
        ({"only": ["θ 7"]}, "no row 'θ 7'"),
        ({"overrides": ["seed=5"]}, "--set seed: a table has seeds of its own"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            table(small, **choice)


def test_all_mistakes_are_said_at_once(small):
    typo = ("partition.theta: 0.5", "partition.thta: 0.5")
    path = changed(small, typo, ("  RL: rl@demo", "  RL: init@demo"))
    with pytest.raises(ConfigError) as caught:
        table(path)
    said = str(caught.value)
    assert "row 'θ .5': unknown setting partition.thta (did you mean partition.theta?)" in said
    assert "column 'RL': no row has init@demo; evaluations: base@demo, sft@demo, rl@demo" in said
    with pytest.raises(ConfigError) as caught:
        read(changed(small, (PAPER, '{"θ 9": {SFT: 27.6}, "θ .5": {SF: 1}}'), ("on: SFT", "on: active")))
    said = str(caught.value)
    assert "3 mistakes" in said and "compare.on 'active' is not a column of accuracies" in said
    assert "for 'θ 9', which is not a row" in said and "'SF', which is not a column" in said


THETA_5, ROW = '"θ .5": {partition.theta: 0.5}', '"β 0": {partition.theta: 0.9, partition.beta: 0}'
PAPER, AGAINST = '{"θ .9": {SFT: 27.6}}', 'against: "θ .9"'
COMPARE = f"compare: {{{AGAINST}, on: SFT}}"
LACKS_RL = 'compare: [{row: "θ .5", against: "θ .9", on: RL}]'
REFUSED = [
    ("titel: Extra inputs are not permitted", "title: A small", "titel: A small"),
    ("compare.against 'none' is not a row", AGAINST, "against: none"),
    ("compare.row 'θ .9' is compared with itself", AGAINST, f'row: "θ .9", {AGAINST}'),
    ("unknown group 'sytem1'", "rl@demo", "rl@demo.sytem1"),
    ("unknown group 'gold=1.flexible'", "rl@demo", "rl@demo.gold=1.flexible"),
    ("expected TARGET@BENCHMARK or STEP.VALUE", "active: partition:sft.active_share", "active: partition"),
    ("no row has partition.active_share; steps: classify:train, classify:demo, score, partition:sft, ",
     "partition:sft.active_share", "partition.active_share"),
    ("rows.θ .5.base: Input should be a valid string", THETA_5, '"θ .5": {base: 3}'),
    ("rows.θ .5.columns.RL: Input should be a valid string", THETA_5, '"θ .5": {columns: {RL: 3}}'),
    ("'DPO' is not a column", THETA_5, '"θ .5": {columns: {DPO: base@demo}}'),
    ("its own column 'RL' shows init@demo, which its config does not produce",
     THETA_5, '"θ .5": {columns: {RL: init@demo}}'),
    ("its column 'SFT' is compared or plotted: it must be an accuracy",
     THETA_5, '"θ .5": {columns: {SFT: sft.rows}}'),
    ("seed is set by the table's seeds", THETA_5, '"θ .5": {seed: 3}'),
    ("sft is a section: name its settings one by one, as sft.NAME", THETA_5, '"θ .5": {sft: {lr: 1}}'),
    ("plot.x 'actve' is not a column", "compare:", "plot: {x: actve, y: SFT}\ncompare:"),
    *(("compare names row 'θ .5', which has no value in column 'RL'", f"{COMPARE}\n", f"{LACKS_RL}\n",
       THETA_5, f'"θ .5": {{partition.theta: 0.5, {left_out}}}')
      for left_out in ("eval.targets: [base, sft]", "columns: {RL: null}")),
]  # fmt: skip


@pytest.mark.parametrize(("said", "pairs"), [(said, pairs) for said, *pairs in REFUSED])
def test_a_wrong_table_is_refused(small, said, pairs):
    """Each pair: a text of the table, and what is in its place."""
    with pytest.raises(ConfigError, match=re.escape(said)):
        table(changed(small, *zip(pairs[::2], pairs[1::2], strict=True)))


def test_a_command_makes_its_step_alone_and_has_values_as_they_stand_in_the_table(small):
    odd = {
        "prompt.system": 'Think: 😀 "twice", #now', "sft.learning_rate": 2e-5, "data.limit": None,
        "run": "null",
    }  # fmt: skip
    path = changed(small, ("rows:\n", f"rows:\n  odd: {json.dumps(odd, ensure_ascii=False)}\n"))
    voters = 'classify.voters=[{engine: transformers, persona: steps, words: ["⚡", "😀"]}]'
    planned = table(path, only=["odd"], seeds=[1], overrides=["classify.strategy=vote", voters])
    commands = {}
    for node in steps.build_graph(planned.cells).values():
        commands[node.step.name] = stage, _, *rest = node.command
        assert stage == node.stage
        if stage == "eval":
            target = node.step.variant.partition("@")[0]
            assert {f"eval.targets=[{target}]", "eval.engine=transformers"} <= set(rest)
        assert not node.step.variant or rest[-2:] == ["--only", node.step.variant]
    _, base, *rest = commands["classify:train"]
    config = load(Path(base), [text for flag, text in itertools.pairwise(rest) if flag == "--set"])
    assert config.classify.voters[0].words == ("⚡", "😀")
    assert (config.prompt.system, config.sft.learning_rate) == (odd["prompt.system"], 2e-5)
    assert (config.data.limit, config.run) == (None, "null")


@pytest.fixture(scope="module")
def swept(small):
    """Two rows of the table, with all of their artifacts there."""
    planned = table(small, only=["θ .9", "β 0"])
    for cell in planned.cells:
        make_steps(cell.config)
    return planned


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_and_ends_in_the_same_artifacts(small, tmp_path):
    """SIGKILL of the sweep and its children at three moments, then to the end, then nothing is to do."""

    def adapters(runs: str) -> dict[str, str]:
        files = (tmp_path / runs).glob("*/*/*/adapter/adapter_model.safetensors")
        return {str(p.relative_to(tmp_path / runs)): sha256_file(p) for p in files if "latest" not in str(p)}

    def sweep(runs: str, number: int | None = None) -> list[str]:
        """What is said of steps that are done; at so many of them the sweep is killed."""
        part = ["--seeds", "1", "--only", "θ .9", "--only", "β 0", "--set", f"runs_dir={tmp_path / runs}"]
        child = subprocess.Popen(
            [*LORAPAR, "sweep", str(small), *part], stderr=subprocess.PIPE,
            text=True, cwd=ROOT, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        done = []
        for line in child.stderr:
            done += [line] if line.startswith(("done in", "nothing to do")) else []
            if len(done) == number:
                os.killpg(child.pid, signal.SIGKILL)
                break
        assert child.wait() == (-signal.SIGKILL if number else 0)
        return done

    nodes = steps.build_graph(table(small, only=["θ .9", "β 0"], seeds=[1]).cells)
    assert len(set(sweep("whole"))) == len(nodes)
    for number in (2, 3, 3):
        sweep("killed", number)
    assert 0 < len(sweep("killed")) < len(nodes)
    assert adapters("killed") == adapters("whole") != {}
    assert sweep("killed") == ["nothing to do: every artifact is current\n"]


RIGHT = {  # row, target → for each seed, which of four items are answered correctly
    ("θ .9", "sft"): ("1100", "1000"), ("θ .9", "rl"): ("1110", "1011"),
    ("θ .5", "sft"): ("0000", "0001"), ("θ .5", "rl"): ("0000", "0001"),
    ("β 0", "sft"): ("1100", "1000"), ("β 0", "rl"): ("0000", "0000"),
}  # fmt: skip


@pytest.fixture
def by_hand(tmp_path, monkeypatch):
    """Artifacts with the answers of RIGHT; RL's answer to b could not be graded in one cell."""

    def artifact(artifacts, cell, step):
        if not step.startswith("eval:"):
            return SimpleNamespace(manifest={"key": step, "summary": {}})
        target = step.removeprefix("eval:").partition("@")[0]
        key = f"{cell.row}-{cell.seed}-{target}"
        refused = key == "θ .9-2-rl"
        rows = [
            Sample(
                name, 0, 2 if name == "c" else 1, "", "", None, None, None, right == "1", True,
                "refused" if refused and name == "b" else "correct",
            )
            for name, right in zip("abcd", RIGHT[cell.row, target][cell.seed - 1], strict=True)
        ]  # fmt: skip
        (tmp_path / key).mkdir(exist_ok=True)
        write_jsonl(tmp_path / key / "samples.jsonl", (asdict(row) for row in rows))
        return SimpleNamespace(path=tmp_path / key, manifest={"key": key})

    monkeypatch.setattr("stages.sweep.results.Artifacts.current", artifact)


@pytest.fixture
def replicates(small, tmp_path) -> Path:
    """The table with data of its own for each of two seeds; those of others are not there."""
    for seed in (1, 2):
        write(tmp_path / f"data-{seed}", seed)
    train, test = (f"'{tmp_path}/data-{{seed}}/{split}.jsonl'" for split in ("train", "test"))
    quoted = f"data.path: {train}, eval.benchmarks.demo.path: {test}"
    return changed(small, ("set: {", f"set: {{{quoted}, "))


def test_items_of_replicates_are_not_averaged_over_seeds(replicates, by_hand):
    """Each seed has four items of its own, though their names are alike here."""
    both = f"compare: [{{{AGAINST}, on: SFT}}, {{{AGAINST}, on: RL}}]"
    found = results(table(changed(replicates, (COMPARE, both))))
    sft, rl = found.values["θ .9", "SFT"], found.comparisons[Contrast("β 0", "θ .9", "RL")]
    assert (sft.mean, sft.n, sft.of_seeds, sft.over_items) == (3 / 8, 8, [0.5, 0.25], None)
    assert astuple(sft.over_seeds) == (0, 1, None)
    assert (rl.mean, rl.n) == (-(0.75 + 1) / 2, 7)  # b of seed 2 was not graded
    half = found.comparisons[Contrast("θ .5", "θ .9", "SFT")]
    assert (half.mean, half.n, half.over_items) == (-0.25, 8, None)
    reach = 12.7062 / 4  # over seeds of -1/2 and 0: the standard error is 1/4, and t of one degree 12.7062
    assert astuple(half.over_seeds) == pytest.approx((-0.25 - reach, -0.25 + reach, 0.5), abs=1e-4)
    said = table_page.legend(found)
    assert said.startswith("Seeds 1, 2, each with data of its own.")
    assert table_page.comparison_grid(found).head == ["comparison", "points", "over seeds"]
    one = results(table(replicates, seeds=[1])).values["θ .9", "SFT"]
    assert one.over_items is not None and one.over_seeds is None


def test_a_wrong_table_and_missing_files_stop_all(small, replicates, lorapar, tmp_path):
    out, none = tmp_path / "out", tmp_path / "none.yaml"
    done = lorapar("sweep", replicates, "--seeds", "1,7,8", "--dry-run")
    assert done.code == 78 and f"no data file {tmp_path}/data-7/train.jsonl" in done.err
    wrong = changed(small, ("rl@demo", "dpo@demo"))
    for command in (("sweep", small, wrong, "--dry-run"), ("report", small, wrong, "--out", out)):
        done = lorapar(*command)
        assert done.code == 78 and "no row has dpo@demo" in done.err
    done = lorapar("sweep", small, none, "--dry-run")
    assert done.code == 66 and "none.yaml\n  hint: an example: lorapar init --example tables/" in done.err
    done = lorapar("report", none, "--out", out)
    assert done.code == 66 and "no file" in done.err and not out.exists()
    done = lorapar("sweep", small, "--seeds", "1", "--set", "data.max_length=20")
    assert done.code == 65 and "started" not in done.err and "--only ROW" in done.err
    assert done.err.count("than data.max_length 20") == 1 and "error: 3 of 3 cells: 1 thing" in done.err


def test_planned_comparisons_are_those_that_are_named(small, by_hand):
    planned = 'compare: [{row: "β 0", against: "θ .5", on: RL}, {against: "θ .9", on: SFT}]'
    path = changed(small, (COMPARE, planned))
    found = results(table(path))
    first = Contrast("β 0", "θ .5", "RL")
    assert list(found.comparisons) == [first, *(Contrast(row, "θ .9", "SFT") for row in ("θ .5", "β 0"))]
    assert found.corrected_p("over_items") == dict.fromkeys(found.comparisons, 1)  # of 1, .75 and 1
    assert table(path, only=["β 0", "θ .5"]).contrasts == [first]


def test_the_report_says_what_is_there_and_how_to_make_what_is_not(swept, small, lorapar, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/small.csv").write_text("mine")
    done = lorapar("report", small, "--out", tmp_path / "out")
    assert done.code == 73 and (tmp_path / "out/small.csv").read_text() == "mine"
    (tmp_path / "out/small.csv").unlink()
    done = lorapar("report", small, "--out", tmp_path / "out")
    assert done.code == 0 and "8 of 12 values are available" in done.err
    rows = list(csv.DictReader((tmp_path / "out/small.csv").open()))
    assert len(rows) == 12 + 2 and rows[0]["paper"] == "0.276" and rows[0]["items"] == "16"
    assert rows[-1]["over_items_p"] == rows[-1]["over_items_holm"] == "1.0" and rows[-1]["mean"] == "0.0"
    means = [float(rows[0][name]) for name in ("mean", "seed_1", "seed_2")]
    assert means[0] == pytest.approx((means[1] + means[2]) / 2)
    records = json.loads(lorapar("report", small, "--json").out)["small"]
    as_text = [{name: "" if x is None else str(x) for name, x in record.items()} for record in records]
    assert as_text == rows and sum(record["seed_1"] is None for record in records[:12]) == 4
    page = (tmp_path / "out/report.html").read_text()
    assert "A small table" in page and "(paper: 27.6)" in page and f"<pre>lorapar sweep {small}</pre>" in page
    options = ["--seeds", "8", "--only", "β 0"]
    done = lorapar("report", small, "--out", tmp_path / "out", *options)
    assert done.code == 66 and "nothing to report: no value of these tables is there yet" in done.err
    assert "--only 'β 0'" in done.err
    done = lorapar("report", small, "--out", tmp_path / "out", "--seeds", "1,8")
    assert "missing (seed 8)<" in (tmp_path / "out/report.html").read_text()


def test_importance_of_each_row(swept, monkeypatch):
    monkeypatch.setattr("stages.report.figures.svg", lambda figure: "<svg></svg>")
    found = results(swept)
    first, said, second, _ = table_page._importance(found)
    masks = found.artifacts.current(swept.cells[0], "partition:sft").manifest["summary"]
    for system in (1, 2):
        alone = 100 * masks[f"s{system}_only_share"]
        assert f"{alone:.1f} % of System {system}" in first.caption
    assert second.caption.startswith("β 0: ") and re.search(r"Jaccard index 0\.\d{3}\.$", second.caption)
    # The same figures from sets of positions.
    cells = [cell for cell in swept.cells if cell.row == "θ .9"]
    both = [found.artifacts.current(cell, "partition:sft") for cell in cells]
    regions = [flatten_weights(Masks.load(each.path, "sft").region).tolist() for each in both]
    a, b = ({i for i, region in enumerate(of_seed) if region in (S1_ONLY, SHARED)} for of_seed in regions)
    chance = len(a) * len(b) / len(regions[0])
    assert f"index of {len(a & b) / len(a | b):.3f}." in said.text
    assert f"other random sets {chance / (len(a) + len(b) - chance):.3f}." in said.text
