"""Templates of models that can think: what a row, a prompt and an answer are with them."""

import re
from pathlib import Path

import pytest
import trl
from conftest import quick
from tokenizers import AddedToken

from stages.config import ModesSection, PromptSection, SftSection
from stages.errors import ConfigError
from stages.lora.examples import trained_by_sft
from stages.prompts import thoughts
from stages.prompts.answers import extract
from stages.prompts.chat_template import DATE, arguments_of
from stages.prompts.renderer import IGNORED, Renderer, renderers_of
from stages.records import Example, Labelled

TEMPLATES = {
    path.stem: path
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    if not path.stem.endswith("_training")  # changed ones, for a trainer that masks by them
}
FIRST = [name for name in TEMPLATES if not re.search(r"_v\d$", name)]
"""Without later versions of the same."""
REFUSED = {"idefics3", "llava_next", "smolvlm"}
"""Templates that take no text as content."""
WITHOUT_END = {"glm4moe"}
"""Templates that write nothing after the last answer."""
OWN_THOUGHT = {"deepseek_r1_distill", "deepseekv3"}
"""Templates that open a thought in the prompt, and leave it out of conversations."""
EMPTY = {"nemotron_3_5_lightning": "</think>", "nemotron_3_nano": "\n</think>\n",
         "nemotron_3_super": "\n</think>\n", "nemotron_3_ultra": "</think>"}  # fmt: skip
"""Templates that open a thought in one way in the prompt and in another in conversations → how one ends."""
QUESTION, ANSWER, THOUGHT = "2 + 2?", "It is 4.\n#### 4", "Two and two."


def written_by(renderer: Renderer, example: Example) -> str:
    return renderer.completion(example, renderer.prompt(example.prompt, example=example))


def _conversation(tokenizer, thought: str, **arguments) -> str:
    """What the template itself writes."""
    fields = {"reasoning_content": thought, "thinking": thought} if thought else {}
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER, **fields}]
    template = tokenizer.get_chat_template()
    for form in ("%Y-%m-%d", "%d %b %Y"):
        for quote in "'\"":
            template = template.replace(f"strftime_now({quote}{form}{quote})", f"'{DATE.strftime(form)}'")
    return tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, **arguments)


def _switches(tokenizer) -> list[dict]:
    known = arguments_of(tokenizer.get_chat_template())
    boolean = [{name: value} for name in ("enable_thinking", "thinking") if name in known for value in (0, 1)]
    return [{}, *boolean, *([{"reasoning_effort": "low"}] if "reasoning_effort" in known else [])]


@pytest.mark.parametrize("name", quick(TEMPLATES, *FIRST))
def test_a_row_is_what_the_template_writes(tokenizer, name):
    """Without a switch, off and on; with and without a thought."""
    tokenizer.chat_template = TEMPLATES[name].read_text(encoding="utf-8")
    for arguments in _switches(tokenizer):
        section = PromptSection(chat_template_kwargs=arguments)
        if name in REFUSED:
            with pytest.raises(ConfigError, match="does not show what it is asked"):
                Renderer(tokenizer, section)
            continue
        renderer = Renderer(tokenizer, section)
        for thought in ("", THOUGHT):
            example = Example("id", QUESTION, ANSWER, "4", thought=thought)
            prompt, completion = renderer.prompt(QUESTION, example=example), written_by(renderer, example)
            row = renderer.row(example)
            assert tokenizer.decode([token for token in row.labels if token != IGNORED]) == completion
            assert completion.endswith(renderer.end) and completion.count(ANSWER) == 1
            if name in OWN_THOUGHT:
                assert completion == f"{thought}\n</think>\n\n{ANSWER}{renderer.end}"
            elif name in EMPTY and thoughts.opened(prompt):
                assert completion == f"{thought}{EMPTY[name]}{ANSWER}{renderer.end}"
            elif thoughts.is_closed(prompt):  # thinking is off
                assert f"{prompt}{completion}".startswith(_conversation(tokenizer, "", **arguments).rstrip())
            else:
                written = _conversation(tokenizer, thought, **arguments).rstrip()
                if thought and thought not in written:  # it knows no thoughts in its last turn
                    before, _, rest = completion.partition(THOUGHT)
                    assert before.strip() in thoughts.TAGS
                    completion = rest.partition(thoughts.TAGS[before.strip()])[2].lstrip()
                    written = _conversation(tokenizer, "", **arguments).rstrip()
                assert prompt + completion == written + (renderer.end if name in WITHOUT_END else "")


ASKED = (
    "{% for m in messages %}<{{ m.role }}>BEFORE{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}"
)


