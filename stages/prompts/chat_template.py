"""Applies a tokenizer and its chat template to texts, and says which arguments the template reads."""

from __future__ import annotations

import datetime
import functools
import json
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from stages.config import AUTO, MODES, ModesSection, PromptSection, prompt_under
from stages.errors import ConfigError, DataError, is_out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.prompts.marks import Marks

DATE = datetime.datetime(2024, 7, 26)
"""Date for chat templates that write today's, so that a prompt is the same on every day. It is the one that
the template of Llama 3.1 falls back to."""
_TODAY = re.compile(r"""\bstrftime_now\(\s*(["'])(.*?)\1\s*\)""")
FLAGS = ("enable_thinking", "thinking", "enable_reasoning")
SWITCHES: dict[str, Any] = {
    **dict.fromkeys((*FLAGS, "reasoning"), (False, True)),
    "reasoning_effort": ("no_think", "none", "low", "high"),
    "thinking_mode": ("disabled", "enabled"),
    "thinking_budget": (512, -1),
}
"""Argument of a chat template → its values, from no thought to much; a template may lack all but two."""
GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}
"""Names that transformers gives to every chat template."""


def chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], ask: bool = True, **arguments: Any
) -> str:
    """Render a chat, with the generation prompt if `ask`; ConfigError if the template refuses it.

    arguments: of the template, such as `enable_thinking`.
    """
    from jinja2 import TemplateError

    try:
        template = _dated(tokenizer.get_chat_template())
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=ask, chat_template=template, **arguments
        )
    except Exception as error:  # a template is a program: it may raise anything
        if is_out_of_memory(error):
            raise
        roles = ", ".join(message["role"] for message in messages)
        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        raise ConfigError(
            f"the chat template refuses a chat of {roles}: {kind}{error}",
            "do without a system message, or --set prompt.template=plain",
        ) from None


def _dated(template: str) -> str:
    # transformers from 5.24 on takes no function as an argument of a template, so the date is written in.
    return _TODAY.sub(lambda call: json.dumps(DATE.strftime(call[2])), template)


def with_modes(template: str, prompt: PromptSection, modes: ModesSection | None) -> str:
    """A chat template that renders a chat as training did, in the mode that its variable `mode` names.

    It defaults to auto. A system message of the chat's own stands in place of `prompt.system`. A wrong mode
    is the template's error, which servers pass on to those who ask.
    """
    names = MODES if modes else (AUTO,)
    head = "{%- set mode = mode if mode is defined and mode else 'auto' -%}"
    for mode in names:
        section = prompt_under(prompt, modes, mode)
        added = (getattr(modes, mode).system if modes else None) or ""
        assigned = {**section.chat_template_kwargs, "_added": added, "_system": section.system or ""}
        # JSON, but jinja calls null `none`.
        texts = {n: "none" if v is None else json.dumps(v, ensure_ascii=False) for n, v in assigned.items()}
        sets = "".join(f"{{%- set {name} = {text} -%}}" for name, text in texts.items())
        head += f"{{%- {'if' if mode == names[0] else 'elif'} mode == '{mode}' -%}}{sets}"
    wrong = f"mode is one of {', '.join(names)}"
    head += f"{{%- else -%}}{{{{- raise_exception('{wrong}') -}}}}{{%- endif -%}}"
    return head + _PREPEND + _dated(template)


_PREPEND = (
    "{%- if messages and messages[0]['role'] == 'system' -%}{%- if _added -%}"
    "{%- set own, _added = messages[0]['content'], '\\n\\n' ~ _added -%}"
    "{%- set own = own ~ _added if own is string else own + [{'type': 'text', 'text': _added}] -%}"
    "{%- set messages = [{'role': 'system', 'content': own}] + messages[1:] -%}{%- endif -%}"
    "{%- elif _system -%}"
    "{%- set messages = [{'role': 'system', 'content': _system}] + messages -%}{%- endif -%}{{- '' }}"
)
"""Puts the message of a mode behind the chat's own system message, or before a chat without one.

It ends in a print of nothing, so that no white space at the beginning of the template is stripped."""


def tokenise(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    """Tokenise a text; DataError if the model has no embedding of one of the tokens.

    special: with the tokens that the tokenizer puts around a text.
    """
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    embedded, highest = getattr(tokenizer, "embedded", None), max(ids, default=0)
    if embedded and highest >= embedded:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise DataError(
            f"the tokenizer writes {token} as token {highest}, and the model has {embedded} embeddings",
            "take the tokenizer that the model came with, or save the model after "
            "resize_token_embeddings(len(tokenizer))",
        )
    return ids


def ids_to_continue(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenise a text that the model continues: with what goes before it, and no EOS after it."""
    ids = tokenise(tokenizer, text, special=True)
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


@functools.lru_cache(maxsize=4)
def arguments_of(template: str) -> set[str]:
    """Return the names that a chat template reads and is not always given: the arguments that it may take."""
    from jinja2 import Environment, meta

    # transformers' mark around what an assistant says, which the template's output does not depend on.
    template = re.sub(r"{%-?\s*(?:end)?generation\s*-?%}", "", template)
    tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    return {name for name in meta.find_undeclared_variables(tree) - GIVEN if not name.endswith("_token")}


def check_arguments(tokenizer: PreTrainedTokenizerBase, arguments: dict[str, Any]) -> None:
    """Raise ConfigError for an argument that the chat template does not read, so that it does nothing."""
    names = arguments_of(tokenizer.get_chat_template()) if arguments else set()
    for name in arguments.keys() - names:
        raise ConfigError(
            f"prompt.chat_template_kwargs: the chat template reads no {name}",
            f"it reads {', '.join(sorted(names))}" if names else "leave it out",
        )


def thinking_switch(
    tokenizer: PreTrainedTokenizerBase, system: str | None = None
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the arguments of the chat template for no thought and for thoughts; None if it has no switch.

    A name in the template's source does not tell what it does: a switch changes the prompt, and the template
    takes both of its values. system: the message before the question.
    """
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": "?"})
    source = tokenizer.get_chat_template()
    names = arguments_of(source)
    for name in [name for name in SWITCHES if name in names]:
        *rare, least, most = SWITCHES[name]
        known = [value for value in rare if f"'{value}'" in source or f'"{value}"' in source]
        off, on = {name: next(iter(known), least)}, {name: most}
        with suppress(ConfigError):
            if chat(tokenizer, messages, **off) != chat(tokenizer, messages, **on):
                return off, on
    return None


def check_thought_limit(tokenizer: PreTrainedTokenizerBase, marks: Marks, setting: str) -> None:
    """Raise ConfigError if the model can think and its template does not tell by what a thought is closed."""
    if not marks.known and tokenizer.chat_template and thinking_switch(tokenizer):
        raise ConfigError(
            f"{setting}: the chat template does not show how a thought ends, so none can be ended early",
            "leave the limit out",
        )
