"""Servers, voters and how votes become labels."""

from typing import Annotated, Any, Literal

from pydantic import model_validator

from stages.config.fields import LONGEST, MOST_SAMPLES, Plain, Section, check_url, named, setting
from stages.config.sources import Engine, ModelSection

Persona = Annotated[str, named("personas")]


class ThinkingSection(Section):
    max_tokens: int = setting(4096, "Longest thought in tokens.", gt=0)


class Voter(Section):
    name: str | None = setting(None, "Its name in the labels; none: model/persona.")
    model: str | None = setting(None, "Voting model; none: the base model, model.name.", in_cache_key=False)
    revision: str = setting(
        "main", "Branch, tag or commit of the voting model on the hub.", in_cache_key=False
    )
    engine: Engine = setting(
        "auto", "auto: openai if base_url is set, else vllm if it is installed, else transformers."
    )
    base_url: str | list[str] | None = setting(
        None,
        "A running OpenAI-compatible server (…/v1), or a list of servers of one model, which take turns.",
        in_cache_key=False,
    )
    api_key_env: str = setting(
        "OPENAI_API_KEY", "Environment variable with the key for base_url.", in_cache_key=False
    )
    persona: Persona = setting("role_play", "Prompt and label words of this voter.")
    words: tuple[str, str] | None = setting(None, "Label words for System 1 and 2; none: the persona's.")
    shots: int = setting(
        16, "Worked examples of a few-shot persona, half of each system.", ge=2, multiple_of=2
    )
    shots_path: str | None = setting(
        None,
        "File with the worked examples (question, answer, system); none: lorapar's own.",
        in_cache_key=False,
    )
    thinking: ThinkingSection | None = setting(
        None, "Let the voter think before it chooses; chat personas only."
    )
    temperature: float = setting(
        0.0, "Sampling temperature, for voters that think and servers that cannot constrain a choice.", ge=0
    )
    samples: int = setting(
        1, "How often each question is asked; the vote is the mean.", gt=0, le=MOST_SAMPLES
    )
    weight: float = setting(1.0, "Weight of the voter under rule weighted.", gt=0)
    calibration: Literal["auto", "none", "held_out", "content_free"] = setting(
        "auto",
        "Threshold. none: 0.5; held_out: the median over labelled examples; content_free: the answer to "
        "questions without content; auto: none for chat personas, else held_out.",
    )
    devices: str | None = setting(
        None,
        "Devices of the voter's server, as in CUDA_VISIBLE_DEVICES; voters with devices run side by side.",
        in_cache_key=False,
    )
    vllm: Annotated[dict[str, Any], Plain] = setting(
        {},
        "Arguments of the voter's vLLM server, added to server.vllm, e.g. {quantization: fp8}.",
        in_cache_key=False,
    )

    @property
    def urls(self) -> tuple[str, ...]:
        return (self.base_url,) if isinstance(self.base_url, str) else tuple(self.base_url or ())

    def asks(self, model: ModelSection) -> ModelSection:
        """The model that answers: the voter's own, or else the base model, never in 4 bits."""
        if self.model:
            return ModelSection(name=self.model, revision=self.revision)
        return model.model_copy(update={"load_in_4bit": False})

    @model_validator(mode="after")
    def _fits(self) -> "Voter":
        for url in self.urls:
            check_url("base_url", url)
        if self.engine == "openai" and not self.base_url:
            raise ValueError("engine openai needs base_url")
        if self.base_url and self.engine not in ("openai", "auto"):
            raise ValueError(f"base_url is for engine openai, not {self.engine}")
        if self.base_url and not self.model:
            raise ValueError("base_url needs model, the name it is served under")
        if self.revision != "main" and (self.base_url or not self.model):
            raise ValueError(f"revision {self.revision} needs model, and goes with no base_url")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"{self.samples} samples of a greedy voter are all the same; set temperature")
        if self.temperature and not self.thinking and not self.base_url:
            raise ValueError(
                f"temperature {self.temperature}: of a voter that does not think, on this machine, the "
                "probabilities themselves are read; leave it out"
            )
        return self


