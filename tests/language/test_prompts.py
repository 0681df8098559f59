import pytest

from stages.config import DataSection, ModelSection, PromptSection
from stages.errors import ConfigError, DataError
from stages.language.prompts import IGNORED, Renderer
from stages.models.tokenizer import load_tokenizer
from stages.records import Example

EXAMPLE = Example("id", "2 + 2?", "It is 4.\n#### 4", "4")


@pytest.fixture
def tokenizer(tiny):
    return load_tokenizer(ModelSection(name=str(tiny)))


def test_chat_row(tokenizer):
    renderer = Renderer(tokenizer, PromptSection(system="Be brief."))
    row = renderer.row(EXAMPLE)
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(row.input_ids) == prompt + "It is 4.\n#### 4<|im_end|>"
    assert tokenizer.decode([i for i in row.labels if i != IGNORED]) == "It is 4.\n#### 4<|im_end|>"
    assert renderer.stop_ids == [tokenizer.eos_token_id]


def test_plain_row(tokenizer):
    row = Renderer(tokenizer, PromptSection(template="plain", answer_format="xml")).row(EXAMPLE)
    assert tokenizer.decode(row.input_ids).startswith("Question: 2 + 2?\nAnswer:\n<reasoning>\nIt is 4.\n</reasoning>")
    assert row.input_ids[-1] == tokenizer.eos_token_id


def test_no_chat_template(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="the tokenizer has no chat template") as caught:
        Renderer(tokenizer, PromptSection())
    assert caught.value.hint == "--set prompt.template=plain"


def test_without_pad_token_eos_pads_and_is_still_trained(tiny, tmp_path):
    import json
    import shutil

    shutil.copytree(tiny, tmp_path / "m")
    settings = json.loads((tmp_path / "m/tokenizer_config.json").read_text())
    settings["pad_token"] = None
    (tmp_path / "m/tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(ModelSection(name=str(tmp_path / "m")))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert Renderer(tokenizer, PromptSection()).row(EXAMPLE).labels[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(("policy", "kept"), [("drop", 1), ("truncate", 2)])
def test_rows_that_are_too_long(tokenizer, policy, kept):
    renderer = Renderer(tokenizer, PromptSection())
    long = Example("long", "2 + 2?", "x" * 300, None)
    with pytest.raises(DataError, match="longer than data.max_length 150: long has 3"):
        renderer.rows([EXAMPLE, long], DataSection(max_length=150))
    rows, counted = renderer.rows([EXAMPLE, long], DataSection(max_length=150, too_long=policy))
    assert (len(rows), counted) == (kept, 1)
    assert all(len(row.input_ids) <= 150 for row in rows)
