"""A file as people have it, `lorapar init` on it: its columns, the final answers, and a part held out."""

import re
from pathlib import Path

import pytest
import yaml

from stages.errors import ConfigError, DataError
from stages.init.final_answers import final_answer
from stages.init.own_rows import own_rows
from stages.records import read_jsonl

TEXTS = {
    # numbers, with units and currency
    "The total is $166.": "$166", "It costs €1,299.00 per year": "€1,299.00", "3,50 €": "3,50 €",
    "We ship to 27 countries.": "27", "Discount: 15%": "15%", "-4": "-4",
    "Roughly 3 business days": None,  # nothing says that the number answers
    "Order 4521 has left the warehouse.": None, "Between 3 and 5 days.": None,
    # yes and no, and letters
    "No.": "No", "Yes, within 30 days of the purchase.": "yes", "No-one is in on Sundays.": None,
    "Nothing is due before the end of next month, as far as we know.": None,
    "B": "B", "(c) Lisbon": "C", "D. None of these": "D",
    # dates and times are left to the person
    "2024-03-12": None, "12 March 2024": None, "The shop opens at 9:30 am.": None,
    "The lease ends on 31.12.2025.": None, "It arrives on March 12.": None,
    # words
    "New York City.": "New York City", "": None, "First multiply.\nThen add: 12.": None,
    # the end of a longer text
    "We ship 17*2=34 lamps. 22 come back, so 34-22=12. The total is 12 lamps.": "12",
    "He pays 20 and gets 2 back. Hence it costs $18.": "$18",
    "60 + 16 = $76 together. Order 12 costs $76.": None,
    "2 mats cost 2 * 30 = $60, so with shipping 60 + 16 = $76. The order costs $76.": "$76",
    "2 mats cost 2 * 30 = $60. Greta owes $120.": None,
    "France borders Spain, and its largest city lies on the Seine. The answer is Paris.": "Paris",
    "Take 5 of the 12 boxes to the store, and so on. So 5 or 7 boxes are left.": None,
}  # fmt: skip


def test_the_answer_of_a_short_text_is_what_a_person_would_say():
    assert {text: final_answer(text) for text in TEXTS} == TEXTS


WORKED = {"question": "How many?", "answer": "We add and obtain 4", "gold": "4"}
FILES = {
    "capitals.csv": ("Prompt,Completion\nCapital of Peru?,Lima\nCapital of Chad?,N'Djamena\n",
                     "Lima N'Djamena"),
    "spaces.csv": (" Question , Answer \nIs it open?,yes\nIs it free?,no\n", ""),
    "support.tsv": ("Query\tReply\nWhat is the total?\tThe total is $166.\nThe fee?\tIt is $5.\n", "$166 $5"),
    "last_words.csv": ("User Question,Model Answer\nHow many?,It is 4.\nHow old?,He is 5.\n", "4 5"),
    "golds.csv": ("problem,solution,final_answer\nHow many?,We add and obtain 4,4\n", ""),
    "worked_answers.csv": ("problem,solution,answer\nHow many?,We add and obtain 4,4\n", ""),
    "numbers.jsonl": (
        '{"question": "How old?", "answer": 40}\n{"question": "Seats?", "answer": "We have 12 seats."}\n',
        "12",
    ),
    "chat.jsonl": ('{"user": "Is it warm?", "assistant": "Yes, it is 25 degrees."}\n', "yes"),
    "bare.jsonl": ('{"question": "1 + 1?", "answer": "2"}\n', None),
    "long.jsonl": ('{"prompt": "Tell me.", "completion": "' + "word " * 20 + '"}\n', None),
    "gold.jsonl": ('{"question": "1 + 1?", "gold": "2"}\n', None),
    "dolly.jsonl": ('{"instruction": "Sum up.", "context": "Long.", "response": "yes"}\n', None),
}  # fmt: skip
"""Name of a file → its text, and the final answers that are read; None where it is fine as it stands."""


