"""Rollouts from vLLM: TRL's two modes with an engine of our own in vLLM's place, and the real one on CPU."""

import copy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import httpx
import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config

from stages.config import LoraSection, ModelSection
from stages.config.rl import RlSection, RolloutsSection
from stages.engines import Sampling
from stages.errors import ConfigError, OutOfMemoryError, ServerError
from stages.lora.adapter import adapter
from stages.lora.grpo import sampler, vllm_rollouts
from stages.lora.grpo.int8 import linear_layers_in_int8
from stages.models.base import load_base
from stages.models.tokenizer import load_tokenizer
from stages.runtime.batch_size import BatchSize

SERVER = RolloutsSection(engine="vllm_server", base_url="http://gpu:8000")
COLOCATED = RolloutsSection(engine="vllm_colocate")
MODES = {"vllm_colocate": [], "vllm_server": ["rl.rollouts.base_url=http://gpu:8000"]}
MODE_CASES = ["vllm_colocate", pytest.param("vllm_server", marks=pytest.mark.slow)]


class Engine:
    """What vLLM is to TRL in both modes: a plain model that takes weights by name, and samples from them."""

    def __init__(self, base: torch.nn.Module) -> None:
        self.model = copy.deepcopy(base)
        self.syncs: list[dict[str, Tensor]] = []

    # the colocated LLM
    @property
    def llm_engine(self):
        runner = SimpleNamespace(model=self)
        return SimpleNamespace(
            model_executor=SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        )

    def load_weights(self, weights):
        for name, value in weights:
            if not self.syncs or name in self.syncs[-1]:
                self.syncs.append({})
            self.syncs[-1][name] = value.clone()
            with torch.no_grad():
                self.model.get_parameter(name).copy_(value)

    def reset_prefix_cache(self): ...

    # the client of a server
    def update_named_params(self, metadata, weights):
        seen = [
            (name, str(value.dtype).removeprefix("torch."), list(value.shape))
            for name, value in weights_of(self, weights)
        ]
        assert seen == metadata

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def generate(self, prompts, sampling_params=None, n=1, max_tokens=None, **given):
        self.given = {**given, **(vars(sampling_params) if sampling_params else {})}
        prompts = [p["prompt_token_ids"] if isinstance(p, dict) else p for p in prompts]
        made = [
            self._sample(ids, max_tokens or sampling_params.max_tokens) for ids in prompts for _ in range(n)
        ]
        if sampling_params is None:
            return {
                "prompt_ids": prompts,
                "completion_ids": [ids for ids, _ in made],
                "logprobs": [[[x] for x in values] for _, values in made],
            }
        return [
            SimpleNamespace(prompt_token_ids=prompt, outputs=[SimpleNamespace(token_ids=ids, logprobs=[
                {token: SimpleNamespace(rank=1, logprob=x)} for token, x in zip(ids, values, strict=True)])])
            for prompt, (ids, values) in zip(prompts, made, strict=True)
        ]  # fmt: skip

    @torch.no_grad()
    def _sample(self, prompt: list[int], number: int) -> tuple[list[int], list[float]]:
        ids, values = list(prompt), []
        for _ in range(number):
            row = torch.tensor([ids], device=self.model.device)
            scores = torch.log_softmax(self.model(row).logits[0, -1].float(), -1)
            ids.append(int(torch.multinomial(scores.exp(), 1)))
            values.append(float(scores[ids[-1]]))
        return ids[len(prompt) :], values


def weights_of(engine: Engine, weights):
    for name, value in weights:
        engine.load_weights([(name, value)])
        yield name, value


def test_without_memory_completions_are_sampled_in_smaller_batches(tiny, monkeypatch, caplog):
    """What had ended is kept, and all are those of a machine with more memory. Nothing drops out of them."""
    section = ModelSection(name=str(tiny))
    model, tokenizer = adapter.initial(load_base(section), LoraSection(), 0), load_tokenizer(section)
    sampling = Sampling(12, (tokenizer.eos_token_id,), 1.0, 1.0, 0)
    size = BatchSize("rl.rollouts.batch_size", 16, "lower rl.max_completion_length")
    rollouts = sampler.RolloutSampler(model, None, tokenizer, sampling, size)
    model.train()
    prompts = [list(range(5, 8 + i)) for i in range(16)]
    with_memory, usual, sizes = rollouts.sample(prompts, "seed"), sampler.generate, []

    def full(model, tokenizer, prompts, sampling, stops, seeds, slots, most=4):
        sizes.append((len(prompts), slots))
        assert not any(module.training for module in model.modules())
        for number, completion in enumerate(usual(model, tokenizer, prompts, sampling, stops, seeds, slots)):
            if number == 3 and slots > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 GiB.")
            yield completion

    monkeypatch.setattr(sampler, "generate", full)
    written = [completion.ids for completion in with_memory]
    assert [completion.ids for completion in rollouts.sample(prompts, "seed")] == written
    assert max(map(len, written)) > 1 and len(set(map(tuple, written))) == 16
    assert sizes == [(16, 16), (13, 8), (10, 4)]
    assert "out of memory with rl.rollouts.batch_size 16: going on with 8" in caplog.messages
    monkeypatch.setattr(sampler, "generate", partial(full, most=0))
    with pytest.raises(OutOfMemoryError, match=r"out of memory with rl\.rollouts\.batch_size 1") as caught:
        rollouts.sample(prompts, "seed")
    assert caught.value.hint == "lower rl.max_completion_length"


