"""Answers written in slots: those of the library's own generation, each from its own seed."""

from unittest.mock import Mock

import pytest
import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from stages.engines import Sampling, continuous_batching
from stages.engines.continuous_batching import StopConditions, generate, sample_tokens
from stages.packing import support
from stages.packing.batch import common_prefix_length

SMALL = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0,
    "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    """In float64, so that what is computed beside an answer cannot change its tokens."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).double().eval()


def random(*lengths: int, shared: int = 0, seed: int = 0) -> list[list[int]]:
    """Prompts of these lengths, of which the first `shared` tokens are equal."""
    generator = torch.Generator().manual_seed(seed)
    some = lambda n: torch.randint(5, 250, (n,), generator=generator).tolist()  # noqa: E731
    head = some(shared)
    return [head + some(n - shared) for n in lengths]


def answers(model, tokenizer, prompts, sampling, **given):
    """In the order of the prompts; each is given once."""
    made = list(generate(model, tokenizer, prompts, sampling, **given))
    assert sorted(i for i, _ in made) == list(range(len(prompts)))
    return [answer for _, answer in sorted(made, key=lambda pair: pair[0])]


def by_library(model, tokenizer, prompts, sampling, stops=()):
    """One prompt at a time."""
    ends = StopConditions(sampling, tokenizer, stops)
    return [continuous_batching._generate_padded(model, ends, [ids], [0])[0] for ids in prompts]


