import pytest
from conftest import change_json
from pydantic import ValidationError
from tokenizers.processors import TemplateProcessing

from stages.config import BenchmarkSection, DataSection, ModelSection, ModesSection, PromptSection
from stages.errors import ConfigError, DataError
from stages.evaluation.grading import render_prompts
from stages.models.tokenizer import load_tokenizer
from stages.prompts.chat_template import chat
from stages.prompts.renderer import IGNORED, Renderer, renderers_of
from stages.records import Example

EXAMPLE = Example("id", "2 + 2?", "It is 4.\n#### 4", "4")


def test_a_marker_before_eos_ends_an_answer_too(tokenizer):
    """As in Phi-3, whose template writes `<|end|>` after an answer, and then EOS."""
    tokenizer.add_tokens("<|end|>", special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}<|end|>\n{% endfor %}"
        "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    )
    marker = tokenizer.convert_tokens_to_ids("<|end|>")
    assert Renderer(tokenizer, PromptSection()).stop_ids == sorted({marker, tokenizer.eos_token_id})
    # A template that writes the date writes the same one on every day.
    tokenizer.chat_template = "Today Date: {{ strftime_now('%d %b %Y') }} {{ messages[-1]['content'] }}"
    asked = [{"role": "user", "content": "Hi"}]
    assert chat(tokenizer, asked) == "Today Date: 26 Jul 2024 Hi"
    tokenizer.chat_template = '{% if strftime_now is defined %}{{ strftime_now( "%Y-%m-%d" ) }}{% endif %}'
    assert chat(tokenizer, asked) == "2024-07-26"


def test_plain_row(tokenizer):
    row = Renderer(tokenizer, PromptSection(template="plain", answer_format="xml")).row(EXAMPLE)
    assert tokenizer.decode(row.input_ids).startswith(
        "Question: 2 + 2?\nAnswer:\n<reasoning>\nIt is 4.\n</reasoning>"
    )
    assert row.input_ids[-1] == tokenizer.eos_token_id
    renderer = Renderer(tokenizer, PromptSection(template="plain", system="Be brief."))
    text, ids = renderer.few_shot("About cats.\n\n", [("a?", "1")], "b?")
    assert text == "Be brief.\n\nAbout cats.\n\na? 1\n\nb?" and ids == renderer.ids(text)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="the tokenizer has no chat template") as caught:
        Renderer(tokenizer, PromptSection())
    assert caught.value.hint == "--set prompt.template=plain"


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_the_message_of_a_mode_stands_behind_that_of_the_prompt(tokenizer, template):
    modes = ModesSection(fast={"system": "Be quick."}, slow={"system": "Think."})
    renderers = renderers_of(tokenizer, PromptSection(system="Be good.", template=template), modes)
    texts = {mode: renderer.prompt(EXAMPLE.prompt) for mode, renderer in renderers.items()}
    assert "Be good.\n\nBe quick." in texts["fast"] and "Be good.\n\nThink." in texts["slow"]
    assert "Be good." in texts["auto"] and "Think" not in texts["auto"]
    for mode, renderer in renderers.items():
        assert tokenizer.decode(renderer.row(EXAMPLE).input_ids).startswith(texts[mode])
    with pytest.raises(ValidationError, match="need three different messages"):
        ModesSection(fast={"system": "Be quick."}, slow={})
    with pytest.raises(ValidationError, match="template bare has no system message"):
        PromptSection(template="bare", system="Be brief.")
    tokenizer.chat_template = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ConfigError, match="two modes have the same prompt"):
        renderers_of(tokenizer, PromptSection(), modes)


@pytest.mark.parametrize("added", ["$A", "<|im_start|> $A", "<|im_start|> $A <|im_end|>"])
def test_bare_row(tokenizer, added):
    """The question, one EOS, the answer, one EOS, whatever the tokenizer adds; BOS only where it adds one."""
    used = [mark for mark in ("<|im_start|>", "<|im_end|>") if mark in added]
    marks = [(mark, tokenizer.convert_tokens_to_ids(mark)) for mark in used]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=added, special_tokens=marks)
    renderer = Renderer(tokenizer, PromptSection(template="bare"))
    row = renderer.row(EXAMPLE)
    bos = "<|im_start|>" if marks else ""
    assert tokenizer.decode(row.input_ids) == f"{bos}2 + 2?<|im_end|>It is 4.\n#### 4<|im_end|>"
    assert tokenizer.decode([i for i in row.labels if i != IGNORED]) == "It is 4.\n#### 4<|im_end|>"
    assert renderer.stop_ids == [tokenizer.eos_token_id]
    assert renderer.prompt("b", [("a", "1")]) == "a<|im_end|>1<|im_end|>b<|im_end|>"
    assert tokenizer.decode(renderer.few_shot("", [], "def f():")[1]) == f"{bos}def f():"


def test_only_plain_stops_at_the_next_question(tokenizer):
    for template, stop in (("chat", ()), ("plain", ("\nQuestion:",)), ("bare", ())):
        renderer = Renderer(tokenizer, PromptSection(template=template))
        (asked,) = render_prompts([EXAMPLE], BenchmarkSection(kind="gsm8k"), renderer)
        assert (asked.stop, asked.ids) == (stop, renderer.ids(renderer.prompt("2 + 2?")))


def test_without_pad_token_eos_pads_and_is_still_trained(model_copy):
    change_json(model_copy / "tokenizer_config.json", pad_token=None)
    tokenizer = load_tokenizer(ModelSection(name=str(model_copy)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert Renderer(tokenizer, PromptSection()).row(EXAMPLE).labels[-1] == tokenizer.eos_token_id


def test_an_answer_ends_where_the_model_says(model_copy):
    """As GLM's, which end at the next turn's `<|user|>`, by generation_config.json alone."""
    (model_copy / "generation_config.json").write_text('{"eos_token_id": [2, 5]}', encoding="utf-8")
    assert Renderer(load_tokenizer(ModelSection(name=str(model_copy))), PromptSection()).stop_ids == [2, 5]


def test_rows_that_are_too_long(tokenizer):
    renderer = Renderer(tokenizer, PromptSection())
    long = Example("long", "2 + 2?", "x" * 300, None)
    with pytest.raises(DataError, match="longer than data.max_length 150: long has 3"):
        renderer.rows([EXAMPLE, long], DataSection(max_length=150))
    for policy, kept in (("drop", 1), ("truncate", 2)):
        rows, counted = renderer.rows([EXAMPLE, long], DataSection(max_length=150, too_long=policy))
        assert (len(rows), counted) == (kept, 1) and all(len(row.input_ids) <= 150 for row in rows)
