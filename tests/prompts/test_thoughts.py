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
from stages.lora.grpo.rollouts import ThoughtLimit
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
            elif thoughts.closed(prompt):  # thinking is off
                assert f"{prompt}{completion}".startswith(_conversation(tokenizer, "", **arguments).rstrip())
            else:
                written = _conversation(tokenizer, thought, **arguments).rstrip()
                if thought and thought not in written:  # it knows no thoughts in its last turn
                    before, _, rest = completion.partition(THOUGHT)
                    completion = rest.partition(thoughts.closing_of(before.strip()))[2].lstrip()
                    written = _conversation(tokenizer, "", **arguments).rstrip()
                assert prompt + completion == written + (renderer.end if name in WITHOUT_END else "")


ASKED = (
    "{% for m in messages %}<{{ m.role }}>BEFORE{{ m.content }}\n<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}"
)


@pytest.mark.parametrize(
    ("before", "prompt", "thought", "completion"),
    [
        # The prompt says that there is no thought, and conversations do not.
        ("", "<think:open></think:open>", "Hm.", "It is 4.\n#### 4\n<|im_end|>"),
        # It opens one, in a line of its own or not, or in the tags of other models.
        ("", "<think>", "Hm.", "Hm.</think>It is 4.\n#### 4\n<|im_end|>"),
        ("", "<|START_THINKING|>", "", "<|END_THINKING|>It is 4.\n#### 4\n<|im_end|>"),
        ("", "[THINK]\n", "Hm.", "Hm.\n[/THINK]\n\nIt is 4.\n#### 4\n<|im_end|>"),
        # Conversations have an empty thought whatever the row has, or close one that nothing opened.
        ("<think>\n\n</think>\n\n", "<think>\n", "Hm.", "Hm.\n</think>\n\nIt is 4.\n#### 4\n<|im_end|>"),
        ("</think>", "<think>", "", "</think>It is 4.\n#### 4\n<|im_end|>"),
        # Conversations go on in an open thought with whatever they are given.
        ("<think>\n\n", "<think>\n\n", "", "\n</think>\n\nIt is 4.\n#### 4\n<|im_end|>"),
        ("<think>\n\n", "<think>\n\n", "Hm.", "Hm.\n</think>\n\nIt is 4.\n#### 4\n<|im_end|>"),
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


TAGS = {tag: thoughts.closing_of(tag) for tag in (
    "<think>", "<thinking>", "[THINK]", "◁think▷", "<seed:think>", "<mm:think>", "<longcat_think>",
    "<|channel>thought", "<|START_THINKING|>", "<|inner_prefix|>", "<|begin_of_thought|>",
)} | {"(ponder)": "(say)", "<|think|>": "<|end|><|content|>"}  # fmt: skip
READ = (
    "{% for m in messages %}<{{ m.role }}>{% if m.thinking %}TAG{{ m.thinking }}END{% endif %}{{ m.content }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<assistant>{% if on %}TAG{% endif %}{% endif %}"
)


@pytest.mark.parametrize(("tag", "closing"), TAGS.items())
@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("special", [False, True])
def test_only_what_follows_the_thought_is_read(tokenizer, tag, closing, on, special):
    """Also where the prompt opens it, and where its tags are special tokens, which texts are without."""
    tokenizer.chat_template = READ.replace("TAG", tag).replace("END", closing)
    tokenizer.add_tokens([AddedToken(text, special=special) for text in (tag, closing)], special)
    renderer = Renderer(tokenizer, PromptSection(chat_template_kwargs={"on": on}))

    def read(text: str) -> str:
        ids = tokenizer(("" if on else tag) + text + "<|im_end|>", add_special_tokens=False)["input_ids"]
        return renderer.read(ids, renderer.prompt("2 + 2?"))

    text = read(f"5? #### 5 {closing}\n#### 4")
    assert extract(text, "hash").strict == "4" and thoughts.split(text) == ("5? #### 5", "#### 4")
    mentioned = read(f"5?{closing}Use the <reflect> tag.\n#### 4")
    assert extract(mentioned, "hash").strict == "4"
    for cut in ("5? #### 5\nno.", "Say </reflect> here. #### 5", f"a{closing}\n#### 4\n<think>or 5?"):
        assert extract(read(cut), "hash").flexible is None and extract(read(cut), "xml").flexible is None


def test_a_limit_that_cannot_be_applied_is_refused(tokenizer):
    """The template can ask for a thought, and no text of it says by what one is closed."""
    tokenizer.chat_template = TEMPLATES["gemma4_v2"].read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="rl.max_thinking_length: the chat template does not show how"):
        ThoughtLimit(6, 40, Renderer(tokenizer, PromptSection()))
    for name in ("gemma4_v3", "llama3"):  # it says so; there is nothing to ask, and rows may teach `<think>`
        tokenizer.chat_template = TEMPLATES[name].read_text(encoding="utf-8")
        ThoughtLimit(6, 40, Renderer(tokenizer, PromptSection()))


def test_a_tag_of_another_kind_neither_ends_a_thought_nor_begins_one():
    assert extract("Use the <thinking> tag.\n#### 4", "hash").strict == "4"
    assert extract("<think>perhaps </thinking> here. #### 5", "hash").flexible is None
    assert extract("[THINK]5? #### 5", "hash").flexible is None
    for row in (
        "Hm.\n</think>\n\n#### 4",
        "<think>Hm.</think>\n#### 4",
        "<think>\n</think>[THINK]Hm.[/THINK]#### 4",
    ):
        assert thoughts.split(row) == ("Hm.", "#### 4")
    for row in ("Use `</think>` to end.", "<think>Hm."):
        assert thoughts.split(row) == ("", row)


START = "{% for m in messages %}<{{ m.role }}>{% if m.role != 'assistant' %}{{ m.content }}<|im_end|>{% "
PROMPT = "{% endfor %}{% if add_generation_prompt %}<assistant>PROMPT{% endif %}"
CONVERSATIONS = {
    # Always an empty thought, as Kimi-K2-Thinking.
    "<think></think>{{ m.content }}<|im_end|>": (
        "", "<think>T</think>A<|im_end|>", "<think></think>A<|im_end|>"
    ),
    # Its end is also that of an answer, as Solar's; a switch writes an empty thought into the prompt.
    "{% if m.thinking %}<|think|>{{ m.thinking }}<|end|><assistant>{% endif %}<|content|>"
    "{{ m.content }}<|end|>": (
        "{% if effort == 'low' %}<|think|><|end|><assistant>{% endif %}",
        "<|think|>T<|end|><assistant><|content|>A<|end|><|im_end|>", "<|content|>A<|end|><|im_end|>",
    ),
    # The prompt opens it, and an answer has tags of words and tokens of its own, as Kimi K3's.
    "think<|sep|>{{ m.thinking }}<|end|>think<|sep|>say<|sep|>{{ m.content }}<|end|>say<|sep|><|im_end|>": (
        "think<|sep|>", "T<|end|>think<|sep|>say<|sep|>A<|end|>say<|sep|><|im_end|>",
        "<|end|>think<|sep|>say<|sep|>A<|end|>say<|sep|><|im_end|>",
    ),
    # Parts, as Ministral 3, and blocks, as Apertus.
    "{% if m.content is string %}{{ m.content }}{% else %}{% for b in m.content %}{% if b.thinking %}[THINK]"
    "{{ b.thinking }}[/THINK]{% endif %}{{ b.text }}{% endfor %}{% endif %}<|im_end|>": (
        "", "[THINK]T[/THINK]A<|im_end|>", "A<|im_end|>"
    ),
    "{% for b in m.content.blocks %}{{ '<|inner_prefix|>' if b.type == 'thoughts' else '<|inner_suffix|>' }}"
    "{{ b.text }}{% else %}{{ m.content }}{% endfor %}<|im_end|>": (
        "", "<|inner_prefix|>T<|inner_suffix|>A<|im_end|>", "A<|im_end|>"
    ),
    # Thoughts with calls of tools alone, answers in tags of their own, then another turn, as Cohere's.
    "{% if m.tool_calls %}<|START_THINKING|>{{ m.thinking }}<|END_THINKING|>{% endif %}<|START_RESPONSE|>"
    "{{ m.content }}<|END_RESPONSE|><|im_end|><assistant>": (
        "{% if effort == 'low' %}<|START_THINKING|><|END_THINKING|>{% endif %}",
        "<|START_THINKING|>T<|END_THINKING|><|START_RESPONSE|>A<|END_RESPONSE|><|im_end|>",
        "<|START_RESPONSE|>A<|END_RESPONSE|><|im_end|>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("written", CONVERSATIONS)
def test_marks_are_read_off_conversations(tokenizer, written):
    """A row, what closes its thought at a limit, and what ends it."""
    ends, (prompt, worked, at_once) = ("<|end|>", "<|END_RESPONSE|>", "<|sep|>"), CONVERSATIONS[written]
    tokenizer.add_tokens([AddedToken(text, special=True) for text in ends], True)
    tokenizer.embedded = None
    tokenizer.chat_template = f"{START}else %}}{written}{{% endif %}}{PROMPT.replace('PROMPT', prompt)}"
    for effort in ("high", "low") if "effort" in prompt else ("",):
        arguments = {"effort": effort} if effort else {}
        renderer = Renderer(tokenizer, PromptSection(chat_template_kwargs=arguments))
        for thought, expected in (("T", at_once if effort == "low" else worked), ("", at_once)):
            example = Example("", QUESTION, "A", None, thought=thought)
            assert written_by(renderer, example) == expected
            answer = [token for token in renderer.row(example).labels if token != IGNORED]
            assert answer[-1] in renderer.stop_ids
            text = renderer.read(answer, renderer.prompt(QUESTION))
            assert thoughts.after_thought(text) == "A" and ("T" in text) == (expected == worked)
        stopped = tokenizer.decode(renderer.stop_ids)
        assert ("<|end|>" not in stopped) and tokenizer.decode(renderer.closing) in worked
