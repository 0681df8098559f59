"""Pages: untrusted texts stay texts, figures have alternatives, and one run shows all that it has."""

import json
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, Small, flags
from matplotlib.figure import Figure

from stages.errors import OutputError
from stages.evaluation.statistics import Interval
from stages.lora.importance.masks import Masks, write_importance
from stages.lora.importance.strategies import S1_ONLY, S2_ONLY, SHARED
from stages.records import Sample, write_jsonl
from stages.report import comparison, elements, figures, files, provenance, run_page, table_page
from stages.report.page import (
    Command,
    ComparedItem,
    Grid,
    Items,
    PageSection,
    Picture,
    Pictures,
    Text,
    render,
)  # fmt: skip
from stages.report.won_and_lost import Answered, _frame, won_and_lost
from stages.store.artifacts import Artifact
from stages.sweep.file import Compare
from stages.sweep.results import Artifacts, Results
from stages.sweep.table import Contrast, Table
from stages.sweep.values import Value

NARROWEST = 500
"""Pixels below which a headless browser makes no window."""
EVIL = '<script>alert(1)</script><img src=x onerror=alert(2)> & "quoted"'


def value(mean: float, reach: float = 0) -> Value:
    """An accuracy, with an interval that reaches so far to both sides."""
    return Value(mean, n=9, over_items=Interval(mean - reach, mean + reach) if reach else None)


def test_every_text_is_escaped():
    item = ComparedItem("won", EVIL, EVIL, EVIL, EVIL, EVIL, EVIL, EVIL)
    parts = [
        Text(EVIL), Grid([EVIL], [[EVIL, EVIL]], EVIL), Command(EVIL), Items([item]),
        Pictures([Picture("<svg></svg>", EVIL, EVIL)]),
    ]  # fmt: skip
    page = render(EVIL, [EVIL], [PageSection("a", EVIL, parts)])
    assert "<script" not in page and "<img" not in page and 'aria-label="<' not in page
    assert page.count("&lt;script&gt;") > 12 and "<svg></svg>" in page
    assert "<nav" not in page and "<h2" not in page  # one section alone has no contents
    parts = {"empty": [], "full": [Text("x")], "more": [Text("x")]}
    page = render("t", [], [PageSection(name, name, blocks) for name, blocks in parts.items()])
    assert 'href="#empty"' not in page and 'href="#full"' in page and 'href="#more"' in page


def test_one_column_over_another():
    """A series is a line, a published one a dashed line, and a row without a series goes across."""
    series = {"QKV": [(0.4, value(0.5, 0.1)), (0.1, value(0.3))]}
    drawn = figures.line_plot(series, {"QKV": [(0.3, 20.0)], "GUD": [(0.2, 12.0)]}, {"base": 13.3}, "x", "y")
    (axes,) = drawn.axes
    by_label = {line.get_label(): line for line in axes.lines}
    assert list(by_label["QKV"].get_xdata()) == [0.1, 0.4] and list(by_label["QKV"].get_ydata()) == [30, 50]
    assert list(by_label["GUD, published"].get_ydata()) == [12.0]
    assert by_label["QKV, published"].get_color() == by_label["QKV"].get_color()
    assert set(by_label["base"].get_ydata()) == {13.3}
    (axes,) = figures.dot_plot(["a", "b"], {"SFT": {"a": value(0.5, 0.1)}}, {"SFT": {"b": 27.6}}).axes
    lines = [list(map(float, line.get_xdata())) for line in axes.lines if len(line.get_xdata())]
    assert lines == [pytest.approx([40, 60]), [50], [27.6]]  # an interval in per cent, with its mean


def test_trainings_are_a_line_for_each_seed_in_the_colour_of_their_row():
    history = [{"step": step, "reward": float(step)} for step in range(1, 9)]
    panels = {"reward": "reward", "KL": "kl"}
    drawn = figures.training_curves({"a": [history, history[:3]], "b": [history]}, panels)
    reward, other = drawn.axes
    lines = [line for line in reward.lines if len(line.get_xdata())]
    assert [len(line.get_xdata()) for line in lines] == [8, 3, 8] and len({x.get_color() for x in lines}) == 2
    assert list(lines[0].get_ydata()) == [1, 1.5, 2, 2.5, 3, 4, 5, 6]  # means over up to five steps
    assert not any(len(line.get_xdata()) for line in other.lines)
    panel = figures.training_panel("t", {"a": [(5.0, 1.0), (6.0, 3.0), (30.0, 8.0)], "b": [(1.0, 0.0)]}, 5)
    bold = [list(line.get_ydata()) for line in panel.axes[0].lines if line.get_linewidth() > 1]
    assert bold == [[1, 2, 8], [0]]  # steps 5 and 6, and long after that


