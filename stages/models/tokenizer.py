"""Loads a model's tokenizer, with a pad token and padding on the left."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from stages.config import ModelSection
from stages.errors import DataError
from stages.models.load_errors import load_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def load_tokenizer(model: ModelSection) -> PreTrainedTokenizerBase:
    """Load the tokenizer; DataError if it has no EOS token."""
    from transformers import AutoTokenizer

    with load_errors("the tokenizer of", model):
        tokenizer = AutoTokenizer.from_pretrained(model.name, revision=model.revision)
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer of {model.name} has no EOS token, so that no answer would end",
            "name it in tokenizer_config.json: eos_token",
        )
    if tokenizer.pad_token_id is None:
        # Padding is masked by length, never by id, so the real EOS is still trained.
        tokenizer.pad_token = tokenizer.eos_token
        log.info("the tokenizer of %s has no pad token: padding uses EOS", model.name)
    tokenizer.padding_side = "left"
    return tokenizer
