"""Modes of one adapter; docs/thinking.md says who has which. Prompts: `prompts/renderer.renderers_of`; SFT's
rows: `lora/examples.trained_by_sft`; RL's prompts: `lora/grpo/prompts`, and what a fast completion earns:
`GrpoTrainer`; an export's template: `prompts/chat_template.with_modes`."""

from collections.abc import Iterator, Mapping
from typing import Any

from stages.config.fields import Section, Share, advanced, setting
from stages.config.sources import PromptSection, TemplateArguments

FAST, SLOW, AUTO = MODES = ("fast", "slow", "auto")


class ModeSection(Section):
    system: str | None = setting(None, "Message of the mode, behind that of prompt.system.")
    chat_template_kwargs: TemplateArguments = advanced({})
    """Its arguments of the chat template, such as {enable_thinking: false}."""


class ModesSection(Section):
    fast: ModeSection = setting(..., "System 1 rows, answered at once.")
    slow: ModeSection = setting(..., "Worked rows of both systems.")
    auto: ModeSection = setting(ModeSection(), "All rows in the style of their label.")
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