def drawn(name: str) -> str:
    series = {name: {"a": value(0.5, 0.1), "b": value(0.55, 0.1)}, "RL": {"a": value(0.52, 0.1)}}
    return figures.svg(figures.dot_plot(["a", "b"], series, {name: {"a": 27.6}}))


def test_a_figure_is_one_element_in_the_ink_of_the_page():
    text = drawn("one")
    assert text.startswith("<svg ") and text.rstrip().endswith("</svg>") and text.count("<svg ") == 1
    assert "currentColor" in text and figures.INK not in text and "#000000" not in text
    assert "min-width" in text and not re.search(r"<svg [^>]*\b(width|height)=", text)
    assert "published" in text  # text is text
    # Parts of unlike figures have unlike names.
    names = [set(re.findall(r'\bid="([^"]+)"', one)) for one in (text, drawn("two, %"))]
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= names[0] and not names[0] & names[1]


@pytest.fixture(scope="module")
def run(finished, tiny, demo_data, tmp_path_factory):
    """A run of which everything but the answers of RL is there, as options of a command."""
    home = tmp_path_factory.mktemp("page")
    shutil.copytree(finished().runs_dir, home / "runs", symlinks=True)
    own = Small(tiny, demo_data, home)
    shutil.rmtree((own().root / "eval/latest-rl@demo").resolve())
    return flags(*own.home, "eval.targets=[base, sft]")


@pytest.mark.parametrize("file", ["configs/smoke.yaml", "configs/tables/order.yaml"])
def test_a_report_of_nothing_is_none(smoke_flags, tmp_path, lorapar, file):
    table = ["--base", "configs/smoke.yaml", "--seeds", "0"] if "tables" in file else []
    done = lorapar("report", file, *table, *smoke_flags, "--out", tmp_path / "page")
    assert done.code == 66 and "error: nothing to report" in done.err
    assert f"lorapar {'sweep' if table else 'run'} {file}" in done.err
    assert not (tmp_path / "page").exists()


def test_only_an_earlier_report_is_replaced_and_a_full_disk_leaves_no_half(tmp_path, full_disk):
    paths = [tmp_path / name for name in ("report.html", "report.md", "a.csv", "a.tex")]
    files.refuse_others(paths)
    with pytest.raises(OSError, match="full"):
        files.write({path: files.MARKS[path.suffix] + "new" for path in paths})
    assert not list(tmp_path.iterdir())
    for path in paths:
        path.write_bytes(b"mine")
        with pytest.raises(OutputError, match=f"{path.name} exists already, and is not of a report"):
            files.refuse_others(paths)
        path.write_bytes(files.MARKS[path.suffix].encode())
    files.refuse_others(paths)


def test_a_run_shows_what_it_has_and_names_what_is_missing(run, lorapar, tmp_path, monkeypatch):
    report = ("report", "configs/smoke.yaml", *run, "--out", tmp_path)
    (tmp_path / "report.html").write_text("mine")
    assert lorapar(*report).code == 73
    (tmp_path / "report.html").rename(tmp_path / "mine.html")
    done = lorapar(*report)
    assert done.code == 0, done.err
    page = (tmp_path / "report.html").read_text()
    for title in ("Results", "Won and lost", "Training", "Elements", "Labels", "Cost", "Settings and"):
        assert f">{title}" in page
    tile = r"<p>(\w+) on demo</p><p class=\"figure\">[\d.]+.%</p>"
    tile += r"<p class=\"quiet\">\d+ tokens(?:, \d+ cut off)?</p>"
    tiles = re.findall(tile, page)
    assert tiles == ["Base", "Fast"] and page.index('class="tiles"') < page.index("demo: fast answers")
    assert ">Missing<" not in page and '<th scope="row">tokens, system 2</th>' in page
    assert "demo: fast answers" in page and "points against the base model" in page
    assert page.count('role="img"') == page.count("<figure") == page.count("<svg") == 9
    assert page.count("% of all</text>") == 3 and "How to read the maps" in page and ">joules<" in page
    assert "lorapar serve" not in page  # it has no adapter of RL
    assert "https://" not in page.replace("http://www.w3.org", "") and "<script" not in page
    monkeypatch.setattr(figures, "svg", lambda figure: "<svg></svg>")  # they take a while
    lorapar(*report, "--set", "eval.targets=[base, sft, rl]")
    page = (tmp_path / "report.html").read_text()
    assert "Not made yet: eval:rl@demo." in page and "lorapar run configs/smoke.yaml" in page
    assert "<pre>lorapar serve configs/smoke.yaml --set" in page
    # A server takes chats alone.
    monkeypatch.setattr(run_page, "prompt_of", lambda *_: SimpleNamespace(template="plain"))
    lorapar(*report, "--set", "eval.targets=[base, sft, rl]")
    assert "lorapar serve" not in (tmp_path / "report.html").read_text()


