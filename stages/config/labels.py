"""Servers, voters and how votes become labels."""

from typing import Annotated, Any, Literal

from pydantic import model_validator

from stages.config.fields import Section, named, setting
from stages.config.sources import ModelSection

Persona = Annotated[str, named("personas")]


class ThinkingSection(Section):
    max_tokens: int = setting(4096, "Longest thought in tokens.", gt=0)


class Voter(Section):
    name: str | None = setting(None, "Its name in the labels; none: model/persona.")
    model: str | None = setting(None, "Voting model; none is model.name.", identity=False)
    revision: str = setting("main", "Branch, tag or commit of a hub model of its own.", identity=False)
    engine: Literal["auto", "vllm", "openai", "transformers"] = setting(
        "auto", "auto: openai with base_url, else vllm where it is installed, else transformers."
    )
    base_url: str | list[str] | None = setting(
        None,
        "Running OpenAI-compatible server (…/v1), or several of one model: requests go to each in turn.",
        identity=False,
    )
    api_key_env: str = setting(
        "OPENAI_API_KEY", "Environment variable with the key for base_url.", identity=False
    )
    persona: Persona = setting("role_play", "Prompt and label words of this voter.")
    words: tuple[str, str] | None = setting(None, "Label words for System 1 and 2; none: the persona's.")
    shots: int = setting(16, "Worked examples of a few-shot persona, half of each system.", ge=2)
    shots_path: str | None = setting(
        None, "Where they come from, rows with question, answer, system; none: lorapar's own.", identity=False
    )
    thinking: ThinkingSection | None = setting(None, "Let it think before it chooses, in a chat.")
    temperature: float = setting(
        0.0, "Sampling temperature of a voter that thinks, or whose words have to be read.", ge=0
    )
    samples: int = setting(1, "Times each question is put to it; its vote is the mean.", gt=0)
    weight: float = setting(1.0, "Weight under rule: weighted.", gt=0)
    calibration: Literal["auto", "none", "held_out", "content_free"] = setting(
        "auto",
        "Threshold: 0.5, the median over labelled examples, or the answer to empty questions; auto: held_out for few-shot "
        "personas, else none.",
    )
    devices: str | None = setting(
        None,
        "Devices of its server, as in CUDA_VISIBLE_DEVICES; voters with devices run side by side.",
        identity=False,
    )
    vllm: dict[str, Any] = setting(
        {}, "Arguments of its vLLM server, over server.vllm, e.g. {quantization: fp8}.", identity=False
    )

    @property
    def urls(self) -> tuple[str, ...]:
        return (self.base_url,) if isinstance(self.base_url, str) else tuple(self.base_url or ())

    def asks(self, model: ModelSection) -> ModelSection:
        """The model that answers: the voter's own, or the one that is trained, in the weights that it is loaded from."""
        if self.model:
            return ModelSection(name=self.model, revision=self.revision)
        return model.model_copy(update={"load_in_4bit": False})

    @model_validator(mode="after")
    def _fits(self) -> "Voter":
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
        return self


class ServerSection(Section):
    concurrency: int = setting(64, "Requests in flight.", identity=False, gt=0)
    timeout_s: float = setting(
        120, "Longest time for one request; voters that think need more.", identity=False, gt=0
    )
    stall_s: float = setting(
        300, "A server that gives no answer for so long is given up.", identity=False, gt=0
    )
    batch_size: int = setting(64, "Questions per batch of engine transformers.", identity=False, gt=0)
    max_model_len: int = setting(4096, "Context of a vLLM server that lorapar starts.", identity=False, gt=0)
    startup_s: float = setting(600, "Seconds such a server may take to start.", identity=False, gt=0)
    vllm: dict[str, Any] = setting(
        {}, "Its further arguments, e.g. {tensor_parallel_size: 2}.", identity=False
    )
    port: int | None = setting(None, "Its port; none takes a free one.", identity=False)
    adapter: Literal["auto", "merged", "module"] = setting(
        "auto",
        "How it serves an adapter: merged into the weights, or as a LoRA module; auto: merged on CPU.",
        identity=False,
    )


class ClassifySection(Section):
    strategy: Literal["vote", "random"] = setting(
        "vote", "random: labels drawn at random, the paper's control."
    )
    voters: list[Voter] = setting([Voter()], "Who votes.", min_length=1)
    rule: Literal["majority", "weighted", "mean_probability", "unanimous"] = setting(
        "majority", "How votes become a label; ties go by the mean probability."
    )
    quorum: float = setting(
        0.5, "Below this share of voters with a valid vote an example is undecided.", ge=0, le=1
    )
    min_agreement: float = setting(0, "Below this share of equal votes an example is undecided.", ge=0, le=1)
    show_answer: bool = setting(True, "Show the voter the reference answer too.")
    system2_share: float | None = setting(
        None,
        "Known share of System 2: each voter's threshold becomes that quantile, in place of calibration.",
        gt=0,
        lt=1,
    )
    held_out: str | None = setting(
        None,
        "Labelled examples for calibration, rows with question, answer, system; none: lorapar's own.",
        identity=False,
    )
    known: str = setting(
        "system",
        "Field of the rows with a label from elsewhere (1 or 2); only compared with, where rows have it.",
    )
    max_failed: float = setting(
        0.01,
        "Give up on a voter when more than this share of its questions cannot be answered.",
        identity=False,
        ge=0,
        le=1,
    )
    max_invalid: float = setting(
        0.1, "The same for answers that are none of its words.", identity=False, ge=0, le=1
    )
    seed: int = setting(0, "Seed of strategy random, and of samples.")
