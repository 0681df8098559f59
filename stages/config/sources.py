"""The base model, rows, the prompt and the adapter."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import PositiveFloat, PositiveInt, field_validator

from stages.config.fields import (
    JsonValue,
    Section,
    advanced,
    advanced_unkeyed,
    registry_name,
    setting,
    unkeyed,
)

ALL_LINEAR = "all-linear"
"""PEFT's value of target_modules for all linear layers but the head."""

Engine = Annotated[str, registry_name("engines", also="auto")]


class ModelSection(Section):
    name: str = unkeyed(..., "Base model: a local folder or a hub id.")
    revision: str = advanced_unkeyed("main", "Branch, tag or commit of a hub model.")
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto")
    """Type of the base weights; auto: the checkpoint's, or what this machine computes fast in."""
    load_in_4bit: bool = setting(False)
    """QLoRA: base weights in NF4 with double quantisation; needs bitsandbytes."""
    device: Literal["auto", "cpu"] = advanced_unkeyed("auto")
    """auto: the GPU, or without one the CPU; cpu: hide all GPUs."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = advanced_unkeyed("auto")
    """Attention of transformers; on CPU eager is faster for short rows."""

    @property
    def title(self) -> str:
        """Last component of the path or hub id; role-playing voters are told this name."""
        return self.name.rstrip("/").split("/")[-1]

    @property
    def may_be_on_hub(self) -> bool:
        """True if the name can be a hub id, NAME or OWNER/NAME, and neither it nor OWNER is a folder here."""
        owner, slash, _ = self.name.partition("/")
        is_local = Path(self.name).exists() or (slash and Path(owner).is_dir())
        return not is_local and self.name.count("/") < 2 and self.name[0] not in "./~"

    @property
    def pinned_revision(self) -> str | None:
        """The revision of a hub model; None if it is a library's default, `main`, or the model is local."""
        return self.revision if self.may_be_on_hub and self.revision != "main" else None


class SourceSection(Section):
    path: str | None = unkeyed(None)
    """Rows: a file (JSON Lines, JSON, CSV, TSV, Parquet), or the hub id of a data set."""
    subset: str | None = setting(None, "Configuration (subset) of a hub data set.")
    split: str = setting("train", "Split of a hub data set.")
    revision: str = advanced_unkeyed("main", "Branch, tag or commit of a hub data set.")
    format: Literal["auto", "gsm8k", "alpaca", "messages", "prompt_completion"] = setting("auto")
    """messages: the last answer of each conversation."""
    limit: PositiveInt | None = setting(None, "Use only the first N rows; none: all.")
    empty: Literal["error", "drop", "keep"] = advanced("error")
    """Rows without a prompt, or without response, gold and test; keep: for rewards of your own."""
    duplicates: Literal["error", "first"] = advanced("error")
    """Rows that repeat prompt and response of another; first: drop all but the first."""


class DataSection(SourceSection):
    max_length: PositiveInt = setting(512, ignored_by="classify")
    """Longest training row (prompt and response) in tokens."""
    too_long: Literal["error", "drop", "truncate"] = setting("error", ignored_by="classify")
    """What to do with training rows longer than max_length."""


TemplateArguments = Annotated[dict[str, Any], JsonValue]


class PromptSection(Section):
    system: str | None = setting(None, "System message; none: the default of the chat template, if any.")
    chat_template_kwargs: TemplateArguments = advanced({})
    """Arguments of the chat template, such as {enable_thinking: false}."""
    template: Literal["chat", "plain", "bare"] = setting("chat")
    """chat: the tokenizer's; plain: `Question: … Answer:`; bare: the question and EOS."""
    answer_format: Literal["hash", "xml"] = setting("hash")
    """hash: `#### answer` in the last line; xml: <reasoning>…</reasoning><answer>…</answer>."""

    def conflicts(self, registries: Mapping[str, Any]) -> Iterator[str]:
        if self.system and self.template == "bare":
            yield "template bare has no system message; leave out system, or choose chat or plain"
        if self.template != "chat" and self.chat_template_kwargs:
            yield f"template {self.template} takes no chat_template_kwargs; choose chat"


SUBTRACTED = ("pissa", "olora")
"""Values of `init` for which PEFT subtracts the initial B₀A₀ from the base weights."""


class LoraSection(Section):
    r: PositiveInt = setting(8, "Rank of the adapter.")
    lora_alpha: PositiveFloat = setting(64, "LoRA α; the update BA is scaled by lora_alpha / r.")
    target_modules: list[str] = setting(
        ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"], min_length=1
    )
    """Modules of the base model that get an adapter; all-linear: all but the head."""
    init: Literal["normal", "pissa", "olora", "default"] = setting("normal")
    """normal: A and B ~ N(0, 0.01²), as in the paper; pissa, olora: with B₀A₀ subtracted; default: B = 0."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _all_linear(cls, modules: Any) -> Any:
        return [ALL_LINEAR] if modules == ALL_LINEAR else modules

    @property
    def compensated(self) -> bool:
        """True if the initial B₀A₀ is subtracted.

        PEFT would change the base weights by −B₀A₀; lorapar never changes them, so the adapter has to.
        """
        return self.init in SUBTRACTED
