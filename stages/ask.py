"""Ask both modes of a trained model a question, in this process."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.config import MODES, SYSTEMS, Config
from stages.engines import Sampling
from stages.prompts import thoughts
from stages.prompts.renderer import Renderer
from stages.records import Example

if TYPE_CHECKING:
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
    """A base with the adapter of each mode beside its weights, on this process's device."""

    def __init__(self, config: Config, inputs: Mapping[str, Artifact]) -> None:
        """inputs: the artifacts of both modes, by target."""
        from stages.models.base import load_adapted
        from stages.models.tokenizer import load_tokenizer

        self.limit = config.rl.max_completion_length
        self.tokenizer = load_tokenizer(config.model)
        self.renderers = {
            mode: Renderer(self.tokenizer, config.prompt_of(target), system=SYSTEMS[target])
            for mode, target in MODES.items()
        }
        first, *later = ((mode, inputs[target].adapter) for mode, target in MODES.items())
        self.model = load_adapted(config.model, first[1])
        self.names = {first[0]: self.model.active_adapter}
        """Mode → PEFT's name of its adapter."""
        for mode, adapter in later:
            self.model.load_adapter(str(adapter), mode)
            self.names[mode] = mode

    def answers(self, question: str) -> Iterator[Answer]:
        """Yield the likeliest answer of each mode, under the message with which it was trained."""
        from stages.engines.continuous_batching import generate

        for mode, renderer in self.renderers.items():
            self.model.set_adapter(self.names[mode])
            prompt = renderer.prompt(question, example=Example("", question, "", None))
            sampling = Sampling(self.limit, tuple(renderer.stop_ids))
            begun = time.perf_counter()
            [(_, completion)] = generate(self.model, self.tokenizer, [renderer.ids(prompt)], sampling)
            seconds = time.perf_counter() - begun
            text = thoughts.decode(self.tokenizer, completion.ids, prompt)
            yield Answer(mode, text.strip(), len(completion.ids), seconds, completion.complete)
