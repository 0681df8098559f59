"""`lorapar init --example`: configs and tables that come with lorapar, copied so that they still work."""

from pathlib import Path

import pytest

from stages.config.loading import read_with_extends
from stages.init import examples
from stages.pipeline.resolve import load
from stages.sweep import file


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", examples.names())
def test_every_example_is_copied_with_what_it_refers_to(name):
    path, *others = examples.write(name, None)
    assert path == Path(f"{name}.yaml")
    if name.startswith("tables/"):
        table = file.read(path)
        bases = [table.base, *(row["base"] for row in table.rows.values() if "base" in row)]
        assert all(load(Path(base)).model.name for base in bases)
    else:
        assert load(path).model.name
    for copy in (path, *others):
        text = copy.read_text(encoding="utf-8")
        assert "configs/" not in text and "$schema" not in text
        original = examples.FOLDER / copy
        if "tables" not in copy.parts:
            assert read_with_extends(copy) == read_with_extends(original)


def test_out_gives_an_example_another_name(lorapar, folder):
    said = lorapar("init", "--example", "demo", "--out", "mine.yaml").err
    assert said.endswith("wrote mine.yaml; next: lorapar plan mine.yaml\n")
    assert [path.name for path in folder.iterdir()] == ["mine.yaml"]
    assert "; next: lorapar sweep --dry-run tables/order" in lorapar("init", "--example", "tables/order").err
    done = lorapar("init", "--example", "tables/theta", "--out", "theta.yaml")
    assert done.code == 73 and "tables/theta refers to other files" in done.err
    assert not (folder / "theta.yaml").exists()


def test_an_unknown_name_is_told_where_the_names_are(lorapar):
    done = lorapar("init", "--example", "dmo")
    assert done.code == 78 and "no example 'dmo'\n  hint: their names: lorapar list examples" in done.err
    assert "  smoke  " in lorapar("list", "examples").out


def test_a_changed_file_is_not_overwritten(lorapar):
    lorapar("init", "--example", "paper/table1/qwq")
    assert lorapar("init", "--example", "paper/table1/vote3").code == 0  # its base is there, unchanged
    Path("paper/gsm8k-llama2-7b.yaml").write_text("seed: 1\n", encoding="utf-8")
    done = lorapar("init", "--example", "paper/table1/vote5")
    assert done.code == 73 and "paper/gsm8k-llama2-7b.yaml exists already" in done.err
    assert not Path("paper/table1/vote5.yaml").exists()


@pytest.mark.parametrize(
    "more", [["rows.jsonl"], ["--model", "m"], ["--example", "demo", "--test", "t.jsonl"]]
)
def test_rows_or_an_example(more, lorapar):
    done = lorapar("init", *more)
    assert done.code == 78 and "--example" in done.err