def test_8_bits_sample_from_nearly_the_same_model(tiny):
    """Their log-probabilities are the sampler's own, and the copy's weights stay as they are."""
    section = ModelSection(name=str(tiny), dtype="float32")
    base, tokenizer = load_base(section), load_tokenizer(section)
    copy = vllm_rollouts.copy_of(base, RolloutsSection(), section, None)
    sampling = Sampling(12, (tokenizer.eos_token_id,), 1.3)
    size = BatchSize("rl.rollouts.batch_size", 16, "")
    rollouts = sampler.RolloutSampler(
        adapter.initial(base, LoraSection(), 0), copy, tokenizer, sampling, size
    )
    prompts = [list(range(5, 8 + i)) for i in range(16)]
    exact = rollouts.sample(prompts, "s")
    weights = {name: value.clone() for name, value in copy.model.named_parameters()}
    completions = replace(rollouts, in_int8=True).sample(prompts, "s")
    assert all(torch.equal(value, weights[name]) for name, value in copy.model.named_parameters())

    def logprobs(prompt, ids):
        logits = copy.model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / 1.3
        return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]

    gaps = []
    with torch.no_grad():
        for prompt, completion, float32 in zip(prompts, completions, exact, strict=True):
            told = torch.tensor(completion.logprobs)
            assert torch.allclose(logprobs(prompt, float32.ids), torch.tensor(float32.logprobs), atol=1e-4)
            with linear_layers_in_int8(copy.model, prompt):
                assert torch.allclose(logprobs(prompt, completion.ids), told, atol=2e-3)
            gaps.append((logprobs(prompt, completion.ids) - told).abs().max())
    assert 1e-4 < max(gaps) < 0.1


def test_colocated_vllm_loads_the_revision(monkeypatch, tiny):
    monkeypatch.setattr(vllm_rollouts, "snapshot_download", lambda name, revision: f"/hub/{name}/{revision}")
    revisions = {("a/b", "c1"): "/hub/a/b/c1", ("a/b", "main"): "a/b", (str(tiny), "c1"): "a/b"}
    for (name, revision), called in revisions.items():
        base = SimpleNamespace(name_or_path="a/b")
        vllm_rollouts.name_revision(base, COLOCATED, ModelSection(name=name, revision=revision))
        assert base.name_or_path == called


RAW_LOGPROBS = {
    "weight_transfer_config": {"backend": "nccl"}, "model_config": {"logprobs_mode": "raw_logprobs"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, r"base_url http://gpu:8000: ConnectError"), ({}, "takes no new weights"),
        (RAW_LOGPROBS, "reports raw_logprobs"), ({"model_config": None}, "AttributeError"),
    ],
    ids=["gone", "no weights", "raw", "no object"],
)  # fmt: skip
def test_a_server_that_will_not_do_is_named_with_the_command(monkeypatch, config, said):
    def get(url, **_):
        if config is None:
            raise httpx.ConnectError("refused")
        return httpx.Response(200, json={"vllm_config": config})

    monkeypatch.setattr(httpx, "get", get)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(vllm_rollouts.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ServerError, match=said) as caught:
        vllm_rollouts.prepare(SERVER, "m")
    assert "VLLM_SERVER_DEV_MODE=1 vllm serve m --weight-transfer-config" in caught.value.hint


GIB = 2**30
# Parameters, and bytes of a token's keys and values: 2 · layers · key heads · 128 · 2 bytes.
LLAMA2_7B, QWEN25_7B = (6_738_415_616, 2 * 32 * 32 * 128 * 2), (7_615_616_512, 2 * 28 * 4 * 128 * 2)
PAPER = RlSection(rollouts=COLOCATED)  # 256 completions of 128 + 256 tokens


def test_an_engine_that_does_not_fit_beside_the_base_is_refused():
    """LLaMA-2-7B on 24 GiB: its 12.6 GiB twice."""
    with pytest.raises(ConfigError, match=r"11\.4 GiB of the GPU are free, and vLLM needs 12\.6") as caught:
        vllm_rollouts.colocated_bytes(PAPER, *LLAMA2_7B, 24 * GIB - 2 * LLAMA2_7B[0], 1)
    assert "rl.rollouts.engine=transformers" in caught.value.hint


def test_the_share_is_of_the_card_and_one_that_is_set_stays(monkeypatch):
    """256 · 384 · 56 KiB are 5.25 GiB, less than half of what is free."""
    layers = {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    config = Qwen2Config(**layers, hidden_size=3584)
    base = SimpleNamespace(num_parameters=lambda: QWEN25_7B[0], config=config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (33 * GIB, 48 * GIB))
    made = vllm_rollouts.with_memory_share(PAPER, base).rollouts
    share = vllm_rollouts.arguments(made, 384, [])["vllm_gpu_memory_utilization"]
    assert share == pytest.approx((14.185 + 3 + 5.25) / 48, abs=0.001)
    own = COLOCATED.model_copy(update={"gpu_memory_utilization": 0.2})
    for given in (PAPER.model_copy(update={"rollouts": own}), RlSection()):
        assert vllm_rollouts.with_memory_share(given, base) is given
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert vllm_rollouts.with_memory_share(PAPER, base).rollouts.gpu_memory_utilization == 0.3


NEEDS_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="V2 needs Triton"))
