"""Pages: numbers stand where they belong, untrusted texts stay texts, and one run shows all that it has."""

import json
import re
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, Small, flags

from stages.errors import OutputError
from stages.evaluation.statistics import Interval
from stages.records import Sample, write_jsonl
from stages.report import comparison, figures, run_page, table_page, two_runs
from stages.report.frontier import frontier
from stages.report.page import MARKS, Grid, PageSection, Text, render, write
from stages.store.artifacts import Artifact
from stages.sweep.file import Compare, TableFile
from stages.sweep.results import Artifacts, Results
from stages.sweep.table import Contrast, Table
from stages.sweep.values import Value

NARROWEST = 500
"""Pixels below which a headless browser makes no window."""
EVIL = '<script>alert(1)</script><img src=x onerror=alert(2)> & "quoted"'


def test_texts_of_people_stay_texts():
    page = render(EVIL, [EVIL], [PageSection("a", "A", [Grid([EVIL], [[EVIL, EVIL]], EVIL), Text(EVIL)])])
    assert "<script" not in page and "<img" not in page and page.count("&lt;script&gt;") == 9
    table = Grid(["", "a|b"], [["*x*", "1\n2"]]).markdown()
    assert table == "|  | a\\|b |\n| --- | --- |\n| \\*x\\* | 1; 2 |"


def value(mean: float, reach: float = 0) -> Value:
    """An accuracy, with an interval that reaches so far to both sides."""
    return Value(mean, n=9, over_items=Interval(mean - reach, mean + reach) if reach else None)


def test_one_column_over_another():
    series = {"QKV": [(0.4, value(0.5, 0.1)), (0.1, value(0.3))]}
    drawn = figures.line_plot(series, {"QKV": [(0.3, 20.0)], "GUD": [(0.2, 12.0)]}, {"base": 13.3}, "x", "y")
    (axes,) = drawn.axes
    by_label = {line.get_label(): line for line in axes.lines}
    assert list(by_label["QKV"].get_xdata()) == [0.1, 0.4] and list(by_label["QKV"].get_ydata()) == [30, 50]
    assert list(by_label["GUD, published"].get_ydata()) == [12.0]
    assert set(by_label["base"].get_ydata()) == {13.3}
    (reach,) = [line for line in axes.lines if list(line.get_xdata()) == [0.4, 0.4]]
    assert list(reach.get_ydata()) == pytest.approx([40, 60])  # an interval in per cent


def test_a_figure_is_one_element_in_the_ink_of_the_page():
    of_names = [{name: [(1, value(0.5, 0.1))]} for name in ("published", "two, %")]
    text, another = (figures.svg(figures.line_plot(series, {}, {}, "x", "y")) for series in of_names)
    assert text.startswith("<svg ") and text.rstrip().endswith("</svg>") and text.count("<svg ") == 1
    assert "currentColor" in text and figures.INK not in text and "published" in text  # text is text
    # Parts of unlike figures have unlike names.
    names, others = (set(re.findall(r'\bid="([^"]+)"', each)) for each in (text, another))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= names and not names & others


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
    done = lorapar("report", "configs/smoke.yaml", file, *smoke_flags, "--out", tmp_path / "page")
    code, problem = (78, "configs/smoke.yaml is not a table") if table else (66, "nothing to compare")
    assert done.code == code and problem in done.err


def test_only_an_earlier_report_is_replaced_and_a_full_disk_leaves_no_half(tmp_path, full_disk):
    paths = [tmp_path / name for name in ("report.html", "a.csv")]
    texts = {path: MARKS[path.suffix] + "new" for path in paths}
    with pytest.raises(OSError, match="full"):
        write(texts)
    assert not list(tmp_path.iterdir())
    for path in paths:
        path.write_bytes(b"mine")
        with pytest.raises(OutputError, match=f"{path.name} exists already, and is not of a report"):
            write(texts)
        path.write_bytes(MARKS[path.suffix].encode())
    with pytest.raises(OSError, match="full"):
        write(texts)


