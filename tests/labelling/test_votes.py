"""What a voter's server is started with."""

from stages.classify import _served
from stages.config import ModelSection, ServerSection, ThinkingSection, Voter

MODEL = ModelSection(name="a/b")
EXACT = {"hf_overrides": {"head_dtype": "float32"}}


def test_a_voter_that_only_chooses_has_a_float32_head_unless_told_otherwise():
    plain, told = ServerSection(), ServerSection(vllm={"hf_overrides": {"x": 1}})
    assert _served(Voter(), MODEL, plain).vllm == EXACT
    assert _served(Voter(thinking=ThinkingSection()), MODEL, plain).vllm == {}
    assert _served(Voter(), MODEL, told).vllm == {}
    assert _served(Voter(vllm={"hf_overrides": {}}), MODEL, plain).vllm == {"hf_overrides": {}}
