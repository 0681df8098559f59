"""Pages: untrusted texts stay texts, figures have alternatives, and one run shows all that it has."""

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, Small, flags

from stages.errors import OutputError
from stages.evaluation.statistics import Interval
from stages.records import Sample
from stages.report import figures, files, run_page, table_page
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


def test_a_comparison_without_a_p_value_counts_in_the_correction():
    first, second = (Contrast((row,), ("A",), "RL") for row in "BC")
    value = Value(0.1, [0.1], 100, True, Interval(0.05, 0.15, 0.03))
    for other in (None, Value(0.1, [0.1, 0.1], 100, True, None)):
        incomplete = Results(None, {}, {first: value, second: other}, Artifacts(), {})
        assert incomplete.corrected_p("over_items") == {first: pytest.approx(0.06)}