def test_a_run_shows_what_it_has_and_names_what_is_missing(run, lorapar, tmp_path, monkeypatch):
    report = ("report", "configs/smoke.yaml", *run, "--out", tmp_path)
    done = lorapar(*report)
    assert done.code == 0, done.err
    page = (tmp_path / "report.html").read_text()
    assert re.findall("<h2>(.*)</h2>", page) == ["Results", "Training", "Elements", "Labels"]
    tile = r"<p>(\w+) on demo</p><p class=\"figure\">[\d.]+.%</p><p class=\"quiet\">\d+ tokens</p>"
    assert re.findall(tile, page) == ["Base", "SFT"]
    assert (
        page.index('class="tiles"') < page.index("demo: SFT answers") < page.index("against the base model")
    )
    assert '<th scope="row">tokens, system 2</th>' in page
    assert page.count('role="img"') == page.count("<figure") == page.count("<svg")
    assert '<td data-head="SFT"' in page and "accuracy on demo over mean tokens of an answer</text>" in page
    done = lorapar(*report[:-2], "--json")
    base, sft = (each for each in json.loads(done.out)["demo"] if each["group"] == "all")
    assert (sft["target"], sft["against"], sft["metrics"]["n"]) == ("sft", "base", base["accuracy"]["n"])
    assert lorapar(*report[:-2]).code == lorapar(*report, "--json").code == 78
    assert "System 1 importance</text>" in page and "mean tokens of an answer</text>" in page
    assert "https://" not in page.replace("http://www.w3.org", "") and "<script" not in page
    monkeypatch.setattr(figures, "svg", lambda figure: "<svg></svg>")  # they take a while
    lorapar(*report, "--set", "eval.targets=[base, sft, rl]")
    page = (tmp_path / "report.html").read_text()
    assert "Not made yet: eval:rl@demo." in page and "lorapar run configs/smoke.yaml" in page


def test_a_page_on_two_runs_says_in_which_settings_they_differ(run, lorapar, tmp_path):
    other = tmp_path / "other.yaml"  # its base is the same, and nothing of it is trained
    other.write_text((ROOT / "configs/smoke.yaml").read_text().replace("seed: 0", "seed: 5"))
    report = ("report", "configs/smoke.yaml", other, *run, "--out", tmp_path / "page")
    done = lorapar(*report)
    assert done.code == 0, done.err
    page = (tmp_path / "page/report.html").read_text()
    assert re.findall('<th scope="row">(.*?)</th>', page) == ["base", "seed"] and "+0.0 [" in page
    assert lorapar(*report, other).code == 78


MEASURE = """<script>
const contrast = c => c.match(/[0-9.]+/g).slice(0, 3).reduce((sum, x) => sum + Number(x), 0);
const style = getComputedStyle(document.body);
const fetched = performance.getEntriesByType('resource').length;
document.title = [document.documentElement.scrollWidth, fetched,
  contrast(style.color) < contrast(style.backgroundColor) ? 'light' : 'dark',
  [...document.querySelectorAll('.wide')].every(x => x.tabIndex === 0)].join(' ');
</script></body>"""


@pytest.mark.slow
@pytest.mark.parametrize(("width", "theme"), [(420, "light"), (1280, "dark")])
def test_a_browser_shows_pages_on_a_run_and_on_a_table(run, lorapar, tmp_path, width, theme):
    """Nothing is wider than the screen or fetched, tables can be reached by keyboard, and dark is dark."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser is installed")
    (tmp_path / "table.yaml").write_text(
        f"title: One\nbase: {ROOT / 'configs/smoke.yaml'}\nrows: {{a: {{}}}}\nseeds: [0]\n"
        "columns: {base: base@demo, SFT: sft@demo}\n"
    )
    for source in ("configs/smoke.yaml", tmp_path / "table.yaml"):
        assert lorapar("report", source, *run, "--out", tmp_path).code == 0
        text = (tmp_path / "report.html").read_text()
        (tmp_path / "probe.html").write_text(text.replace("</body>", MEASURE))
        dark = ["--blink-settings=preferredColorScheme=0"] if theme == "dark" else []
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", *dark]
        command = [browser, *options, "--dump-dom", str(tmp_path / "probe.html")]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
        wide, fetched, seen, reached = re.findall(r"<title>([^<]+)</title>", dom)[0].split()
        assert int(wide) <= max(width, NARROWEST) and fetched == "0" and reached == "true"
        assert seen == theme


def answered(right: str, **extra: int) -> list[Sample]:
    """Answers to items a, b, c, …: 1 is right; item a is System 1's."""
    return [
        Sample(item, 0, 1 + (item > "a"), "Q", "A", None, "1", "1", mark == "1", mark == "1", outcome, extra)
        for item, mark in zip("abcdefgh", right, strict=False)
        for outcome in ["correct" if mark == "1" else "wrong"]
    ]


