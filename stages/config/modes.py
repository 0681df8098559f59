"""Modes of one adapter; docs/thinking.md has the whole rule of which rows and prompts each has.

In SFT each has the rows that `ModesSection` names. RL asks System 2 rows under slow and auto, and replays
System 1 rows under all three. SFT's rows: `trained_by_sft` in lora/examples.py. RL's prompts:
`RlPrompts.from_labels` in lora/grpo/prompts.py; what a fast completion earns: `_calculate_rewards` in
lora/grpo/trainer.py. Texts of prompts: `renderers_of` in prompts/renderer.py. An export's template:
`with_modes` in prompts/chat_template.py.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from stages.config.fields import Section, Share, advanced, setting
from stages.config.sources import PromptSection, TemplateArguments

FAST, SLOW, AUTO = MODES = ("fast", "slow", "auto")


class ModeSection(Section):
    system: str | None = setting(None, "System message of the mode, appended to prompt.system.")
    chat_template_kwargs: TemplateArguments = advanced({})
    """Its arguments of the chat template, such as {enable_thinking: false}."""


class ModesSection(Section):
    fast: ModeSection = setting(..., "System 1 rows, answered at once.")
    slow: ModeSection = setting(..., "Worked rows of both systems.")
    auto: ModeSection = setting(ModeSection(), "System 1 rows answered at once, worked System 2 rows worked.")
    system1_under_slow: Share = setting(1)
    """Share of the System 1 rows with a response that SFT teaches under slow, too."""

    def conflicts(self, registries: Mapping[str, Any]) -> Iterator[str]:
        if len({getattr(self, mode).model_dump_json() for mode in MODES}) < len(MODES):
            yield f"{', '.join(MODES)} need three different messages or arguments of the chat template"


def prompt_under(prompt: PromptSection, modes: ModesSection | None, mode: str) -> PromptSection:
    """The prompt with the message and arguments of a mode, or as it is if there are no modes."""
    if modes is None:
        return prompt
    section: ModeSection = getattr(modes, mode or AUTO)
    messages = filter(None, (prompt.system, section.system))
    arguments = {**prompt.chat_template_kwargs, **section.chat_template_kwargs}
    return prompt.model_copy(
        update={"system": "\n\n".join(messages) or None, "chat_template_kwargs": arguments}
    )