class ServerSection(Section):
    concurrency: int = setting(64, "Requests in flight.", in_cache_key=False, gt=0, le=10_000)
    timeout_s: float = setting(
        600,
        "Longest time for one request, in seconds, its wait on the server included; long thoughts need more.",
        in_cache_key=False,
        gt=0,
        le=LONGEST,
    )
    stall_s: float = setting(
        900,
        "Seconds without any answer after which a server is given up.",
        in_cache_key=False,
        gt=0,
        le=LONGEST,
    )
    batch_size: int = setting(
        64, "Answers that engine transformers writes at a time.", in_cache_key=False, gt=0
    )
    max_model_len: int = setting(
        4096, "Context length, in tokens, of a vLLM server that lorapar starts.", in_cache_key=False, gt=0
    )
    startup_s: float = setting(
        600, "Seconds that server may take to start.", in_cache_key=False, gt=0, le=LONGEST
    )
    vllm: Annotated[dict[str, Any], Plain] = setting(
        {}, "Further arguments of that server, e.g. {tensor_parallel_size: 2}.", in_cache_key=False
    )
    port: int | None = setting(
        None, "Port of that server; none: a free one.", in_cache_key=False, gt=0, lt=65536
    )
    adapter: Literal["auto", "merged", "module"] = setting(
        "auto",
        "How that server serves an adapter: merged into the weights or as LoRA module; auto: merged on CPU.",
        in_cache_key=False,
    )


UNVOTED = ("known", "random")
"""Strategies without voters."""


class ClassifySection(Section):
    strategy: Literal["vote", "known", "random"] = setting(
        "vote",
        "vote: labels by the voters; known: those of the rows or of labels_file; random: drawn, a control.",
    )
    labels_file: str | None = setting(
        None,
        "For strategy known: a .json object of id or question → 1 or 2, or JSON Lines or CSV with the field "
        "that `known` names; none: the rows have that field.",
        in_cache_key=False,
    )
    swap: bool = setting(False, "Control: exchange the labels System 1 and System 2.")
    voters: list[Voter] = setting([Voter()], "The voters.", ignored_by=UNVOTED, min_length=1)
    rule: Literal["majority", "weighted", "mean_probability", "unanimous"] = setting(
        "majority", "How votes become a label; the mean probability decides a tie.", ignored_by=UNVOTED
    )
    quorum: float = setting(
        0.5,
        "An example is undecided if fewer than this share of the voters gave a valid vote.",
        ignored_by=UNVOTED,
        ge=0,
        le=1,
    )
    min_agreement: float = setting(
        0,
        "An example is undecided if the larger side has less than this share of the votes.",
        ignored_by=UNVOTED,
        ge=0,
        le=1,
    )
    show_answer: bool = setting(True, "Show the voters the reference answer too.", ignored_by=UNVOTED)
    system2_share: float | None = setting(
        None,
        "Known share of System 2; each voter then votes 2 for that share, and calibration is not used.",
        ignored_by="known",
        gt=0,
        lt=1,
    )
    held_out: str | None = setting(
        None,
        "File with labelled examples for calibration (question, answer, system); none: lorapar's own.",
        in_cache_key=False,
    )
    known: str = setting(
        "system",
        "Field of the rows that may hold a known label (1 or 2); the report compares labels with it, and "
        "strategy known takes it.",
        ignored_by="random",
    )
    max_failed: float = setting(
        0.01,
        "Share of a voter's questions that may stay unanswered; if more do, the stage ends.",
        in_cache_key=False,
        ge=0,
        le=1,
    )
    max_invalid: float = setting(
        0.1,
        "Share of a voter's answers that may be none of its words; if more are, the stage ends.",
        in_cache_key=False,
        ge=0,
        le=1,
    )
    seed: int = setting(0, "Seed of strategy random and of sampled votes.", ignored_by="known")

    @model_validator(mode="after")
    def _reads(self) -> "ClassifySection":
        if self.labels_file and self.strategy == "vote":
            raise ValueError("labels_file is read by strategy known: set it, or leave labels_file out")
        return self