PROMPTS = {
    "different": random(1, 9, 4, 17, 2, 9),
    "one beginning": random(12, 9, 20, 8, 8, 15, shared=7),
    "equal": random(6, 11) * 3,
    "a beginning of another": [ids[:n] for ids in random(14, shared=14) for n in (3, 14, 8, 1, 3)],
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_greedy_answers_are_the_library_s(model, tokenizer, monkeypatch, kind):
    """Some end at one of 40 tokens, and others take their slots; some outgrow their memory."""
    monkeypatch.setattr("stages.engines.kv_cache.COLUMNS", 8)
    sampling = Sampling(12, tuple(range(100, 140)))
    wanted = by_library(model, tokenizer, PROMPTS[kind], sampling)
    for slots in (2, 64):
        assert answers(model, tokenizer, PROMPTS[kind], sampling, slots=slots) == wanted


def test_what_a_model_s_own_file_says_of_sampling_changes_nothing(model, tokenizer, monkeypatch):
    sampling = Sampling(12, ())
    wanted = by_library(model, tokenizer, PROMPTS["different"], sampling)
    own = GenerationConfig(repetition_penalty=9.0, no_repeat_ngram_size=2, min_new_tokens=2, num_beams=2)
    monkeypatch.setattr(model, "generation_config", own)
    assert by_library(model, tokenizer, PROMPTS["different"], sampling) == wanted
    assert model.generation_config is own


def test_an_answer_ends_at_its_stop_token_or_text_or_incomplete_at_its_length(model, tokenizer):
    prompts = PROMPTS["different"]
    whole = answers(model, tokenizer, prompts, Sampling(16, ()))
    assert all(len(answer.ids) == 16 and not answer.complete for answer in whole)
    stop = whole[3].ids[6]
    for answer, cut in zip(whole, answers(model, tokenizer, prompts, Sampling(16, (stop,))), strict=True):
        at = answer.ids.index(stop) + 1 if stop in answer.ids else None
        assert cut.ids == answer.ids[:at] and cut.complete == (at is not None)
    # A stop text of two whole characters ends it, too.
    prompt, ids, at = next(
        (prompt, answer.ids, at)
        for prompt, answer in zip(prompts, whole, strict=True)
        for at in range(15)
        if all(35 < token < 128 for token in answer.ids[at : at + 2])
    )
    text = tokenizer.decode(ids[at : at + 2])
    (cut,) = answers(model, tokenizer, [prompt], Sampling(16, ()), stops=("never said", text))
    assert cut.complete and cut.ids == ids[: len(cut.ids)] and len(cut.ids) <= at + 2
    written = [tokenizer.decode(cut.ids[:n]) for n in range(len(cut.ids) + 1)]
    assert text in written[-1] and text not in written[-2]


def test_a_seed_is_an_answer_whatever_else_is_asked(model, tokenizer):
    prompts = [*PROMPTS["one beginning"], *PROMPTS["equal"]]
    seeds = [7 * i for i in range(len(prompts))]
    sampling = Sampling(12, (9,), temperature=1.3, top_k=50)
    whole = answers(model, tokenizer, prompts, sampling, seeds=seeds)
    state = torch.random.get_rng_state()
    for slots in (1, 5):
        assert answers(model, tokenizer, prompts, sampling, seeds=seeds, slots=slots) == whole
    assert torch.equal(torch.random.get_rng_state(), state), "no number is drawn from the global state"
    assert len({tuple(answer.ids) for answer in whole}) == len(prompts), "equal prompts with other seeds"
    ends = StopConditions(sampling, tokenizer)
    padded = continuous_batching._generate_padded(model, ends, prompts, seeds)
    assert padded == whole, "the same where prompts are padded"
    assert answers(model, tokenizer, [], sampling) == []


LOGITS = torch.tensor([0.3, -1.2, 1.5, float("-inf"), 0.0, -0.4])


def test_draws_follow_the_distribution_of_the_library_s_warpers():
    number, sampling = 20_000, Sampling(1, (), 1.5, 4)
    draws = torch.rand(number, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logits = TemperatureLogitsWarper(sampling.temperature)(None, LOGITS[None])
    wanted = TopKLogitsWarper(sampling.top_k)(None, logits).softmax(-1)[0]
    tokens, logprobs = sample_tokens(LOGITS.expand(number, -1), sampling, draws)
    assert torch.allclose(logprobs.exp(), wanted[tokens])
    found = torch.bincount(tokens, minlength=6)
    assert not found[wanted == 0].any() and wanted[3] == 0
    kept = wanted > 0
    chi = ((found - number * wanted) ** 2 / (number * wanted))[kept].sum()
    assert kept.sum() > 1 and float(chi) < 21, f"one in a thousand is above 20.5 with 5 degrees: {chi}"


def test_the_first_and_the_last_draw_are_tokens_that_can_be():
    plain = Sampling(1, (), temperature=1.0)
    logits = torch.tensor([float("-inf"), 0.2, -1.0, 0.7, float("-inf")])
    draws = torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64)
    assert sample_tokens(logits.expand(2, -1), plain, draws)[0].tolist() == [1, 3]
    # Behind sums that are 1 in float32.
    logits, draws = torch.tensor([[0.0, 0.0, 0.0, -18.0]]), torch.tensor([1 - 1e-10], dtype=torch.float64)
    assert sample_tokens(logits, plain, draws)[0].tolist() == [3]


@pytest.fixture
def calls(monkeypatch):
    """Tokens of each row that is computed."""
    seen, usual = [], support.packed_hidden_states
    spy = Mock(side_effect=lambda model, ids, *rest: seen.append(ids.shape[1]) or usual(model, ids, *rest))
    monkeypatch.setattr(support, "packed_hidden_states", spy)
    return seen


@pytest.mark.parametrize("kind", ["one beginning", "equal"])
def test_each_prompt_is_computed_once_and_a_shared_beginning_for_all(model, tokenizer, calls, kind):
    prompts = PROMPTS[kind] * 3
    assert support.supports_packing(model, prompts[0])
    calls.clear()
    made = answers(model, tokenizer, prompts, Sampling(10, tuple(range(100, 140))))
    unique = sorted(set(map(tuple, prompts)))
    shared = min(common_prefix_length([list(ids) for ids in unique]), min(map(len, unique)) - 1)
    read = sum(map(len, unique)) - shared * (len(unique) - 1)
    assert calls[0] == read
    # The last token of an answer is never computed.
    assert sum(calls) == read + sum(len(answer.ids) - 1 for answer in made)


def test_a_model_that_does_not_fit_writes_by_the_library(tokenizer, calls, caplog):
    """Prompts that see eight tokens back, in batches of as many as there are slots."""
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8)).double().eval()
    prompts, sampling = PROMPTS["different"], Sampling(12, tuple(range(100, 140)))
    wanted = by_library(model, tokenizer, prompts, sampling)
    model.generate = Mock(wraps=model.generate)
    assert answers(model, tokenizer, prompts, sampling, slots=3) == wanted
    assert [len(call.kwargs["input_ids"]) for call in model.generate.mock_calls] == [3, 3] and not calls
    assert "MistralForCausalLM computes every sequence by itself" in caplog.text
