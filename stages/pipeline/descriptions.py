"""Parts that the descriptions of several stages share."""

from stages.config import Config
from stages.lora.examples import PROTECTED

WEIGHTS = "under PEFT's name of each LoRA weight: A is (r, in_features), B is (out_features, r)"
ADAPTER = (
    "A plain PEFT adapter: `adapter_config.json`, and `adapter_model.safetensors` with float32 tensors "
    f"{WEIGHTS}. r is doubled where the initial update is subtracted (`lora.compensate`)."
)
TRAINED = {
    "adapter/": ADAPTER,
    "history.json": "One object per logged step: TRL's metrics and lorapar's (rewards by system, KL).",
    "curves.png": "The same as a picture.",
}
"""The files of a stage that trains."""


def protected_step(config: Config) -> tuple[str, ...]:
    """The step that scores the protected rows, if there are any.

    It stands before other scores, because the last artifact of a stage has its name in a context's inputs.
    """
    return (f"score:{PROTECTED}",) if config.partition.protect else ()


def training_inputs(config: Config, masks: str, start: str) -> tuple[str, ...]:
    """The steps that training reads. masks: variant of partition. start: step that made the first adapter."""
    if config.baseline is None:
        return ("classify:train", *protected_step(config), f"partition:{masks}", start)
    return ("classify:train",) if start == "score" else ("classify:train", start)