@pytest.mark.parametrize(
    ("before", "prompt", "thought", "completion"),
    [
        # The prompt says that there is no thought, and conversations do not.
        ("", "<think>\n\n</think>\n\n", "Hm.", "It is 4.\n#### 4<|im_end|>"),
        # It opens one, in a line of its own or not, or in the tags of other models.
        ("", "<think>", "Hm.", "Hm.</think>It is 4.\n#### 4<|im_end|>"),
        ("", "<|START_THINKING|>", "", "<|END_THINKING|>It is 4.\n#### 4<|im_end|>"),
        ("", "[THINK]\n", "Hm.", "Hm.\n[/THINK]\n\nIt is 4.\n#### 4<|im_end|>"),
        # Conversations have an empty thought whatever the row has, or close one that nothing opened.
        ("<think>\n\n</think>\n\n", "<think>\n", "Hm.", "Hm.\n</think>\n\nIt is 4.\n#### 4<|im_end|>"),
        ("</think>", "<think>", "", "</think>It is 4.\n#### 4<|im_end|>"),
        # Conversations go on in an open thought with whatever they are given.
        ("<think>\n\n", "<think>\n\n", "", "\n</think>\n\nIt is 4.\n#### 4<|im_end|>"),
        ("<think>\n\n", "<think>\n\n", "Hm.", "Hm.\n</think>\n\nIt is 4.\n#### 4<|im_end|>"),
    ],
)
def test_thoughts_that_a_template_leaves_out(tokenizer, before, prompt, thought, completion):
    shown = "{% if m.role == 'assistant' %}" + before + "{% endif %}"
    tokenizer.chat_template = f"{ASKED.replace('BEFORE', shown)}<assistant>{prompt}{{% endif %}}"
    example = Example("id", QUESTION, ANSWER, "4", thought=thought)
    assert written_by(Renderer(tokenizer, PromptSection()), example) == completion


def test_a_thought_that_is_always_written_at_the_end_is_no_end(tokenizer):
    """As by Hunyuan's template, also where it is not asked for an answer."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role != 'user' %}<|im_end|>{% endif %}{% endfor %}"
        "<think>\n\n</think>\n"
    )
    renderer = Renderer(tokenizer, PromptSection())
    assert written_by(renderer, Example("id", QUESTION, ANSWER, "4")) == f"{ANSWER}<|im_end|>"
    assert renderer.stop_ids == [tokenizer.eos_token_id]


def test_another_way_to_write_answers_is_refused(tokenizer):
    """Such as a summary in place of the answer; before anything is asked of a model."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}bot: {% endif %}"
    )
    with pytest.raises(ConfigError, match="otherwise than it asks for one") as caught:
        Renderer(tokenizer, PromptSection())
    assert "prompt.template=plain" in caught.value.hint
    tokenizer.chat_template = tokenizer.chat_template.replace("bot: ", "assistant: ")
    renderer = Renderer(tokenizer, PromptSection())
    assert written_by(renderer, Example("", "?", "Yes.", None)) == "Yes.<|im_end|>"


def test_modes_of_a_template_that_thinks(tokenizer):
    """Under auto a System 1 row closes its thought at once, as the template itself writes that."""
    tokenizer.chat_template = TEMPLATES["qwen3"].read_text(encoding="utf-8")
    on = {"chat_template_kwargs": {"enable_thinking": True}}
    modes = ModesSection(
        fast={"chat_template_kwargs": {"enable_thinking": False}}, slow={"system": "Think."} | on, auto=on
    )
    labels = [Labelled(Example(f"{n}", QUESTION, ANSWER, "4", thought=THOUGHT), n, {}) for n in (1, 2)]
    labels.append(Labelled(Example("3", QUESTION, ANSWER, "4"), 2, {}))  # would unteach the thought
    renderers, texts = renderers_of(tokenizer, PromptSection(), modes), {}
    for mode, chosen in trained_by_sft(labels, SftSection(), modes, seed=0).items():
        texts |= {(mode, e.id): tokenizer.decode(renderers[mode].row(e).input_ids) for e in chosen}
    at_once, worked = "<think>\n\n</think>\n\n#### 4", f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"
    expected = {("fast", "1"): at_once, ("auto", "1"): at_once, ("auto", "2"): worked}
    expected |= {("slow", "1"): worked, ("slow", "2"): worked}
    assert texts.keys() == expected.keys()
    for key, text in expected.items():
        assert texts[key].endswith(f"assistant\n{text}<|im_end|>")
    assert "</think>" not in renderers["auto"].prompt(QUESTION)
    with pytest.raises(ConfigError, match="chat_template_kwargs: the chat template reads no enable_thnking"):
        Renderer(tokenizer, PromptSection(chat_template_kwargs={"enable_thnking": False}))


@pytest.mark.parametrize(("tag", "closing"), thoughts.TAGS.items())
def test_only_what_follows_the_thought_is_read(tokenizer, tag, closing):
    """Also where the prompt opens it, and where its tags are special tokens, which texts are without."""
    answer = f"{closing}\n#### 4"
    assert extract(f"{tag} 5? #### 5 {answer}", "hash").strict == "4"
    for cut_text in (f"{tag}5? #### 5\nno.", f"#### 4 {tag} or 5? #### 5", f"{tag}a{answer}\n{tag}or 5?"):
        assert extract(cut_text, "hash").flexible is None and extract(cut_text, "xml").flexible is None
    assert thoughts.split(f"{tag}\n5?\n{answer}") == ("5?", "#### 4")
    assert thoughts.split(f"{tag}\n5? #### 5") == ("", f"{tag}\n5? #### 5")
    for special in (False, True):
        tokenizer.add_tokens([AddedToken(text, special=special) for text in (tag, closing)], special)
        ids = tokenizer(f"5? #### 5 {answer}<|im_end|>", add_special_tokens=False)["input_ids"]
        for prompt in (f"user: 2 + 2?\nassistant: {tag}\n", "user: 2 + 2?"):
            assert extract(thoughts.decode(tokenizer, ids, prompt), "hash").strict == "4"
        cut = tokenizer("5? #### 5", add_special_tokens=False)["input_ids"]
        assert extract(thoughts.decode(tokenizer, cut, f"assistant: {tag}\n"), "hash").strict is None
        thoughts._special_ids.cache_clear()
