"""A model's tokenizer, ready to pad."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from stages.config import ModelSection
from stages.errors import MissingInputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def load_tokenizer(model: ModelSection) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model.name, revision=model.revision)
    except (OSError, ValueError) as error:
        raise MissingInputError(
            f"cannot load the tokenizer of {model.name}: {str(error).splitlines()[0]}"
        ) from None
    if tokenizer.pad_token_id is None:
        # Padding is masked by length, never by id, so the real EOS is still trained.
        tokenizer.pad_token = tokenizer.eos_token
        log.info("the tokenizer of %s has no pad token: padding uses EOS", model.name)
    tokenizer.padding_side = "left"
    return tokenizer