def test_a_page_is_on_tables_or_on_one_config(lorapar):
    done = lorapar("report", "configs/smoke.yaml", "configs/demo.yaml", "--out", "x")
    assert done.code == 78 and "configs/smoke.yaml is not a table" in done.err


@pytest.fixture(scope="module")
def browser() -> str:
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no browser is installed")
    return found


def rendered(browser: str, page: Path, *flags: str) -> str:
    """What a browser makes of a page, with the flags given."""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", *flags, str(page)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


MEASURE = """<script>
const opened = [...document.querySelectorAll('details')].map(d => (d.open = true, d)).length;
const contrast = c => c.match(/[0-9.]+/g).slice(0, 3).reduce((sum, x) => sum + Number(x), 0);
const style = getComputedStyle(document.body);
const fetched = performance.getEntriesByType('resource').length;
document.title = [document.documentElement.scrollWidth, opened, fetched,
  contrast(style.color) < contrast(style.backgroundColor) ? 'light' : 'dark',
  [...document.querySelectorAll('.wide')].every(x => x.tabIndex === 0)].join(' ');
</script></body>"""


@pytest.mark.slow
@pytest.mark.parametrize(("width", "theme"), [(420, "light"), (1280, "dark")])
def test_a_browser_shows_pages_on_a_run_and_on_a_table(run, browser, lorapar, tmp_path, width, theme):
    """Nothing is wider than the screen or fetched, tables can be reached by keyboard, and dark is dark."""
    (tmp_path / "table.yaml").write_text(
        f"title: One\nbase: {ROOT / 'configs/smoke.yaml'}\nrows: {{a: {{}}}}\nseeds: [0]\n"
        "columns: {base: base@demo, SFT: sft@demo, gain: sft@demo - base@demo}\n"
    )
    for source, details in (("configs/smoke.yaml", 3), (tmp_path / "table.yaml", 5)):
        assert lorapar("report", source, *run, "--out", tmp_path).code == 0
        text = (tmp_path / "report.html").read_text()
        (tmp_path / "probe.html").write_text(text.replace("</body>", MEASURE))
        dark = ["--blink-settings=preferredColorScheme=0"] if theme == "dark" else []
        dom = rendered(browser, tmp_path / "probe.html", f"--window-size={width},900", *dark, "--dump-dom")
        (found,) = re.findall(r"<title>([^<]+)</title>", dom)
        wide, opened, fetched, seen, reached = found.split()
        assert int(wide) <= max(width, NARROWEST) and fetched == "0" and reached == "true", found
        assert int(opened) == details and seen == theme


def sample(item: str, correct: bool, outcome: str | None = None, **other: Any) -> Sample:
    outcome = outcome or ("correct" if correct else "wrong")
    return replace(Sample(item, 0, None, "Q", "A", None, "1", "1", correct, correct, outcome, {}), **other)


def test_won_and_lost_are_by_all_answers_that_count(tmp_path):
    def answers(name: str, *items: list[bool | None]) -> Artifact:
        """Whether each answer to each item is right; None: it was refused."""
        rows = [
            sample(f"i{at}", bool(right), "refused" if right is None else "correct", sample=number)
            for at, item in enumerate(items)
            for number, right in enumerate(item)
        ]
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "samples.jsonl", (asdict(row) for row in rows))
        return Artifact(tmp_path / name, {})

    found = {
        "eval:sft@b": answers("sft", [True, False, False], [True, True, True], [True, True, True]),
        "eval:rl@b": answers("rl", [False, True, True], [True, True, True], [None, True, True]),
    }
    told, folded = run_page._items(found, {"b": [{"target": "sft"}, {"target": "rl"}]})
    assert told.text == "b: rl wins 1 and loses 0 of 2 items by their shares of right answers."
    assert folded.summary == "1 won and 0 lost items" and len(folded.blocks[0].items) == 1