@pytest.mark.parametrize("name", FILES)
def test_columns_are_found_by_the_names_that_people_use(tmp_path, name):
    text, golds = FILES[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    own = own_rows(str(tmp_path / name), tmp_path, {}, written := [])
    assert own.path.endswith(f"/{name}") is (not written) is (golds is None)
    if golds is None:
        return
    rows = [row for _, row in read_jsonl(Path(own.path))]
    assert written == [Path(own.path)] and len(rows) == text.count("\n") - (not name.endswith("jsonl"))
    assert all(row["question"] and row["answer"] for row in rows)
    assert " ".join(gold for _, gold in own.golds) == golds
    if name in ("golds.csv", "worked_answers.csv"):
        assert [{field: str(value) for field, value in row.items()} for row in rows] == [WORKED]


def test_what_a_person_says_of_the_columns_comes_first(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text("id,Frage,Antwort,Lösung\n1,Wie viel?,Zusammen 12.,12\n", encoding="utf-8")
    with pytest.raises(DataError, match="which column asks, and which answers. It has id, Frage") as caught:
        own_rows(str(file), tmp_path, {}, [])
    assert caught.value.hint == "--columns question=NAME,answer=NAME"
    with pytest.raises(ConfigError, match="--columns question=frag: no such column") as caught:
        own_rows(str(file), tmp_path, {"question": "frag"}, [])
    assert caught.value.hint.endswith("id, Frage, Antwort, Lösung")
    own = own_rows(str(file), tmp_path, {"question": "frage", "answer": "ANTWORT", "gold": "Lösung"}, [])
    [(_, row)] = read_jsonl(Path(own.path))
    assert row == {"id": "1", "question": "Wie viel?", "answer": "Zusammen 12.", "gold": "12"}
    assert not own.golds, "the person has said it"
    for head in ("Frage,answer,Weg", "question,Right answer,Weg", "question,gold,Weg,answer"):
        worked = "We add and obtain 4,Four" if head.endswith("answer") else "We add and obtain 4"
        file.write_text(f"{head}\nHow many?,4,{worked}\n", encoding="utf-8")
        columns = {"question": head.split(",")[0], "solution": "Weg"}
        own = own_rows(str(file), tmp_path / head, columns, [])
        assert [row for _, row in read_jsonl(Path(own.path))] == [WORKED]
    file.write_text("question,answer,Kind\nHow many?,4,Hard\n", encoding="utf-8")
    with pytest.raises(DataError, match="--columns system=Kind: a label is 'Hard', neither 1 nor 2"):
        own_rows(str(file), tmp_path, {"system": "Kind"}, [])


def test_too_few_rows_with_an_answer_are_said_with_one_that_has_none(tmp_path):
    file = tmp_path / "mixed.csv"
    file.write_text("Prompt,Completion\nOpen?,yes\nHow?,Press the red button twice then wait for it\n")
    own = own_rows(str(file), tmp_path, {}, [])
    few = "a final answer can be read from 1 of 2 rows, too few to use any; not, for example, from: "
    assert own.unread == f"{few}Press the red button twice then wait for it" and not own.golds


def test_a_table_becomes_two_parts_without_a_common_question(tiny, tmp_path, lorapar, monkeypatch):
    """A fifth of the questions, each with all of its rows; a failure leaves nothing of it."""
    monkeypatch.chdir(tmp_path)
    ways = ("What is the total of {} and 1?", " what is  the Total of {} and 1 ")  # of writing one question
    lines = [f"{ways[i // 250].format(i % 250)},The total is ${i % 250 + 1}." for i in range(300)]
    table = "\n".join(["Prompt,Completion", *lines, "Do you ship abroad?,yes"])
    Path("sales.csv").write_text(table, encoding="utf-8")
    done = lorapar("init", "sales.csv", "--model", "models/none")
    assert done.code == 66 and [path.name for path in Path().iterdir()] == ["sales.csv"]
    done = lorapar("init", "sales.csv", "--model", tiny)
    assert done.code == 0, done.err
    assert "sales.csv: question is Prompt, answer is Completion" in done.out
    assert "final answers, read from 301 rows" in done.out and "  The total is $1. → $1" in done.out
    train, test = (read_jsonl(Path(f"sales-{part}.jsonl")) for part in ("train", "test"))
    asked, held = (set(re.findall(r"\d+(?= and 1)|abroad", str(rows))) for rows in (train, test))
    assert not asked & held and len(asked | held) == 251 and len(held) == 50 and len(train) + len(test) == 301
    config = yaml.safe_load(Path("sales.yaml").read_text(encoding="utf-8"))
    assert config["run"] == "sales" and config["data"]["path"] == "sales-train.jsonl"
    assert config["eval"]["benchmarks"]["sales-test"]["path"] == "sales-test.jsonl"
    lorapar("init", "sales.csv", "--model", tiny, "--out", "whole.yaml", "--no-hold-out")
    whole = yaml.safe_load(Path("whole.yaml").read_text(encoding="utf-8"))
    assert whole["data"]["path"] == "sales-rows.jsonl" and "benchmarks" not in whole["eval"]


def test_changed_rows_stay_where_they_were(tiny, tmp_path, lorapar, monkeypatch):
    """`--update` divides the new ones, and leaves the config as it is."""
    monkeypatch.chdir(tmp_path)
    again = ["init", "sales.csv", "--update"]

    def divided() -> list[set[str]]:
        texts = [Path(f"sales-{part}.jsonl").read_text("utf-8") for part in ("test", "train")]
        return [set(re.findall(r"\d+(?= and 1)", text)) for text in texts]

    table = [f"What is the total of {i} and 1?,The total is {i + 1}." for i in range(50)]
    Path("sales.csv").write_text("\n".join(["Prompt,Completion", *table]), encoding="utf-8")
    assert "no config file sales.yaml" in lorapar(*again).err
    assert lorapar("init", "sales.csv", "--model", tiny).code == 0
    assert lorapar("init", "sales.csv", "--model", tiny).err.endswith("for changed rows: --update\n")
    Path("sales.yaml").write_text(config := Path("sales.yaml").read_text("utf-8") + "seed: 7\n", "utf-8")
    held, trained = divided()
    assert (len(held), len(trained)) == (10, 40)
    corrected, gone, *_ = sorted(held)
    table = [line.replace("total is", "total was") if f" {corrected} and" in line else line for line in table]
    table = [line for line in table if f" {gone} and" not in line]
    table += [f"What is the total of {i} and 1?,The total is {i + 1}." for i in range(50, 71)]
    Path("sales.csv").write_text("\n".join(["Prompt,Completion", *table]), encoding="utf-8")
    for changes in ("21 rows more, 1 changed, 1 gone", "0 rows more, 0 changed, 0 gone"):
        assert f"sales.csv: {changes}; next: lorapar run sales.yaml" in lorapar(*again).err
        held_now, trained_now = divided()
        assert trained < trained_now and held - {gone} < held_now
        assert (len(held_now), len(trained_now)) == (14, 56)
    assert "total was" in Path("sales-test.jsonl").read_text(encoding="utf-8")
    assert Path("sales.yaml").read_text(encoding="utf-8") == config and not Path("sales-rows.jsonl").exists()


def test_changed_rows_that_are_not_divided(tmp_path, lorapar, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("faq.csv").write_text(
        "Prompt,Completion\nWhy?,First press the red button twice then wait\n", "utf-8"
    )
    Path("faq-rows.jsonl").write_text('{"question": "Why?", "answer": "Wait."}\n', encoding="utf-8")
    for trained, told in (
        ("faq-rows.jsonl", "faq.csv: 0 rows more, 1 changed, 0 gone; next: lorapar run mine.yaml"),
        ("faq.csv", "data.path is faq.csv, no file that init wrote"),
        ("faq-train.jsonl", "no data file faq-train.jsonl"),
    ):
        Path("mine.yaml").write_text(f"model: {{name: m}}\ndata: {{path: {trained}}}\n", encoding="utf-8")
        assert told in lorapar("init", "faq.csv", "--update", "--out", "mine.yaml").err
    assert read_jsonl(Path("faq-rows.jsonl"))[0][1]["answer"].startswith("First press")
