"""Errors about models and data sets that the hub refuses."""

import re
import sys
from unittest.mock import Mock

import datasets
import huggingface_hub
import pytest
from huggingface_hub.utils import hf_raise_for_status

from stages.config import SourceSection
from stages.data import hub, rows
from stages.errors import HUB_HINT, MissingInputError


def test_the_hubs_reason_is_told_with_what_to_do(monkeypatch):
    def refuse(*_, **__):
        library = sys.modules[hf_raise_for_status.__module__]
        http = getattr(library, "httpx2", None) or library.httpx  # huggingface_hub 2 has moved on
        request = http.Request("GET", "https://hub.test/api/models/owner/gated")
        hf_raise_for_status(http.Response(403, headers={"X-Error-Code": "GatedRepo"}, request=request))

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", refuse)
    with pytest.raises(MissingInputError) as caught:
        hub.resolve_commit("model", "owner/gated", "main")
    told = "no local folder 'owner/gated', and cannot get the model from the hub: Cannot access gated repo"
    assert str(caught.value).startswith(told)
    assert caught.value.hint == HUB_HINT


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (datasets.exceptions.DatasetNotFoundError("Dataset 'owner/set' is a gated dataset"), HUB_HINT),
        (ValueError("Config name is missing."), None),
    ],
)
def test_a_subset_that_is_not_named_is_no_fault_of_the_hub(error, hint, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=error))
    with pytest.raises(MissingInputError, match=re.escape(str(error))) as caught:
        rows._hub_rows(SourceSection(path="owner/set"))
    assert caught.value.hint == hint