def test_the_items_are_shown_without_what_all_prompts_have_in_common():
    asked = {"a": "How many?\nOf apples?", "b": "Who?", "c": "How old?"}
    prompts = {name: f"<s>\nBe brief.</s>\n<u>\n{question}</u>\n<a>" for name, question in asked.items()}
    before, after = (
        {name: [sample(name, correct, prompt=prompt)] for name, prompt in prompts.items()}
        for correct in (False, True)
    )
    _, folded = won_and_lost("", Answered("base", before), Answered("sft", after))
    items, _, start = folded.blocks
    assert [item.question for item in items.items] == list(asked.values())
    assert start.text == "<s>\nBe brief.</s>\n<u>"
    assert _frame(["the only one"]) == _frame([]) == ("", "")
    assert _frame(["Question: a?\nAnswer:\n", "Question: b?\nAnswer:\n"]) == ("", "\nAnswer:\n")


def test_won_and_lost_are_read_as_their_column_is():
    """The base's answer to a is right if it is read flexibly, and so is nothing won there."""
    before = {"a": [sample("a", False, correct_flexible=True)], "b": [sample("b", False)]}
    after = {name: [sample(name, True)] for name in "ab"}
    for read, won in (("correct_flexible", 1), ("correct", 2)):
        base = Answered("base", before, read)
        told, _ = won_and_lost("", base, Answered("sft", after))
        assert told.text == f"sft wins {won} and loses 0 of 2 items."


def verdict(rows: str, p_values: dict, same: dict | None = None, row: list[str] | None = None) -> str:
    """The verdict on rows of one letter, each a tenth above the row it is compared with.

    p_values: rows → p over items and over seeds. same: rows that are left out. row: those whose mean is
    compared; None: each other one.
    """
    file = SimpleNamespace(title="T", compare=[Compare(row=row, against="A", on="RL")])
    cells = [SimpleNamespace(row=row) for row in rows]
    table = Table(Path("t"), file, cells, same or {}, [])
    compared = {
        Contrast(tuple(row), table.contrasts[0].against, "RL"): Value(
            0.1, [0.1, 0.1], 100, True, Interval(0.05, 0.15, items), seeds and Interval(0.05, 0.15, seeds)
        )
        for row, (items, seeds) in p_values.items()
    }
    return table_page._verdict(Results(table, {}, compared, Artifacts(), {}))


def test_the_verdict_says_how_many_rows_are_compared():
    tested = {"B": (0.001, None)}
    assert verdict("AB", tested).startswith("All other rows are compared with 'A' on RL.")
    assert verdict("ABC", tested).startswith("1 of 2 other rows is compared with 'A'")
    assert verdict("CB", tested, {"A": "C"}).startswith("All other rows are compared with 'C'")
    assert "Over seeds" not in verdict("AB", tested)
    mean = verdict("ABCD", {"BC": (0.001, None)}, row=["B", "C"])
    assert mean.startswith("1 of 1 planned comparisons is complete.")
    neither = verdict("ABC", {"B": (0.03, 0.01), "C": (0.04, 0.2)})  # Holm's of items: .06 and .06
    assert "Over items, with the training seeds as they are, no difference is told apart" in neither
    assert "Over seeds, told apart from chance, in points: 'B' +10.0 (p = .02)." in neither
    both = verdict("ABC", {"B": (0.01, None), "C": (0.04, None)})
    assert "told apart from chance, in points: 'B' +10.0 (p = .02); 'C' +10.0 (p = .04)." in both


def test_the_verdict_counts_the_items_that_both_have():
    """One was refused for the first target; the difference is on the other two as well."""
    before = [sample("a", False), sample("b", False), sample("c", False, "refused")]
    after = [sample("a", True), sample("b", False), sample("c", True)]
    rows = list(comparison.compared({"base": {"all": before}, "sft": {"all": after}}))
    assert (rows[1]["n"], rows[1]["tested"], rows[1]["change"]) == (3, 2, 0.5)
    (said,) = run_page._verdicts({"demo": rows}, {})
    assert (
        "+50.0 points against the base model, which may be chance (p = 1, paired test over 2 items)" in said
    )
    head, lines = comparison.table("demo", rows)
    assert head == ["demo", "n", "base", "sft"]
    assert lines[0] == ["all", "3", "0.0 [0.0, 65.8]", "66.7 [20.8, 93.9], p = 1"]
    of_a_group = {"target": "sft", "group": "x", "n": 1}
    assert comparison.answered_fewer([*rows, of_a_group]) == "base answered 2 of 3 items."
    assert comparison.answered_fewer(rows[1:] * 2) == ""
    gain = comparison._change({"a": 0, "b": 0, "c": 1, "d": 1}, {"a": 1, "b": 0, "c": 1})
    assert gain == "+33.3 [-110.1, 176.8]"