def test_the_numbers_of_a_run_stand_where_they_belong():
    """Wilson's interval of 1 of 4 is [4.6, 69.9], and McNemar's p of three changes to the better is .25."""
    answers = {"base": {"all": answered("1000", tokens=12)}, "sft": {"all": answered("1111")}}
    grid = comparison.grid("demo", list(comparison.compared(answers)), {"sft": "auto"})
    assert grid.head == ["demo", "n", "base", "auto"]
    assert grid.rows == [
        ["all", "4", "25.0 [4.6, 69.9]", "100.0 [51.0, 100.0]\np = .25"], ["tokens, all", "", "12", "–"],
    ]  # fmt: skip


def test_two_runs_are_compared_on_the_items_of_both():
    runs = answered("1001"), answered("01111")[1:]
    pairs = two_runs.pairs(*({"demo": {"rl": {"all": samples}}, "own": {}} for samples in runs))
    ((first, second, more),) = (of["rl"] for of in pairs.values())
    assert (more.n, first.mean, second.mean, more.mean) == (3, *map(pytest.approx, (1 / 3, 1, 2 / 3)))


def test_the_verdict_says_what_the_last_step_changed_and_what_that_means():
    def said(**samples: list[Sample]) -> str:
        answers = {name: {"all": of_target} for name, of_target in samples.items()}
        overall = {"demo": {each.target: each for each in comparison.compared(answers)}}
        texts = run_page._verdicts(overall, {"demo": answers}, {"sft": "fast", "rl": "slow"})
        return " ".join(texts).replace("\N{NO-BREAK SPACE}", " ")

    answers = "demo: slow answers 87.5 % of 8 items correctly"
    gained = {"sft": answered("00000001"), "rl": answered("11111110")}
    chance = "which may be chance (p = .07, paired test over 8 items)."
    assert said(**gained) == f"{answers}: +75.0 points against fast, {chance}"
    # Of eight items that all change to the better, p is 2 / 2^8.
    assert "more than chance explains (p = .0078" in said(base=answered("0" * 8), rl=answered("1" * 8))
    gained["sft"] = answered("1111")
    untested = "which is not tested, because they answered different items."
    assert said(**gained) == f"{answers}: -12.5 points against fast, {untested}"
    assert said(rl=gained["rl"]) == f"{answers}."
    worse = said(base=answered("11111111"), sft=answered("0" * 8), rl=answered("1" * 8))
    assert worse.count("demo: ") == 2 and worse.endswith(
        "demo: fast answers 0.0 % of 8 items correctly: -100.0 points against the base model, "
        "more than chance explains (p = .0078, paired test over 8 items)."
    )
    assert said(base=answered("1"), rl=answered("0")).count("demo: ") == 1


