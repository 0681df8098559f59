"""The in-process engine: shared prompt beginnings, stop texts, and choices among several words."""

import weakref
from pathlib import Path

import pytest
import torch
import trl
from transformers import Gemma2Config, Gemma2ForCausalLM

from stages.config import ModelSection, ServerSection
from stages.engines import ChoiceRequest, EngineCache, EngineSpec, GenerateRequest, Sampling
from stages.engines.in_process import PADDED_BATCH, InProcess, batch_sizes, choice_ids, word_tokens
from stages.errors import ConfigError, UnusableResult
from stages.models.base import load_base
from stages.models.tokenizer import load_tokenizer
from stages.packing import support


@pytest.fixture(scope="module")
def engine(tiny):
    model = ModelSection(name=str(tiny), dtype="float32")
    return InProcess(load_base(model), load_tokenizer(model), 4)


def test_no_model_stays_in_memory_beside_the_next(tiny):
    with EngineCache() as pool:
        served = EngineSpec("transformers", ModelSection(name=str(tiny), dtype="float32"))
        first = weakref.ref(pool.get(served, ServerSection(), print).model)
        assert first() is not None
        pool.close()
        assert first() is None


usual = support.supports_packing
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{{ m.role }}: {{ m.content }}{% endfor %}"
)
SEED = (
    "{% for m in messages %}{% if m.thinking %}<seed:think>{{ m.thinking }}</seed:think>{% endif %}"
    "{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize("shared", [0, 50])
@pytest.mark.parametrize("fits", [True, False])
def test_choices_are_those_of_each_prompt_alone(engine, monkeypatch, shared, fits):
    """Also with one beginning for all, with two in turn, and where one prompt is a beginning of another."""
    monkeypatch.setattr("stages.packing.support.supports_packing", lambda *_: fits and usual(*_))
    generator = torch.Generator().manual_seed(0)
    random = lambda n: torch.randint(5, 250, (n,), generator=generator).tolist()  # noqa: E731
    heads = [random(shared), random(shared)]
    prompts = [heads[i % 2] + random(1 + i % 7) for i in range(40)]
    prompts += [prompts[0] + [9], [*heads[0], *random(40)], [*heads[0], *prompts[-1][shared:], 8]]
    words = ("A", "B", "C", "D")
    found = dict(engine.choose_words([ChoiceRequest(ids, words) for ids in prompts]))
    tokens = word_tokens(engine.tokenizer, words)[1]
    for i, ids in enumerate(prompts):  # one at a time, no cache, no padding
        logits = engine.model(input_ids=torch.tensor([ids])).logits[0, -1, tokens]
        assert found[i].probabilities == pytest.approx(logits.softmax(0).tolist(), abs=1e-5)


def test_a_batch_has_so_many_tokens_at_most(monkeypatch):
    """And ends where another long beginning starts."""
    monkeypatch.setattr("stages.engines.in_process.BATCH_TOKENS", 52)
    assert list(batch_sizes([[n] * 50 + [i] for n in (1, 2) for i in range(5)])) == [2, 2, 1, 2, 2, 1]


@pytest.mark.parametrize(("template", "end"), [(None, "\n</think>\n\n"), (SEED, "</seed:think>")])
def test_a_thought_comes_before_the_choice(engine, monkeypatch, template, end):
    """The choice is that after prompt, thought and its end; the same thought gives the same choice."""
    monkeypatch.setattr(engine.tokenizer, "chat_template", template or engine.tokenizer.chat_template)
    ids = [40, 9, 60, 70]
    ((_, answer),) = engine.generate([GenerateRequest(ids)], Sampling(6, (engine.tokenizer.eos_token_id,)))
    thought = engine.tokenizer.decode(answer.ids, skip_special_tokens=True).rstrip()
    after = ids + engine.tokenizer(f"{thought}{end}", add_special_tokens=False)["input_ids"]
    asked = [ChoiceRequest(ids, ("A", "B")), ChoiceRequest(after, ("A", "B"))]
    asked += [ChoiceRequest(ids, ("A", "B"), max_thinking_tokens=6)] * 2
    choices = dict(engine.choose_words(asked))
    plain, written, with_thought, again = (choices[i].probabilities for i in range(4))
    assert with_thought == pytest.approx(written, abs=1e-6) and with_thought == pytest.approx(again, abs=1e-6)
    assert plain != pytest.approx(with_thought, abs=1e-6)


def test_what_gives_no_choice(engine, monkeypatch):
    """A prompt that is too long fails alone."""
    longest = engine.model.config.max_position_embeddings
    asked = [ChoiceRequest([40] * (longest + 1), ("A", "B")), ChoiceRequest("Which?", ("System1", "System2"))]
    found = dict(engine.choose_words(asked))
    assert found[0].reason == "too_long"
    assert sum(found[1].probabilities) == pytest.approx(1)
    with pytest.raises(ConfigError, match="do not differ in one token"):
        word_tokens(engine.tokenizer, ("A", "AB"))
    monkeypatch.setattr(engine, "_last_logits", lambda prompts: torch.full((len(prompts), 300), torch.nan))
    with pytest.raises(UnusableResult, match="the model's outputs are not numbers"):
        list(engine.choose_words([ChoiceRequest("Is it?", (" Yes", " No"))]))


GEMMA = {
    "vocab_size": 259, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32,
    "num_attention_heads": 2, "num_key_value_heads": 1, "final_logit_softcapping": 0.5,
    "attn_implementation": "eager",
}  # fmt: skip


@pytest.mark.parametrize("config", [{}, GEMMA], ids=["llama", "capped"])
def test_choices_of_a_16_bit_model_are_by_a_float32_head(tiny, config):
    """Of the hidden state as the model has it; a cap on its logits is kept, and so is the head."""
    torch.manual_seed(0)
    section = ModelSection(name=str(tiny), dtype="bfloat16")
    model = Gemma2ForCausalLM(Gemma2Config(**config)).to(torch.bfloat16) if config else load_base(section)
    engine, given = InProcess(model.eval(), load_tokenizer(section), 4), []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    prompts = [[40 + i, 9, 60 + i] for i in range(PADDED_BATCH)]
    found = dict(engine.choose_words([ChoiceRequest(ids, ("A", "B")) for ids in prompts]))
    assert support.supports_packing(model, prompts[0]) != bool(config)
    weight = model.get_output_embeddings().weight
    assert given[-1].dtype == weight.dtype == torch.bfloat16
    states = given[-1].detach().flatten(0, -2)  # one token of each prompt
    logits = states.double() @ weight.detach().double().T
    if config:
        logits = 0.5 * torch.tanh(logits / 0.5)
    for i, row in enumerate(logits.softmax(-1)[:, word_tokens(engine.tokenizer, ("A", "B"))[1]]):
        assert found[i].probabilities == pytest.approx((row / row.sum()).tolist(), abs=1e-6)
    assert model(input_ids=torch.tensor([[40, 9]])).logits.dtype == torch.bfloat16


def test_a_word_behind_a_text_has_the_tokens_that_it_has_there():
    """Some tokenizers of SentencePiece put a space before every text: alone, ` A` would be two tokens."""
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "▁", "x", "A", "B", "▁x", "▁A", "▁B"]
    merges = [("▁", "x"), ("▁", "A"), ("▁", "B")]
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    assert tokenizer.tokenize(" A") == ["▁", "▁A"] and tokenizer.tokenize("x A") == ["▁x", "▁A"]
    assert word_tokens(tokenizer, (" A", " B")) == ([], [6, 7])


EMPTY = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("template", "at_once", "thinks"),
    [
        ("qwen3", EMPTY, "assistant\n"), ("qwen3_5_nothink", EMPTY, "<think>\n"),
        ("deepseekv3", EMPTY, "<think>\n"), ("gptoss", "assistant<|channel|>final<|message|>", "assistant"),
        (NO_SYSTEM, "user: Judge.\n\n2 + 2?assistant: ", "user: Judge.\n\n2 + 2?"),  # the user says it
    ],
)  # fmt: skip
def test_a_vote_is_read_where_a_row_has_its_answer(engine, monkeypatch, template, at_once, thinks):
    if (shipped := Path(trl.__file__).parent / f"chat_templates/{template[:20]}.jinja").is_file():
        template = shipped.read_text(encoding="utf-8")
    monkeypatch.setattr(engine.tokenizer, "chat_template", template)
    chat = [{"role": "system", "content": "Judge."}, {"role": "user", "content": "2 + 2?"}]
    for most, end in ((0, at_once), (6, thinks)):
        ids = choice_ids(engine.tokenizer, ChoiceRequest(chat, ("A", "B"), most))
        assert engine.tokenizer.decode(ids).endswith(end)