def test_the_verdict_is_of_rl_and_not_of_what_is_derived_from_it():
    right = {"base": 1, "sft": 2, "rl": 6, "auto": 3, "rl-20": 4}
    answers = {
        target: {"all": [sample(str(i), i < number) for i in range(8)]} for target, number in right.items()
    }
    rows = list(comparison.compared(answers))
    assert [row["against"] for row in rows] == [None, "base", "sft", "rl", "rl"]
    (said,) = run_page._verdicts({"demo": rows}, {})
    assert said.startswith("demo: rl answers 75.0") and "+50.0 points against sft" in said
    assert "auto" not in said and "rl-20" not in said
    assert comparison.p_note(right).endswith("to the left, passing over auto and kept steps.")


def test_the_verdict_says_what_the_last_step_changed_and_what_that_means():
    def row(target: str, group: str, accuracy: float, n: int, **test: float) -> dict:
        return {"target": target, "group": group, "accuracy": accuracy, "n": n, "p": None, **test}

    last = [row("rl", "system 1", 0.7, 10), row("rl", "system 2", 0.45, 10)]
    rows = [row("base", "all", 0.05, 20), row("sft", "all", 0.3, 30), row("rl", "all", 0.575, 30), *last]

    def said() -> str:
        (text,) = run_page._verdicts({"demo": rows}, {"sft": "fast", "rl": "slow"})
        return text.replace("\N{NO-BREAK SPACE}", " ")

    answers = "demo: slow answers 57.5 % of 30 items correctly: +27.5 points against fast"
    assert said() == f"{answers}, which is not tested, because they answered different items."
    rows[2] |= {"p": 0.01, "change": 0.275, "tested": 30}
    assert said() == f"{answers}, more than chance explains (p = .01, paired test over 30 items)."
    rows[2] |= {"target": "lora_1", "p": None}
    del rows[:2]
    assert said() == "demo: lora_1 answers 57.5 % of 30 items correctly."


def test_what_was_planned_stands_beside_what_was_taken_and_is_flagged_if_twofold_wrong(tmp_path):
    def step(seconds: float, mib: float, planned: dict[str, float]) -> Artifact:
        costs = {"seconds": seconds, "peak_mib": {"process": mib}, "estimated": planned}
        return Artifact(tmp_path, {"provenance": costs, "summary": {}})

    sft, rl = {"seconds": 20, "mib": 1000}, {"seconds": 61, "mib": 1200}
    table = provenance.cost({"sft": step(62, 900, sft), "rl": step(30, 500, rl)})
    shown = [["62", "20 (×3.1)", "900", "1000"], ["30", "61 (×0.49)", "500", "1200 (×0.42)"]]
    assert [row[1:5] for row in table.rows] == shown
    assert table.flagged == {(0, 2), (1, 2), (1, 4)} and "Together 92 seconds, planned 81." in table.caption
    page = render("t", [], [PageSection("cost", "Cost", [table])])
    assert page.count('<td class="flagged"') == 3 and '<td class="flagged">20 (×3.1)</td>' in page
    quick = provenance.cost({"partition": step(1.4, 9, {"seconds": 0}), "classify": step(3, 9, {})})
    assert not quick.flagged and "Together" not in quick.caption


def test_a_map_has_the_share_of_both_matrices_from_zero_on():
    """A has 1 of 4 elements in the region and B 3 of 4; the other layer, 7, has no k."""
    codes = torch.tensor([S1_ONLY, 0, 0, 0], dtype=torch.uint8)
    region = {
        "base.layers.3.attn.q_proj.lora_A.weight": codes.view(1, 4),
        "base.layers.3.attn.q_proj.lora_B.weight": S1_ONLY - codes.view(4, 1),
        "base.layers.3.attn.k_proj.lora_A.weight": codes.view(1, 4),
        "base.layers.7.attn.q_proj.lora_B.weight": codes.view(4, 1),
    }
    rows, columns, shares = elements._grid(elements._cells(region), S1_ONLY)
    assert (rows, columns, shares[0], shares[1][0]) == (["3", "7"], ["q", "k"], [50, 25], 25)
    assert shares[1][1] != shares[1][1]
    figure = figures.heat_map(rows, columns, shares, "t")
    figure.canvas.draw()
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert {"3", "7"} <= set(labels) and "0" not in labels
    assert figure.axes[0].images[0].get_clim() == (0, 50)


