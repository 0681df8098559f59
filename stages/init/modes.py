"""Finds the switch of a chat template that turns a model's thinking off and on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages.config import PromptSection
from stages.errors import ConfigError
from stages.prompts.chat_template import arguments_of
from stages.prompts.renderer import PROBE, Renderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SWITCHES: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "enable_thinking": ((False,), (True,)),
    "thinking": ((False,), (True,)),
    "enable_reasoning": ((False,), (True,)),
    "reasoning_effort": (("low", "minimal", "none"), ("high", "xhigh", "max", "medium")),
}
"""Argument of a chat template → its values for little or no thought, and for much, the first choice first."""


def modes_of(tokenizer: PreTrainedTokenizerBase, section: PromptSection) -> dict[int, dict[str, Any]]:
    """Return the arguments of the chat template for System 1 and System 2; empty if it has no switch.

    A name in the template's source does not tell what it does: a switch changes the prompt, and the template
    takes both of its values.
    """
    if section.template != "chat":
        return {}
    arguments = arguments_of(tokenizer.get_chat_template())
    for name, values in SWITCHES.items():
        if name in arguments:
            off, on = (_first_prompt(tokenizer, section, name, choice) for choice in values)
            if off and on and off[1] != on[1]:
                return {1: {name: off[0]}, 2: {name: on[0]}}
    return {}


def _first_prompt(
    tokenizer: PreTrainedTokenizerBase, section: PromptSection, name: str, values: tuple[Any, ...]
) -> tuple[Any, str] | None:
    """Return the first of the values that the template takes, and the prompt with it."""
    for value in values:
        try:
            with_value = section.model_copy(update={"chat_template_kwargs": {name: value}})
            return value, Renderer(tokenizer, with_value).prompt(PROBE)
        except ConfigError:
            continue
    return None
