import pytest

from stages.language.rewards import rewards

XML = "<reasoning>\n3 + 4 = 7\n</reasoning>\n<answer>\n7\n</answer>"
HASH = "3 + 4 = 7.\n#### 7"


@pytest.mark.parametrize("name", rewards.names())
@pytest.mark.parametrize(("text", "style"), [(XML, "xml"), (HASH, "hash")])
def test_the_ideal_answer_earns_one_of_each(name, text, style):
    assert rewards.pick(name)(completions=[text], gold=["7"], answer_format=[style]) == [1.0]


@pytest.mark.parametrize("name", rewards.names())
@pytest.mark.parametrize("style", ["xml", "hash"])
def test_empty_text_earns_nothing(name, style):
    assert rewards.pick(name)(completions=["", "I do not know"], gold=["7"] * 2, answer_format=[style] * 2) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("correctness", XML.replace("7\n</answer>", "8\n</answer>"), 0.0),
        ("integer", XML.replace("7\n</answer>", "7.5\n</answer>"), 0.0),
        ("strict_format", XML.replace("\n", ""), 0.0),
        ("soft_format", XML.replace("\n", ""), 1.0),
        ("tag_count", XML + "\nand so on", 1 - 0.002 * 10),
        ("tag_count", XML.replace("<reasoning>\n", ""), 0.75),
    ],
)
def test_partial_answers(name, text, value):
    assert rewards.pick(name)(completions=[text], gold=["7"], answer_format=["xml"]) == pytest.approx([value])
