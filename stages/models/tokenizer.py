"""Loads a model's tokenizer, with a pad token and padding on the left."""

from __future__ import annotations

import logging
import math
from contextlib import suppress
from typing import TYPE_CHECKING

from stages.config import ModelSection
from stages.errors import DataError, LoraparError
from stages.models.load_errors import load_config, load_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def load_tokenizer(model: ModelSection) -> PreTrainedTokenizerBase:
    """Load the tokenizer; DataError if it has no EOS token.

    Its `embedded` is the number of tokens that the model has embeddings of, if that is known, its `ends`
    the tokens that end an answer by the model's generation_config.json.
    """
    from transformers import AutoTokenizer, GenerationConfig

    with load_errors("the tokenizer of", model):
        tokenizer = AutoTokenizer.from_pretrained(model.name, revision=model.revision)
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer of {model.name} has no EOS token, so that no answer would end",
            "name it in tokenizer_config.json: eos_token",
        )
    tokenizer.embedded = None
    with suppress(LoraparError):  # a server may know an architecture that transformers does not
        tokenizer.embedded = getattr(load_config(model).get_text_config(), "vocab_size", None)
    tokenizer.ends = []
    with suppress(OSError):  # few models have no generation_config.json
        ends = GenerationConfig.from_pretrained(model.name, revision=model.revision).eos_token_id
        tokenizer.ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    pad = tokenizer.pad_token_id
    if pad is None or pad >= (tokenizer.embedded or math.inf):
        # Padding is masked by length, never by id, so the real EOS is still trained.
        tokenizer.pad_token = tokenizer.eos_token
        log.info("the tokenizer of %s has no pad token for the model: padding uses EOS", model.name)
    tokenizer.padding_side = "left"
    return tokenizer