def test_curves_and_dots_have_their_axes():
    curve = ([0.25, 1.0], [0.9, 1.0])
    nulls = {"by weight": {"System 1": ([1.0], [0.5])}, "by feature": {"System 1": ([0.5], [0.25])}}
    (axes,) = figures.cumulative_curves({"System 1": curve, "System 2": curve}, nulls, 0.9).axes
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    measured = ([25, 100], [90, 100])
    assert lines == [measured, ([100], [50]), ([50], [25]), measured, ([0, 1], [90, 90])]
    assert [elements._share_reaching(theta, curve) for theta in (0.9, 0.94)] == ["25 %", "55 %"]
    (axes,) = figures.scatter({"a": ([0.1], [0.2])}, "t").axes
    assert axes.collections[0].get_offsets().tolist() == [[0.1, 0.2]]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("System 1 importance", "System 2 importance")


def test_the_figures_of_a_system_are_its_own(tmp_path, monkeypatch):
    scores = {1: {"a": torch.tensor([[0.8, 0.0, 0.6]])}, 2: {"a": torch.tensor([[0.6, 0.8, 0.0]])}}
    write_importance(tmp_path / "importance.safetensors", scores)
    region = {"a": torch.tensor([[S1_ONLY, S2_ONLY, SHARED]], dtype=torch.uint8)}
    Masks(region, {}).write(tmp_path / "masks.safetensors", "sft")
    summary = {"elements": 8, "s1_only": 4, "s2_only": 1, "jaccard": 0.5}
    summary |= {"s1_only_share": 0.8, "s2_only_share": 0.25}
    partition = SimpleNamespace(theta=0.9, strategy="importance")
    config = SimpleNamespace(score=SimpleNamespace(scorer="grad2"), rl=None, partition=partition)
    dots: dict = {}
    monkeypatch.setattr(figures, "scatter", lambda groups, *_: dots.update(groups) or Figure())
    score, masks = (Artifact(tmp_path, {"variant": variant, "summary": summary}) for variant in ("", "sft"))
    grid, pictures = elements._stage(config, score, masks, "")
    assert grid.rows == [["System 1 only", "4", "50.0 %"], ["System 2 only", "1", "12.5 %"]]
    reached, alone = (picture.caption for picture in pictures.figures)
    assert "90 % of it is reached by about 59 % of the elements for System 1, 59 %" in reached
    assert alone.startswith("80.0 % of System 1's set belong to it alone, 25.0 % of System 2's")
    assert dots["System 1 only"] == ([pytest.approx(0.8)], [pytest.approx(0.6)])


def test_tokens_are_those_trained_on_or_written(tmp_path):
    def artifact(name: str, summary: dict, history: list | None = None) -> Artifact:
        (tmp_path / name).mkdir()
        if history is not None:
            (tmp_path / name / "history.json").write_text(json.dumps(history))
        return Artifact(tmp_path / name, {"summary": summary})

    logged = [{"num_tokens": 90.0}, {"loss": 1, "num_tokens": 180.0}, {"loss": 1}]
    trained = artifact("sft", {}, [{"step": 1, **row} for row in logged])
    assert provenance.tokens(trained) == 180
    assert provenance.tokens(artifact("eval", {"all": {"answers": 8, "n": 4, "tokens": 20.5}})) == 164
    assert provenance.tokens(artifact("mmlu", {"all": {"answers": 8, "tokens": None}})) is None
    assert provenance.tokens(artifact("score", {"elements": 3})) is None


def test_a_comparison_without_a_p_value_counts_in_the_correction():
    first, second = (Contrast((row,), ("A",), "RL") for row in "BC")
    value = Value(0.1, [0.1], 100, True, Interval(0.05, 0.15, 0.03))
    for other in (None, Value(0.1, [0.1, 0.1], 100, True, None)):
        incomplete = Results(None, {}, {first: value, second: other}, Artifacts(), {})
        assert incomplete.corrected_p("over_items") == {first: pytest.approx(0.06)}
