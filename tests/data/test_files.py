"""Files as people have them: each is read, or refused with one sentence that says what to do."""

import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.config import DataSection, PromptSection
from stages.data.rows import read, read_rows
from stages.errors import DataError
from stages.labelling.personas import PersonaContext, personas
from stages.prompts.renderer import Renderer

PAIR = {"question": "Two and two?", "answer": "2 + 2 = 4.\n#### 4"}
TEXT = {"type": "text", "text": "Two and two?"}
HUMAN, GPT = {"from": "human", "value": "Two and two?"}, {"from": "gpt", "value": "#### 4"}


def chat(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    head = [{"role": "system", "content": system}] if system else []
    return [*head, *({"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts))]


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(row: dict[str, object]) -> bytes:
    pq.write_table(pa.Table.from_pylist([row]), file := io.BytesIO())
    return file.getvalue()


READ = {
    "rows.jsonl": lines(PAIR),
    "list.jsonl": json.dumps([PAIR], indent=1),
    "rows.csv": 'question,answer\r\n"Two and two?","2 + 2 = 4.\n#### 4"\r\n',
    "rows.tsv": 'question\tanswer\nTwo and two?\t"2 + 2 = 4.\n#### 4"\n',
    "alpaca.json": json.dumps([{"instruction": "Two and two?", "input": "", "output": "#### 4"}]),
    "sharegpt.json": json.dumps([{"conversations": [HUMAN, GPT]}]),
    "prompts.jsonl": lines({"prompt": "Two and two?", "completion": "#### 4"}),
    "excel.csv": "\ufeffquestion;answer\r\nTwo and two?;2 + 2 = 4,0. #### 4\r\n;\r\n",
    "parts.jsonl": lines({"messages": [{"role": "user", "content": [TEXT]}, GPT], "context": "c"}),
    "tabs.csv": "question\tanswer\nTwo and two?\t#### 4\n",
    "beside.jsonl": lines({"instruction": "Two and two?", "completion": "2 + 2 = 4.", "gold": 4}),
}
TOOL = {"role": "tool", "content": "c"}
IMAGE = {"role": "assistant", "content": [{"type": "image_url", "image_url": "x"}]}
REFUSED = {
    "empty.jsonl": ("", "empty.jsonl has no rows"),
    "broken.jsonl": ('{"question": 1\n{}\n[]', "2 × broken JSON line:\n  broken.jsonl:1: Expecting"),
    "list.jsonl": (lines(PAIR, {"question": "Q", "answer": [4]}), "list.jsonl:2: the answer must be text, a"),
    # In a field that nothing reads it would end classify after all votes.
    "half.jsonl": (lines({**PAIR, "note": ["\ud83d"]}), "half.jsonl:1: field note has bytes"),
    "image.parquet": (parquet({**PAIR, "image": b"\xff"}), "image.parquet:1: field image has bytes that"),
    "large.jsonl": ('{"question": "Q", "answer": 1e999}', "large.jsonl:1: 1e999 is too large"),
    "keys.json": ('[{"question": "Q", "question": "R"}]', "keys.json is not JSON: a field stands twice"),
    "digits.jsonl": (f'{{"question": "Q", "answer": {"7" * 5000}}}', "value has 5000 digits"),
    "unseen.jsonl": (lines({"question": "\u200b", "answer": "A"}), "unseen.jsonl:1: prompt or response"),
    "csv.jsonl": ("question,answer\na,b\nc,d\n", "is not JSON Lines: it begins with 'question,answer'"),
    "object.json": ('{"data": [1]}', "object.json is one object, not a list of rows"),
    "numbers.json": ("[1, 2, 3]", "numbers.json:1: expected an object, got int (lines 2, 3 as well)"),
    "short.csv": ("question,answer\na\nb\n", "short.csv:2: 1 fields, and the first line names 2 (line 3 as "),
    "twice.csv": ("question,question\na,b\n", "twice.csv: two columns are called 'question'"),
    "latin.csv": (b"question,answer\nCaf\xe9?,yes\n", "latin.csv is not UTF-8"),
    "wide.jsonl": (lines(PAIR).encode("utf-16-le"), "wide.jsonl is UTF-16LE, and must be UTF-8"),
    "tools.jsonl": (lines({"messages": [*chat("a", "b"), TOOL]}), "messages: tool calls are not supported"),
    "image.jsonl": (lines({"messages": [*chat("a"), IMAGE]}), "content must be text"),
    "differ.jsonl": (lines({"instruction": "I", "output": "good", "response": "bad"}), "their values differ"),
    "fields.jsonl": (lines({"text": "a"}), "fields.jsonl: cannot tell the format from the fields text"),
    "turns.jsonl": (lines({"messages": chat("a") * 2}), "expected user and assistant in turns"),
    "no.parquet": (b"PAR1 and more", "no.parquet is not a Parquet file"),
}


def source(path: Path, content: str | bytes, **settings) -> DataSection:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return DataSection(path=str(path), **settings)


@pytest.mark.parametrize("name", READ)
def test_common_files_are_read(tmp_path, name):
    content = READ[name].encode()
    for path, written in ((name, content), (f"{name}.gz", gzip.compress(content))):
        (example,) = read(source(tmp_path / path, written))
        assert (example.prompt, example.gold, example.turns) == ("Two and two?", "4", [])


def test_parquet(tmp_path):
    """Texts, null, and text that its writer has as bytes."""
    for n, row in enumerate(({**PAIR, "when": None}, {name: text.encode() for name, text in PAIR.items()})):
        (example,) = read(source(tmp_path / f"{n}.parquet", parquet(row)))
        assert (example.prompt, example.gold) == (PAIR["question"], "4")


def test_where_no_response_has_more_than_its_answer_texts_can_be_verified(tmp_path):
    """In JSON as in a table; beside one that has more, a text is a text. What is no text always can."""
    rows = [{"question": f"{answer}?", "answer": answer} for answer in (2.5, False, 0)]
    found = read(source(tmp_path / "rows.jsonl", lines(*rows)))
    assert [e.response for e in found] == [e.gold for e in found] == ["2.5", "false", "0"]
    answers = ["3", "3%", "3/7", "yes", "\\boxed{3}", "1,200", "(B)", "5 km"]
    for more, golds in (([], answers), (["So it is 3."], [None] * 9)):
        rows = [{"question": f"q{n}", "answer": answer} for n, answer in enumerate([*answers, *more])]
        found = read(source(tmp_path / "rows.jsonl", lines(*rows)))
        assert [(e.response, e.gold) for e in found] == list(zip([*answers, *more], golds, strict=True))
    table = "question,answer\n" + "".join(f'q{n},"{answer}"\n' for n, answer in enumerate(answers))
    assert [e.gold for e in read(source(tmp_path / "rows.csv", table))] == answers


def test_fields_that_no_model_sees_are_named(tmp_path, caplog):
    context = {**PAIR, "Context": "Two is a number.", "choices": ["3", "Two"], "Option_b": "3"}
    read(source(tmp_path / "rows.jsonl", lines(context)))
    assert "no model sees Context, Option_b, choices: write what a question needs into it" in caplog.text
    caplog.clear()
    read(source(tmp_path / "shown.jsonl", lines({**context, "question": "Two is a number. A) 3 B) Two?"})))
    assert not caplog.text


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_sentence(tmp_path, monkeypatch, name):
    content, message = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    source(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        read(DataSection(path=name))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_conversations(tmp_path, tokenizer):
    """The last answer, with what was said before, as voters see it."""
    row = {"messages": chat("One?", "1", "Two?", "#### 2", system="Count.")}
    rows = source(tmp_path / "chat.jsonl", lines(row))
    (last,) = read(rows)
    assert (last.prompt, last.response, last.gold) == ("Two?", "#### 2", "2")
    assert last.turns == [["Count.\n\nOne?", "1"]]
    assert read_rows(rows).format == "chat"
    for template in ("chat", "plain", "bare"):
        text = Renderer(tokenizer, PromptSection(template=template)).prompt(last.prompt, example=last)
        places = [text.index(part) for part in ("One?", "1", "Two?")]
        assert places == sorted(places)
    ballot = personas.pick("role_play")(last, PersonaContext("m", True))
    assert "One?\n\nAssistant: 1\n\nUser: Two?" in ballot.text[-1]["content"]
    alone = read(source(tmp_path / "one.jsonl", lines({"messages": chat("Two?", "#### 2")})))
    assert alone[0].id != last.id  # another question, by what was said before


def test_cells_of_a_table(tmp_path):
    """An empty one is an empty field, as NaN is."""
    text = "question,answer,note\nq0,,x\nq1,a1,\n,a2,\n"
    table = source(tmp_path / "a.csv", text, empty="drop")
    assert [(e.prompt, e.extra) for e in read(table)] == [("q1", {"note": None})]
    assert read_rows(table).empty == 2
    nan = lines({"question": "Q", "answer": float("nan")}, PAIR)
    assert [e.prompt for e in read(source(tmp_path / "a.jsonl", nan, empty="drop"))] == [PAIR["question"]]
