import gzip
import json

import pytest
from conftest import make_step

from stages.benchmarks import jsonl
from stages.config import BenchmarkSection, DataSection, SourceSection
from stages.data import rows as data
from stages.engines import Pool
from stages.errors import ConfigError, DataError, MissingInputError
from stages.pipeline.identity import of_voters
from stages.records import read_jsonl
from stages.store.digests import DigestCache


def written(tmp_path, *rows, name="data.jsonl"):
    path = tmp_path / name
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (gzip.open(path, "wt") if name.endswith("gz") else path.open("w")).write(text)
    return SourceSection(path=str(path))


def read(tmp_path, *rows, **settings):
    return data.read(written(tmp_path, *rows).model_copy(update=settings))


def refused(tmp_path, *rows, error=DataError):
    with pytest.raises(error) as caught:
        read(tmp_path, *rows)
    return str(caught.value).replace(str(tmp_path), "")


@pytest.mark.parametrize(
    ("row", "prompt", "response", "gold"),
    [
        ({"question": "Q", "answer": "2+2=4\n#### 4"}, "Q", "2+2=4\n#### 4", "4"),
        ({"instruction": "I", "input": "X", "output": "O"}, "I\n\nX", "O", None),
        ({"instruction": "I", "context": "", "response": "O", "category": "c"}, "I", "O", None),
        (
            {"messages": [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]},
            "U",
            "A",
            None,
        ),
        ({"prompt": "P", "completion": "C", "gold": 7}, "P", "C", "7"),
    ],
)
def test_formats_are_detected(tmp_path, row, prompt, response, gold):
    (example,) = read(tmp_path, row)
    assert (example.prompt, example.response, example.gold) == (prompt, response, gold)


def test_extra_fields_are_kept_and_the_id_is_of_the_content(tmp_path):
    (one,) = read(tmp_path, {"question": "Q", "answer": "A", "level": 3})
    (two,) = read(tmp_path, {"answer": "A", "question": "Q"})
    assert one.extra == {"level": 3}
    assert one.id == two.id


def test_gzip_and_byte_order_mark_and_line_separator(tmp_path):
    text = '\ufeff{"question": "a\u2028b", "answer": "A"}'
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress((text + "\r\n\n").encode()))
    (example,) = data.read(SourceSection(path=str(path)))
    assert example.prompt == "a\u2028b"


def test_broken_lines_are_named_and_counted(tmp_path):
    text = refused(tmp_path, '{"question": 1', {"question": "Q", "answer": "A"}, "[]")
    assert text.startswith("2 × broken JSON line:\n  /data.jsonl:1: Expecting")
    assert "/data.jsonl:3: expected an object, got list" in text


def test_bad_fields_are_named(tmp_path):
    good = {"question": "Q", "answer": "A"}
    assert refused(tmp_path, good, {"question": "Q2", "answer": 4}) == (
        "bad row: /data.jsonl:2: field answer must be text, got int"
    )
    assert (
        refused(tmp_path, good, {"question": " ", "answer": "A"})
        == "bad row: /data.jsonl:2: prompt or response is empty"
    )


def test_empty_rows_may_be_left_out(tmp_path):
    pairs = [("Q", "A"), (" ", "A"), ("Q2", ""), ("Q3", "A3")]
    path = written(tmp_path, *({"question": q, "answer": a} for q, a in pairs)).path
    with pytest.raises(DataError, match=r"(?s)2 × bad row.*data.jsonl:2.*data.jsonl:3") as caught:
        data.read(DataSection(path=path))
    assert "empty: drop leaves out empty ones" in caught.value.hint
    assert [e.prompt for e in data.read(DataSection(path=path, empty="drop"))] == ["Q", "Q3"]


def test_a_damaged_gzip_file_and_half_a_surrogate_pair(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    packed = bytearray(gzip.compress(b'{"question": "Q", "answer": "A"}\n' * 50))
    packed[len(packed) // 2] ^= 0xFF
    path.write_bytes(packed)
    with pytest.raises(DataError, match="damaged gzip file|broken JSON"):
        data.read(SourceSection(path=str(path)))
    text = refused(tmp_path, '{"question": "\\ud83d", "answer": "A"}')
    assert text == "bad row: /data.jsonl:1: field question has half of a surrogate pair"


def test_a_voter_is_the_commit_that_it_names(smoke, monkeypatch):
    """In its journal's name, and in what is loaded."""
    commit = "0123456789" * 4
    voter = f"{{model: org/judge, revision: {commit}, engine: transformers, persona: steps}}"
    config = smoke(f"classify.voters=[{voter}]")
    cache = DigestCache(config.root / "digests.json")
    assert of_voters(config, cache)["voters"] == [commit]

    def seen(pool, served, *_):
        raise ConfigError(f"{served.model.name} at {served.model.revision}")

    monkeypatch.setattr("stages.classify.resolve", lambda model: "float32")
    monkeypatch.setattr(Pool, "get", seen)
    with pytest.raises(ConfigError, match=f"org/judge at {commit}"):
        make_step(config, "classify:train")


def test_duplicates(tmp_path):
    row = {"question": "Q", "answer": "A"}
    assert refused(tmp_path, row, row) == "duplicate id: /data.jsonl:2 repeats /data.jsonl:1"
    assert len(read(tmp_path, row, row, duplicates="first")) == 1


def test_empty_unknown_missing(tmp_path):
    assert refused(tmp_path) == "/data.jsonl has no rows"
    assert refused(tmp_path, {"a": 1}) == "/data.jsonl: cannot tell the format from the fields a"
    with pytest.raises(MissingInputError, match="no file"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(MissingInputError, match="is a folder, not a file"):
        read_jsonl(tmp_path)


def test_a_multi_turn_conversation_is_refused(tmp_path):
    turns = [{"role": r, "content": "x"} for r in ("user", "assistant", "user", "assistant")]
    assert "expected user and assistant" in refused(tmp_path, {"messages": turns})


def test_limit_takes_the_first(tmp_path):
    rows = [{"question": str(i), "answer": "A"} for i in range(5)]
    assert [e.prompt for e in read(tmp_path, *rows, limit=2)] == ["0", "1"]


def test_items_of_an_own_benchmark_count_once(tmp_path):
    """Else two answers to one question would pass for two answers of one item."""
    path = tmp_path / "own.jsonl"
    rows = [
        {"prompt": "2 + 2?", "answer": 4},
        {"prompt": "B?", "answer": "B"},
        {"prompt": "2 + 2?", "answer": 4},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"duplicate id: .*own.jsonl:3 repeats .*own.jsonl:1"):
        jsonl.load(BenchmarkSection(path=str(path)))
    found = jsonl.load(BenchmarkSection(path=str(path), duplicates="first"))
    assert [(example.prompt, example.gold) for example in found] == [("2 + 2?", "4"), ("B?", "B")]
