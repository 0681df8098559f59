"""The base model, rows, the prompt and the adapter."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from stages.config.fields import Section, named, setting

ALL_LINEAR = "all-linear"
"""In place of target modules; PEFT's word."""

Engine = Annotated[str, named("engines", also="auto")]


class ModelSection(Section):
    name: str = setting(..., "Base model: a local folder or a hub id.", in_cache_key=False)
    revision: str = setting("main", "Branch, tag or commit of a hub model.", in_cache_key=False)
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto",
        "Type of the base weights; auto: that of the checkpoint, but on a CPU float32 unless it multiplies "
        "bfloat16 natively; float16 becomes bfloat16 on a GPU that has it, else float32.",
    )
    load_in_4bit: bool = setting(
        False, "QLoRA: base weights in NF4 with double quantisation; needs bitsandbytes."
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = setting(
        "auto",
        "Attention implementation; auto: the library's choice. On CPU eager is faster for short rows.",
        in_cache_key=False,
    )

    @property
    def title(self) -> str:
        """The last part of a path or hub id; role-playing voters are told this name."""
        return self.name.rstrip("/").split("/")[-1]

    @property
    def of_hub(self) -> bool:
        """Whether the name can be one of the hub's, NAME or OWNER/NAME, and is none of a folder here."""
        return not Path(self.name).exists() and self.name.count("/") < 2 and self.name[0] not in "./~"

    @property
    def pinned(self) -> str | None:
        """The revision of a hub model that a library would not take by itself; None if it would."""
        return self.revision if self.of_hub and self.revision != "main" else None


class SourceSection(Section):
    path: str | None = setting(None, "A .jsonl or .jsonl.gz file, or a hub id.", in_cache_key=False)
    subset: str | None = setting(None, "Configuration name of a hub data set.")
    split: str = setting("train", "Split of a hub data set.")
    revision: str = setting("main", "Revision of a hub data set.", in_cache_key=False)
    format: Literal["auto", "gsm8k", "alpaca", "messages", "prompt_completion"] = setting(
        "auto", "Format of the rows; auto: told by their fields."
    )
    limit: int | None = setting(None, "Use the first N rows only.", gt=0)
    empty: Literal["error", "drop"] = setting(
        "error", "What to do with rows whose prompt or response is empty."
    )
    duplicates: Literal["error", "first"] = setting(
        "error", "Rows with the same prompt and response are an error, or only the first of them is used."
    )


class DataSection(SourceSection):
    max_length: int = setting(512, "Longest prompt + response in tokens.", ignored_by="classify", gt=0)
    too_long: Literal["error", "drop", "truncate"] = setting(
        "error", "What to do with longer training rows.", ignored_by="classify"
    )


class PromptSection(Section):
    system: str | None = setting(None, "System message; none: that of the chat template.")
    by_system: dict[Annotated[int, Field(ge=1, le=2)], str] = setting(
        {}, "System messages for rows labelled System 1 and System 2, instead of `system`."
    )
    template: Literal["chat", "plain", "bare"] = setting(
        "chat",
        "chat: the tokenizer's chat template; plain: `Question: … Answer:`; bare: only the question and EOS.",
    )
    answer_format: Literal["hash", "xml"] = setting(
        "hash", "hash: `#### answer`; xml: <reasoning>…</reasoning><answer>…</answer>."
    )

    @model_validator(mode="after")
    def _bare(self) -> "PromptSection":
        if (self.system or self.by_system) and self.template == "bare":
            raise ValueError(
                "template bare has no system message; leave out system and by_system, or choose chat or plain"
            )
        return self


SUBTRACTED = ("pissa", "pissa_niter_16", "olora")
"""Inits whose B₀A₀ PEFT subtracts from the base weights."""


class LoraSection(Section):
    r: int = setting(8, "Rank.", gt=0)
    lora_alpha: float = setting(64, "lora_alpha; the update is scaled by alpha / r.", gt=0)
    target_modules: list[str] = setting(
        ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
        "Modules of the base model that get an adapter; all-linear: all linear ones but the head.",
        min_length=1,
    )
    init: Literal["normal", "pissa", "pissa_niter_16", "olora", "orthogonal", "default"] = setting(
        "normal",
        "normal: A and B ~ N(0, std²), as in the paper; orthogonal has B₀A₀ = 0; pissa_niter_16 is a faster, "
        "approximate pissa.",
    )
    std: float = setting(0.01, "Standard deviation of init normal.", gt=0)
    compensate: Literal["auto"] | bool = setting(
        "auto",
        "Subtract the initial B₀A₀, to start from the base model; auto: for all but normal and default.",
    )
    use_rslora: bool = setting(False, "Scale the update by alpha / √r instead of alpha / r.")

    @field_validator("target_modules", mode="before")
    @classmethod
    def _all(cls, modules: Any) -> Any:
        return [ALL_LINEAR] if modules == ALL_LINEAR else modules

    @model_validator(mode="after")
    def _even(self) -> "LoraSection":
        if self.init == "orthogonal" and self.r % 2:
            raise ValueError(f"init orthogonal needs an even r, got {self.r}")
        return self

    @model_validator(mode="after")
    def _starts_as_the_base(self) -> "LoraSection":
        # The base weights never change here. B₀A₀ of orthogonal is 0.
        if self.init in SUBTRACTED and not self.compensated:
            raise ValueError(
                f"init {self.init} without compensation adds B₀A₀ to the base, a broken model to start from; "
                "use compensate: auto or true"
            )
        return self

    @property
    def compensated(self) -> bool:
        return self.init not in ("normal", "default") if self.compensate == "auto" else self.compensate