def test_the_numbers_of_a_table_stand_where_they_belong():
    """A comparison that is not there yet, or has no p, counts in Holm's correction."""
    file = TableFile(
        title="T", base="b", rows={row: {} for row in "ABCD"}, columns={"RL": "rl@demo"},
        paper={"A": {"RL": 27.6}}, compare=[Compare(against="A", on="RL")],
    )  # fmt: skip
    config = SimpleNamespace(data=SimpleNamespace(path="d"))
    cells = [SimpleNamespace(row=row, seed=3, columns={}, config=config) for row in "ABCD"]
    both = Interval(0.05, 0.15, 0.03), Interval(0.04, 0.16, 0.01)
    compared = {
        Contrast("B", "A", "RL"): Value(0.1, [0.1, 0.1], 100, True, *both),
        Contrast("C", "A", "RL"): Value(0.1, [0.1, 0.1], 100, True, Interval(0.05, 0.15, 0.04)),
        Contrast("D", "A", "RL"): None,
    }
    values = {("A", "RL"): Value(0.276, [0.27, 0.282], 100, False, Interval(0.2, 0.36), Interval(0.26, 0.29))}
    results = Results(Table(Path("t.yaml"), file, cells), values, compared, Artifacts(), {})
    grid = table_page.grid(results)
    assert grid.head == ["", "RL, n 100"]
    assert grid.rows[:2] == [["A", "27.6 [20.0, 36.0] (paper: 27.6)\nseeds [26.0, 29.0]"], ["B", "–"]]
    grid = table_page.comparison_grid(results)
    assert grid.head == ["comparison", "points", "over items", "over seeds"]
    assert grid.rows == [
        ["RL: 'B' minus 'A'", "+10.0", "[+5.0, +15.0], p = .03\nby Holm: p = .09",
         "[+4.0, +16.0], p = .01\nby Holm: p = .03"],
        ["RL: 'C' minus 'A'", "+10.0", "[+5.0, +15.0], p = .04\nby Holm: p = .09", ""],
        ["RL: 'D' minus 'A'", "missing", "", ""],
    ]  # fmt: skip
    page = table_page.page([(results, "lorapar sweep t.yaml")])
    assert "2 of 3 comparisons are complete. Over items, no difference is told apart" in page
    apart = "RL: &#39;B&#39; minus &#39;A&#39; +10.0 (p = .03)"
    assert f"Over seeds, told apart from chance, in points: {apart}" in page


def test_a_voter_without_a_valid_vote(tmp_path):
    voter = dict.fromkeys(("system2_share", "held_out_auc", "held_out_interval"))
    (tmp_path / "report.json").write_text(json.dumps({"voters": {"judge": voter}}))
    text, grid = run_page._labels({"classify:train": Artifact(tmp_path, {"summary": {"examples": 3}})})
    assert text.text == "train: 3 examples." and grid.rows == [["judge", "–", "–"]]


def test_groups_are_those_of_their_items(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "samples.jsonl", map(asdict, answered("100")))
    monkeypatch.setattr(comparison, "current_artifact", lambda store, step: Artifact(tmp_path, {}))
    measures = comparison.measured(None, [SimpleNamespace(variant="sft@demo")], "system")["demo"]
    groups = {each.group: (each.metrics["n"], each.accuracy.mean) for each in measures}
    assert groups == {"all": (3, 1 / 3), "system 1": (1, 1), "system 2": (2, 0)}


def test_the_frontier_by_hand():
    """Fast is right on System 1 for one token, slow on both for five, auto is slow on System 2 alone."""

    def answered(right: str, tokens: str) -> list[Sample]:
        rows = zip(right, tokens, strict=True)
        return [
            Sample(
                str(i), 0, 1 + i // 2, "", "", "", "", "", r == "1", r == "1", "correct", {"tokens": int(n)}
            )
            for i, (r, n) in enumerate(rows)
        ]

    samples = {"fast": answered("1100", "1111"), "slow": answered("0111", "5555")}
    samples["auto"] = answered("1101", "1155")
    points, text = frontier(samples)
    assert {name: (tokens, value.mean) for name, (tokens, value) in points.items()} == {
        "fast": (1, 0.5), "slow": (5, 0.75), "auto": (3, 0.75), "choice by label": (3, 1), "oracle": (3, 1),
    }  # fmt: skip
    # A mixture of as many tokens is half fast, half slow: .625.
    assert "with as many tokens: +12.5 [" in text and "Auto has 0 % of what an oracle adds" in text
    samples["auto"] = answered("0000", "1155")
    assert frontier(samples)[1].endswith("Auto is 75.0 points below the better mode.")
    assert frontier({"fast": samples["fast"], "slow": samples["slow"]}) == ({}, "")
