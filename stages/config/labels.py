"""Settings of servers, of voters and of how votes become labels."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

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
    """Engine that runs the model. auto: openai if base_url is set; without a GPU transformers, in this
    process, for a model of at most 1 billion parameters that does not think first; else vllm if it is
    installed."""
    base_url: str | list[str] | None = unkeyed(None)
    """Address of a running OpenAI-compatible server (…/v1), or a list of servers with the same model, which
    are used in turn."""
    api_key_env: str = unkeyed("OPENAI_API_KEY", "Environment variable with the API key for base_url.")
    persona: Persona = setting("role_play")
    """Prompt and label words of the voter, one of `lorapar list personas`."""
    words: tuple[str, str] | None = advanced(None)
    """Label words for System 1 and System 2; none: the persona's."""
    shots: int = advanced(16, ge=2, multiple_of=2)
    """Number of worked examples in the prompt of a few-shot persona, half of each system."""
    shots_path: str | None = advanced_unkeyed(None)
    """File with the worked examples (fields question, answer, system); none: those of lorapar."""
    thinking: ThinkingSection | None = setting(None)
    """Let the voter think before it chooses, with these limits; for chat personas only."""
    temperature: NonNegativeFloat = setting(0.0)
    """Sampling temperature, used by voters that think and by servers that cannot constrain a choice."""
    samples: Samples = setting(1, "How often each question is asked; the vote is the mean of the answers.")
    weight: PositiveFloat = advanced(1.0, "Weight of the voter with rule weighted.")
    calibration: Literal["auto", "none", "held_out", "content_free"] = advanced("auto")
    """Threshold on the probability of System 2. none: 0.5; held_out: the median over labelled examples;
    content_free: the probability for questions without content; auto: none for chat personas, else
    held_out."""
    devices: str | None = advanced_unkeyed(None)
    """Devices of the voter's server, in the form of CUDA_VISIBLE_DEVICES; voters with devices run in
    parallel."""
    vllm: Annotated[dict[str, Any], JsonValue] = advanced_unkeyed({})
    """Arguments of the voter's vLLM server, added to those of server.vllm, e.g. {quantization: fp8}."""

    @property
    def urls(self) -> tuple[str, ...]:
        """Addresses of the voter's servers; empty for a model that runs here."""
        return (self.base_url,) if isinstance(self.base_url, str) else tuple(self.base_url or ())

    def voting_model(self, model: ModelSection) -> ModelSection:
        """Return the model that votes: the voter's own, or else the base `model` without load_in_4bit."""
        if self.model:
            return ModelSection(name=self.model, revision=self.revision, device=model.device)
        return model.model_copy(update={"load_in_4bit": False})

    def conflicts(self, registries: Mapping[str, Any]) -> Iterator[str]:
        for url in self.urls:
            check_url("base_url", url)
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
    """Largest number of requests in flight; none: 64, and for a vLLM server that lorapar starts up to 512, as
    long as answers take less than a twentieth of timeout_s."""
    timeout_s: Seconds = advanced_unkeyed(600)
    """Time limit of one request in seconds, including its wait in the server's queue."""
    batch_size: PositiveInt = unkeyed(64, "Number of answers that engine transformers generates at a time.")
    max_model_len: PositiveInt = unkeyed(4096)
    """Context length, in tokens, of a vLLM server that lorapar starts."""
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
    strategy: Literal["vote", "shuffled", "known", "random"] = setting("vote")
    """Where labels come from. vote: the voters; known: the rows or labels_file. Two are controls. shuffled:
    the voters' labels, dealt out to other rows, so that System 2 keeps its share; random: a random draw."""
    labels_file: str | None = unkeyed(None)
    """Labels for strategy known: a .json object that maps id or question to 1 or 2, or JSON Lines or CSV with
    the field that `known` names; none: the rows have that field."""
    swap: bool = advanced(False, "Control: exchange the labels System 1 and System 2.")
    voters: list[Voter] = of_votes([Voter()], "Models that vote on each example.", min_length=1)
    rule: Literal["majority", "weighted", "mean_probability", "unanimous"] = of_votes("majority")
    """How votes become a label; the mean probability decides a tie."""
    quorum: Share = advanced_of_votes(0.5)
    """Share of the voters that must have given a valid vote; with fewer, an example is undecided."""
    min_agreement: Share = of_votes(0)
    """Share of the votes that the larger side must have; with less, an example is undecided."""
    min_auc: Share = unkeyed(0.6)
    """At least one voter must reach this area under the ROC curve on labelled examples; 0.5 is chance."""
    accept_weak: bool = unkeyed(False, "Go on even if no voter reaches min_auc.")
    show_answer: bool = advanced_of_votes(True)
    """Show the reference answer to the voters, too, unless some row has none."""
    system2_share: float | None = advanced(None, ignored_by="known", gt=0, lt=1)
    """Share of System 2, if it is known: each voter then votes 2 for this share of the examples, without
    calibration, and strategy random draws System 2 with it."""
    held_out: str | None = advanced_unkeyed(None)
    """File with labelled examples for calibration (fields question, answer, system); none: those of
    lorapar."""
    known: str = setting("system", ignored_by="random")
    """Field of the rows that may hold a known label (1 or 2): strategy known uses it, and the report compares
    other labels with it."""
    max_failed: Share = advanced_unkeyed(0.01)
    """Share of a voter's questions that may remain unanswered; with more, the stage fails."""
    max_invalid: Share = advanced_unkeyed(0.1)
    """Share of a voter's answers that may be none of its label words; with more, the stage fails."""
    seed: int = advanced(0, ignored_by="known")
    """Seed of strategies shuffled and random, and of sampled votes."""

    def conflicts(self, registries: Mapping[str, Any]) -> Iterator[str]:
        if self.labels_file and self.strategy not in UNVOTED:
            yield "labels_file is read by strategy known: set it, or leave labels_file out"
