"""Ask a trained model a question in each of its modes, in this process."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from stages.config import Config
from stages.engines import Sampling
from stages.prompts.renderer import renderers_of
from stages.store.artifacts import Artifact


@dataclass(frozen=True)
class Answer:
    mode: str
    text: str
    tokens: int
    seconds: float
    complete: bool
    """False if it was cut off at `rl.max_completion_length`."""


class TrainedModel:
    """A base with a trained adapter beside its weights, on this process's device."""

    def __init__(self, config: Config, trained: Artifact) -> None:
        from stages.models.base import load_adapted
        from stages.models.tokenizer import load_tokenizer

        self.limit = config.rl.max_completion_length
        self.tokenizer = load_tokenizer(config.model)
        prompt = config.prompt_of(trained.manifest["stage"])
        self.renderers = renderers_of(self.tokenizer, prompt, config.modes)
        self.model = load_adapted(config.model, trained.adapter)

    def answers(self, question: str) -> Iterator[Answer]:
        """Yield the likeliest answer in each mode, or the only one."""
        from stages.engines.continuous_batching import generate

        for mode, renderer in self.renderers.items():
            prompt = renderer.prompt(question)
            sampling = Sampling(self.limit, tuple(renderer.stop_ids))
            begun = time.perf_counter()
            [(_, completion)] = generate(self.model, self.tokenizer, [renderer.ids(prompt)], sampling)
            seconds = time.perf_counter() - begun
            text = renderer.read(completion.ids, prompt)
            yield Answer(mode, text.strip(), len(completion.ids), seconds, completion.complete)
