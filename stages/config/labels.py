"""Settings of servers, of voters and of how votes become labels."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import NonNegativeFloat, PositiveInt

from stages.config.fields import (
    JsonValue,
    Samples,
    Seconds,
    Section,
    Share,
    advanced,
    advanced_unkeyed,
    check_url,
    registry_name,
    setting,
    unkeyed,
)
from stages.config.sources import Engine, ModelSection

Persona = Annotated[str, registry_name("personas")]


class ThinkingSection(Section):
    max_tokens: PositiveInt = setting(4096, "Longest thought in tokens.")


class Voter(Section):
    name: str | None = setting(None, "Name of the voter in the labels; none: model/persona.")
    model: str | None = unkeyed(None, "Model that votes; none: the base model, model.name.")
    revision: str = advanced_unkeyed("main", "Branch, tag or commit of a voting model on the hub.")
    engine: Engine = setting("auto")
    """auto: openai with base_url; else vllm, or in process if there is no GPU and the model is small."""
    base_url: str | None = unkeyed(None, "Address of an OpenAI-compatible server (…/v1).")
    api_key_env: str = unkeyed("OPENAI_API_KEY", "Environment variable with the API key for base_url.")
    persona: Persona = setting("role_play", "Prompt and label words, one of `lorapar list personas`.")
    words: tuple[str, str] | None = advanced(None)
    """Label words for System 1 and System 2; none: the persona's."""
    shots: int = advanced(16, ge=2, multiple_of=2)
    """Worked examples in the prompt of a few-shot persona, half of each system."""
    shots_path: str | None = advanced_unkeyed(None)
    """File with the worked examples (question, answer, system); none: those of lorapar."""
    thinking: ThinkingSection | None = setting(None, "Let a voter of a chat persona think before it chooses.")
    temperature: NonNegativeFloat = setting(0.0)
    """For voters that think, and for servers that cannot constrain a choice."""
    samples: Samples = setting(1, "How often each question is asked; the vote is the mean of the answers.")
    calibration: Literal["auto", "none", "held_out"] = advanced("auto")
    """Threshold on the probability of System 2. none: 0.5; held_out: the median over labelled examples; auto:
    none for chat personas, else held_out."""
    devices: str | None = advanced_unkeyed(None)
    """CUDA_VISIBLE_DEVICES of its server; voters with devices run in parallel."""
    vllm: Annotated[dict[str, Any], JsonValue] = advanced_unkeyed({})
    """Further arguments of its vLLM server, e.g. {quantization: fp8}."""

    def voting_model(self, model: ModelSection) -> ModelSection:
        """Return the model that votes: the voter's own, or else the base `model` without load_in_4bit."""
        if self.model:
            return ModelSection(name=self.model, revision=self.revision, device=model.device)
        return model.model_copy(update={"load_in_4bit": False})

    def conflicts(self, registries: Mapping[str, Any]) -> Iterator[str]:
        if self.base_url:
            check_url("base_url", self.base_url)
        if self.engine == "openai" and not self.base_url:
            yield "engine openai needs base_url"
        if self.base_url and self.engine not in ("openai", "auto"):
            yield f"base_url is for engine openai, not {self.engine}"
        if self.base_url and not self.model:
            yield "base_url needs model, the name it is served under"
        if self.revision != "main" and (self.base_url or not self.model):
            yield f"revision {self.revision} needs model, and cannot be used with base_url"
        if self.samples > 1 and self.temperature == 0:
            yield f"{self.samples} samples of a greedy voter are all the same; set temperature"
        if self.temperature and not self.thinking and not self.base_url:
            yield (
                f"temperature {self.temperature} has no effect on a voter that runs here and does not think: "
                "its probabilities are read directly; leave temperature out"
            )


class ServerSection(Section):
    concurrency: int | None = unkeyed(None, gt=0, le=10_000)
    """Most requests in flight; none: 64, and up to 512 for a vLLM server of lorapar's."""
    timeout_s: Seconds = advanced_unkeyed(600)
    """Time limit of a request in seconds, with its wait in the server's queue."""
    batch_size: PositiveInt = unkeyed(64, "Answers that engine transformers generates at a time.")
    max_model_len: PositiveInt = unkeyed(4096, "Context length of a vLLM server that lorapar starts.")
    vllm: Annotated[dict[str, Any], JsonValue] = unkeyed({})
    """Further arguments of a vLLM server that lorapar starts, e.g. {tensor_parallel_size: 2}."""

    def with_vllm(self, arguments: dict[str, Any]) -> "ServerSection":
        """Return the section with further arguments of a vLLM server, which override `vllm`."""
        return self.model_copy(update={"vllm": {**self.vllm, **arguments}})


UNVOTED = ("known", "random")
"""Labelling strategies without voters."""
of_votes = partial(setting, ignored_by=UNVOTED)
advanced_of_votes = partial(advanced, ignored_by=UNVOTED)
"""Settings that only labels by voters depend on."""


class ClassifySection(Section):
    strategy: Literal["vote", "known", "random"] = setting("vote")
    """vote: by voters; known: labels of the rows or of labels_file; random: a control."""
    labels_file: str | None = unkeyed(None)
    """Labels for strategy known: JSON, JSON Lines or CSV; none: the rows have them."""
    voters: list[Voter] = of_votes([Voter()], min_length=1)
    """Models that vote on each example; the majority decides, and in a tie the mean probability."""
    quorum: Share = advanced_of_votes(0.5, "Share of valid votes below which an example is undecided.")
    min_agreement: Share = of_votes(0)
    """Share of the votes for the larger side below which an example is undecided; 1: unless all agree."""
    min_auc: Share = unkeyed(0.6)
    """Area under the ROC curve on labelled examples that at least one voter must reach."""
    accept_weak: bool = unkeyed(False, "Go on even if no voter reaches min_auc.")
    show_answer: bool = advanced_of_votes(True, "Show voters the reference answers, if all rows have one.")
    system2_share: float | None = advanced(None, ignored_by="known", gt=0, lt=1)
    """Share of System 2, if it is known: it replaces calibration."""
    held_out: str | None = advanced_unkeyed(None)
    """File with labelled examples for calibration; none: those of lorapar."""
    known: str = setting("system", "Field of the rows with a known label (1 or 2).", ignored_by="random")
    max_failed: Share = advanced_unkeyed(0.01, "Share of a voter's questions that may fail.")
    seed: int = advanced(0, ignored_by="known")
    """Seed of strategy random, and of sampled votes."""

    def conflicts(self, registries: Mapping[str, Any]) -> Iterator[str]:
        if self.labels_file and self.strategy not in UNVOTED:
            yield "labels_file is read by strategy known: set it, or leave labels_file out"
