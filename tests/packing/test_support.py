"""Sequences in one row give what each gives alone, and a model of which this is not true is refused."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DiffLlamaConfig,
    Gemma2Config,
    Gemma3Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from stages.packing import support
from stages.packing.batch import PackedBatch, PrefixGroup, Suffix
from stages.packing.support import packed_logprobs, supports_packing

WORDS = 97
SMALL = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
FULL = {"layer_types": ["full_attention"] * 2}
VISION = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
OPT = {name: value for name, value in SMALL.items() if name not in ("intermediate_size", "initializer_range")}
TAKEN = {
    "llama": LlamaConfig(**GROUPED), "qwen2": Qwen2Config(**GROUPED), "qwen3": Qwen3Config(**GROUPED),
    "mistral without a window": MistralConfig(**GROUPED, sliding_window=None),
    "gpt-neox": GPTNeoXConfig(**SMALL),
    "opt": OPTConfig(**OPT, ffn_dim=48, word_embed_proj_dim=32, init_std=0.2),
}  # fmt: skip
IMAGES = {"text_config": GROUPED | {"sliding_window": 8}, "vision_config": VISION, "mm_tokens_per_image": 4}
CAPPED = {"final_logit_softcapping": None, "attn_logit_softcapping": 0.1}
REFUSED = {
    "its layers see 8 tokens back": MistralConfig(**GROUPED, sliding_window=8),
    "it has layers of sliding_attention": Gemma3Config(**IMAGES),
    "its layers attend several times": DiffLlamaConfig(**GROUPED),
    "log-probabilities in a row differ by": Gemma2Config(**GROUPED, **FULL, **CAPPED),
    "a trained prompt precedes every text": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "its head is not a linear layer": LoraConfig(r=2, target_modules=["q_proj", "lm_head"]),
}
"""Reason → config of a model, or of an adapter on Llama; rows would give a trained head no gradient."""


def made(config, kind="sdpa"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=kind).eval()


def adapted(config, dropout=0.0):
    """With a LoRA adapter that does something."""
    lora = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj", "up_proj"], lora_dropout=dropout, init_lora_weights=False
    )
    return get_peft_model(made(config), lora)


def tokens(number: int, generator: torch.Generator) -> list[int]:
    return torch.randint(3, WORDS, (number,), generator=generator).tolist()


def some(shape: list[tuple[int, list[int]]], seed: int = 0) -> list[tuple[list[int], list[list[int]]]]:
    """Prompts with their completions; shape: by prompt its length and those of its completions."""
    generator = torch.Generator().manual_seed(seed)
    return [(tokens(n, generator), [tokens(m, generator) for m in own]) for n, own in shape]


def row_of(texts) -> PackedBatch:
    groups = [
        PrefixGroup(prompt[:-1], [Suffix([prompt[-1], *ids[:-1]], ids) for ids in completions])
        for prompt, completions in texts
    ]
    return PackedBatch.from_groups(groups, torch.device("cpu"))


def alone(model, texts, temperature=1.0):
    """Log-probabilities, entropies and whether no token is likelier, by a forward pass for each sequence."""
    found = []
    for prompt, completions in texts:
        for ids in completions:
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            logp = (logits / temperature).log_softmax(-1)
            own = logp.gather(1, torch.tensor(ids)[:, None])[:, 0]
            found.append((own, -(logp.exp() * logp).sum(-1), logp.argmax(-1) == torch.tensor(ids)))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def gradient(model, values: torch.Tensor) -> torch.Tensor:
    """Of a fixed random weighting of `values`, with respect to all that trains."""
    weights = torch.randn(len(values), generator=torch.Generator().manual_seed(1)).to(values.dtype)
    model.zero_grad()
    (weights * values).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.fixture(scope="module")
def exact():
    """A model in float64, one that takes rows."""
    model = adapted(TAKEN["llama"]).double().eval()
    assert supports_packing(model, [5, 6, 7, 8, 9])
    return model


SHAPES = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=5)), min_size=1, max_size=3
)


@settings(max_examples=15)
@given(SHAPES, st.integers(0, 99), st.sampled_from([0.7, 1.6]))
def test_a_row_gives_what_each_sequence_gives_alone(exact, shape, seed, temperature):
    texts = some(shape, seed)
    found = packed_logprobs(exact, row_of(texts), temperature)
    log_probs, entropy, likeliest = alone(exact, texts, temperature)
    torch.testing.assert_close(found.log_probs, log_probs, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.entropy, entropy, rtol=0, atol=1e-9)
    assert torch.equal(found.is_top1, likeliest)
    wanted = gradient(exact, log_probs)
    apart = gradient(exact, found.log_probs) - wanted
    assert float(apart.norm()) <= 1e-6 * float(wanted.norm())


@pytest.mark.parametrize("kind", support.KINDS)
@pytest.mark.parametrize("name", TAKEN)
def test_architectures_take_rows_and_their_own_pass_stays_as_it_was(name, kind):
    model = made(TAKEN[name], kind)
    ids = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]])
    mask = (ids != 0).long()

    @torch.no_grad()
    def own():
        whole = model(input_ids=ids[1:]).logits
        padded = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0)).logits
        half = model(input_ids=ids[1:, :3], use_cache=True).past_key_values
        return whole, padded, model(input_ids=ids[1:, 3:], past_key_values=half).logits

    before = own()
    assert supports_packing(model, ids[1].tolist())
    assert model.config._attn_implementation == support.MARK + kind
    for old, new in zip(before, own(), strict=True):
        assert torch.equal(old, new)
    texts = some([(7, [5, 1, 6]), (1, [3, 2]), (4, [7])])
    found = packed_logprobs(model, row_of(texts))
    log_probs, entropy, _ = alone(model, texts)
    assert log_probs.std() > 0.2, "a model that knows nothing shows nothing"
    torch.testing.assert_close(found.log_probs, log_probs, rtol=0, atol=2e-5)
    torch.testing.assert_close(found.entropy, entropy, rtol=0, atol=2e-5)


@pytest.mark.parametrize("reason", REFUSED)
def test_what_rows_would_get_wrong_is_refused_with_one_warning(reason, caplog):
    config = REFUSED[reason]
    of_adapter = isinstance(config, PeftConfig)
    model = get_peft_model(made(TAKEN["llama"]), config).eval() if of_adapter else made(config, "eager")
    ids = tokens(20, torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(input_ids=torch.tensor([ids])).logits
    with caplog.at_level(logging.WARNING):
        assert not supports_packing(model, ids) and not supports_packing(model, ids)
    (said,) = [record.getMessage() for record in caplog.records if record.name == support.log.name]
    name = type(model.get_base_model() if of_adapter else model).__name__
    assert said.startswith(f"{name} computes every sequence by itself: {reason}")
    with torch.no_grad():
        assert torch.equal(model(input_ids=torch.tensor([ids])).logits, before)


def test_another_kind_of_attention_is_refused(caplog):
    flex = made(LlamaConfig(**GROUPED))  # whose config no other model has
    flex.set_attn_implementation("flex_attention")
    assert not supports_packing(flex, [5, 6, 7])
    assert caplog.messages[-1].endswith("attention is flex_attention, not eager or sdpa")


def test_checkpointing_changes_no_gradient():
    texts = some([(7, [5, 1, 6]), (3, [4, 4])])
    grown = []
    for checkpointing in (False, True):
        model = adapted(TAKEN["llama"]).double()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        assert supports_packing(model, texts[0][0])
        calls = []
        layer = model.get_base_model().model.layers[0].self_attn
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        grown.append(gradient(model, packed_logprobs(model, row_of(texts)).log_probs))
        assert len(calls) == 1 + checkpointing, "the layer is computed again"
    torch.testing.assert_close(*grown, rtol=1e-9, atol=1e-12)


def test_dropout_of_the_model_s_own_is_seen_and_acts_in_a_row():
    """In training; the numbers of a shared beginning would drop out for all its branches alike."""
    model = made(LlamaConfig(**GROUPED, attention_dropout=0.5)).train()
    model.model.layers[1].eval()
    assert support.has_active_dropout(model) and not support.has_active_dropout(made(TAKEN["llama"]))
    before, modes = torch.random.get_rng_state(), [module.training for module in model.modules()]
    assert supports_packing(model, [3, 4, 5, 6, 7])  # which draws no number and leaves every mode
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    row = row_of([([3], [[4, 5, 6, 7]])])

    def alike() -> bool:
        return torch.equal(*(packed_logprobs(model, row).log_probs for _ in range(2)))

    assert not alike()
    model.eval()
    assert alike()


def test_behind_prompts_of_one_length_all_layers_and_completions_have_one_mask():
    """Kept by each layer of a 7B model, those of 8 completions of 2,048 tokens took 13 GiB."""
    for prompts, masks in (((11, 11), 1), ((11, 8), 4)):
        row = row_of(some([(length, [23, 18]) for length in prompts]))
        mask = row.mask(torch.float32, 3)
        assert mask is row.mask(torch.float32, 3) and len(mask) == masks


def test_short_rows_in_bfloat16_are_attended_to_in_float32():
    """As in torch's own kernels: nothing is lost but what the inputs' and the output's rounding takes."""
    batch = row_of(some([(9, [5, 3]), (4, [6])]))
    wide = [
        torch.randn(1, heads, batch.input_ids.numel(), 8).bfloat16().double().requires_grad_()
        for heads in (4, 2, 2)
    ]
    narrow = [x.detach().bfloat16().requires_grad_() for x in wide]
    exact, taken = (batch.attend(0, *inputs, scale=0.7, dropout_p=0.0) for inputs in (wide, narrow))
    assert taken.dtype == torch.bfloat16
    assert torch.allclose(taken.double(), exact, rtol=2**-8, atol=2**-9)
    weights = torch.randn_like(exact).bfloat16()
    taken.backward(weights)
    exact.backward(weights.double())
    for short, full in zip(narrow, wide, strict=True):
        assert (short.grad - full.grad).norm() < 0.01 * full.grad.norm()
