"""What the rl stage makes of its settings; rollouts of its trainer, and of a real vLLM in its process."""

import json
import subprocess
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import LORAPAR, ROOT, Small, flags, labels_of, make_step, make_steps, trainer_of
from results import history, moved_share
from transformers import Qwen2Config
from trl import GRPOTrainer

from stages.config import LoraSection, ModelSection, PromptSection
from stages.config.rl import RlSection, RolloutsSection
from stages.engines import Sampling
from stages.engines.continuous_batching import generate
from stages.errors import ConfigError, OutOfMemoryError, UnusableResult
from stages.lora.adapter import adapter
from stages.lora.adapter.merge import MergedCopy
from stages.lora.grpo import rollouts, vllm_rollouts
from stages.lora.grpo.int8 import linear_layers_in_int8
from stages.lora.grpo.prompts import RlPrompts
from stages.models.base import load_adapted, load_base
from stages.models.tokenizer import load_tokenizer
from stages.prompts.renderer import Renderer
from stages.rewards import calls
from stages.runtime.resources import BatchSize


@pytest.fixture
def ready(own):
    """The config of a run whose RL can start, in one step from the initial adapter."""
    return lambda *more: own("rl.start_from=init", "rl.max_steps=1", *more)


@pytest.fixture
def renderer(ready):
    return Renderer(load_tokenizer(ready().model), ready().prompt)


@pytest.fixture
def odd(tmp_path):
    """Settings of rewards that differ between any two completions."""
    path = tmp_path / "mine.py"
    path.write_text(
        "def odd(completions, sandbox, **_):\n"
        "    assert sandbox.name == 'unsafe-no-sandbox'\n"
        "    return [float(sum(map(ord, text)) % 97) for text in completions]\n"
        "def given(completions, gold=None, **given):\n"
        "    read = gold and given['response'] and given['question'] and given['id']\n"
        "    return [float('sandbox' not in given and bool(read))] * len(completions)\n"
    )
    unsafe = "rl.sandbox.backend=unsafe-no-sandbox"
    return [f"rl.rewards_file={path}", "rl.rewards={odd: 2, given: 0.5}", unsafe]


def test_a_person_s_rewards_get_the_sandbox_and_count_by_their_weights(ready, odd):
    """What they train loads in plain PEFT, and no frozen element moved."""
    config = ready("rl.max_steps=2", "rl.num_train_epochs=9", *odd)
    made = make_step(config, "rl")
    for step in history(made):
        assert step["rewards/odd/std"] > 0 and step["rewards/given/mean"] == 1
        assert step["reward"] == pytest.approx(2 * step["rewards/odd/mean"] + 0.5)
    assert moved_share(config, "rl") > 0 and load_adapted(config.model, made.path / "adapter")


def test_prompts_that_are_too_long_are_dropped_or_cut_on_the_left(ready, renderer, monkeypatch):
    """First the longest are a token too long, then all are. An error names the rows of cut prompts too."""
    slow = [row.example for row in labels_of(ready()) if row.system == 2]
    ids = {example.id: renderer.ids(renderer.prompt(example.prompt)) for example in slow}
    most = max(map(len, ids.values())) - 1
    long = [name for name, found in ids.items() if len(found) > most]
    summary = make_step(ready(f"rl.max_prompt_length={most}"), "rl").manifest["summary"]
    assert (summary["prompts"], summary["dropped_prompts"]) == (len(ids) - len(long), len(long))

    seen, usual = [], GRPOTrainer.compute_loss
    watched = lambda *given: seen.extend(given[2]) or generate(*given)  # noqa: E731
    monkeypatch.setattr("stages.lora.grpo.rollouts.generate", watched)
    endless = float("inf")
    monkeypatch.setattr(GRPOTrainer, "compute_loss", lambda *a, **given: usual(*a, **given) + endless)
    cut = ready("rl.max_prompt_length=20", "rl.too_long=truncate_left")
    with pytest.raises(UnusableResult, match=r"loss is inf in step 1, rows \w+") as caught:
        make_step(cut, "rl")
    assert seen and all(prompt in [found[-20:] for found in ids.values()] for prompt in seen)
    assert set(str(caught.value).partition("rows ")[2].split(", ")) <= set(ids)
    monkeypatch.undo()
    summary = make_step(cut, "rl").manifest["summary"]
    assert (summary["prompts"], summary["cut_prompts"]) == (len(ids), len(ids))


def test_rewards_get_the_values_that_the_rows_have(ready, renderer):
    """A column of one type would fill up objects and turn whole numbers into fractions."""
    values = [{"city": "Paris"}, {"x": 1}, 3, 2.5, "three", ["a"], None, 2**70]

    def mine(completions, target=None, **given):
        seen.append((target, "more" in given and given["more"]))
        return [0.0] * len(completions)

    seen = []
    config = ready()
    labels = [
        replace(row, example=replace(row.example, extra={"target": values[i % 8], "more": [3, 2.5][i % 2]}))
        for i, row in enumerate(labels_of(config))
    ]
    pool = RlPrompts.from_labels(labels, {"": renderer}, config.rl, {"mine": mine}, 0)
    fields = list(pool.rows[calls.FIELDS])
    calls.with_checks("mine", mine)(completions=["a"] * pool.system2_rows, fields=fields)
    wanted = [row.example.extra for row in labels if row.system == 2]
    assert seen == [([extra["target"] for extra in wanted], [extra["more"] for extra in wanted])]


OPENS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}bot: <think>\n{% endif %}"
)
"""A chat template whose prompts open a thought, and which leaves it out of conversations."""


def test_a_thought_is_closed_at_its_limit_and_its_end_is_not_learned(model_copy, demo_data, monkeypatch):
    """Sampled twice, replaced or not, each completion has room for an answer, and the loss skips the tags."""
    (model_copy / "chat_template.jinja").write_text(OPENS, encoding="utf-8")
    limits = ("rl.max_thinking_length=6", "rl.max_completion_length=40", "rl.max_prompt_length=900")
    given = ("classify.voters=[{engine: transformers, persona: effort}]", "rl.start_from=init", *limits)
    config = Small(model_copy, demo_data, model_copy.parent)(*given, "rl.beta=0", "rl.top_k=100")
    make_steps(config, "classify", "score", "partition")
    trainer, adapted, _ = trainer_of(config, monkeypatch)
    assert trainer.sampler.sampling.top_k == 100
    adapted.train()
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation
    batch = trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(16)])
    tokenizer, closing = trainer.processing_class, "\n</think>\n\n"
    end = 6 + len(tokenizer(closing)["input_ids"])
    closed = 0
    columns = (batch[name] for name in ("completion_ids", "completion_mask", "tool_mask"))
    for ids, mask, written in zip(*columns, strict=True):
        tokens = ids[mask.bool()].tolist()
        ended = tokenizer.eos_token_id in tokens[:6]
        assert len(tokens) <= 40 and (ended or len(tokens) > end)
        assert ended or tokenizer.decode(tokens[6:end]) == closing
        assert written.tolist() == [int(ended or not 6 <= i < end) for i in range(len(ids))]
        closed += not ended
    assert trainer._metrics["train"]["completions/closed_share"] == [closed / 16] and closed > 8
    advantages = batch["advantages"] = torch.linspace(-1, 1, 16)
    counted = batch["completion_mask"] * batch["tool_mask"]
    assert batch["num_items_in_batch"] == counted.sum()
    by_hand = -(advantages[:, None] * counted).sum() / counted.sum()  # every ratio is 1
    for trainer.prefix_sharing in (True, False):  # without it, TRL's own way
        assert trainer._compute_loss(adapted, batch).item() == pytest.approx(by_hand.item(), abs=1e-6)


COLOCATED = RolloutsSection(engine="vllm_colocate")
PROMPTS = [list(range(5, 8 + i)) for i in range(16)]


def sampler_of(tiny, temperature: float, merged: bool) -> rollouts.RolloutSampler:
    """From a merged copy, or through the adapter's layers."""
    section = ModelSection(name=str(tiny), dtype="float32")
    base, tokenizer = load_base(section), load_tokenizer(section)
    copy = MergedCopy(base) if merged else None
    sampling = Sampling(12, (tokenizer.eos_token_id,), temperature)
    size = BatchSize("rl.rollouts.batch_size", 16, "lower rl.max_completion_length")
    model = adapter.initial(base, LoraSection(), 0)
    renderer = Renderer(tokenizer, PromptSection(template="plain"))
    return rollouts.RolloutSampler(model, copy, renderer, sampling, size)


def test_a_limit_of_thoughts_leaves_room_for_an_answer(tokenizer):
    renderer = Renderer(tokenizer, PromptSection())
    with pytest.raises(ConfigError, match="6, with the 11 tokens that close a thought, leaves no room"):
        rollouts.ThoughtLimit(6, 17, renderer)
    assert rollouts.ThoughtLimit(6, 18, renderer)


def test_colocated_samples_differ_by_the_seed(monkeypatch):
    """vLLM in this process has seeded all generators with the rank, whatever the config's seed is."""
    process = SimpleNamespace(process_index=0)
    trainer, drawn = SimpleNamespace(vllm_generation=SimpleNamespace(), accelerator=process), []
    for seed in (3, 3, 7):
        torch.manual_seed(0)
        vllm_rollouts.install_weights(trainer, None, seed)
        drawn.append(float(torch.rand(1)))
    assert drawn[0] == drawn[1] != drawn[2]


def test_without_memory_completions_are_sampled_in_smaller_batches(tiny, monkeypatch, caplog):
    """What had ended is kept, and all are those of a machine with more memory. Nothing drops out of them."""
    sampler = sampler_of(tiny, 1.0, merged=False)
    sampler.adapted.train()
    with_memory, usual, sizes = sampler.sample(PROMPTS, "seed"), rollouts.generate, []

    def full(model, tokenizer, prompts, sampling, stops, seeds, slots, most=4):
        sizes.append((len(prompts), slots))
        assert not any(module.training for module in model.modules())
        for number, completion in enumerate(usual(model, tokenizer, prompts, sampling, stops, seeds, slots)):
            if number == 3 and slots > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 GiB.")
            yield completion

    monkeypatch.setattr(rollouts, "generate", full)
    written = [completion.ids for completion in with_memory]
    assert [completion.ids for completion in sampler.sample(PROMPTS, "seed")] == written
    assert max(map(len, written)) > 1 and len(set(map(tuple, written))) == 16
    assert sizes == [(16, 16), (13, 8), (10, 4)]
    assert "out of memory with rl.rollouts.batch_size 16: going on with 8" in caplog.messages
    monkeypatch.setattr(rollouts, "generate", partial(full, most=0))
    with pytest.raises(OutOfMemoryError, match=r"out of memory with rl\.rollouts\.batch_size 1") as caught:
        sampler.sample(PROMPTS, "seed")
    assert caught.value.hint == "lower rl.max_completion_length"


def test_8_bits_sample_from_nearly_the_same_model(tiny):
    """Their log-probabilities are the sampler's own, and the copy's weights stay as they are."""
    sampler = sampler_of(tiny, 1.3, merged=True)
    model, exact = sampler.copy.model, sampler.sample(PROMPTS, "s")
    weights = {name: value.clone() for name, value in model.named_parameters()}
    completions = replace(sampler, in_int8=True).sample(PROMPTS, "s")
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())

    def logprobs(prompt, ids):
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / 1.3
        return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]

    gaps = []
    with torch.no_grad():
        for prompt, completion, float32 in zip(PROMPTS, completions, exact, strict=True):
            told = torch.tensor(completion.logprobs)
            assert torch.allclose(logprobs(prompt, float32.ids), torch.tensor(float32.logprobs), atol=1e-4)
            with linear_layers_in_int8(model, prompt):
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


def test_the_share_is_of_the_card_and_one_that_is_set_stays(monkeypatch):
    """Of Qwen2.5-7B: 256 completions of 384 tokens of 56 KiB are 5.25 GiB, less than half of what is free."""
    layers = {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    config = Qwen2Config(**layers, hidden_size=3584)
    base, paper = SimpleNamespace(num_parameters=lambda: 7_615_616_512, config=config), RlSection()
    assert vllm_rollouts.memory_share(RlSection(rollouts={"gpu_memory_utilization": 0.2}), base) == 0.2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert vllm_rollouts.memory_share(paper, base) == 0.3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (33 * 2**30, 48 * 2**30))
    assert vllm_rollouts.memory_share(paper, base) == pytest.approx((14.185 + 3 + 5.25) / 48, abs=0.001)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (17 * 2**30, 48 * 2**30))
    with pytest.raises(ConfigError, match=r"17\.0 GiB of the GPU are free, and vLLM needs 14\.2") as caught:
        vllm_rollouts.memory_share(paper, base)
    assert "rl.rollouts.engine=transformers" in caught.value.hint


@pytest.mark.vllm
def test_the_real_engine_answers_like_the_trained_model(begun, capsys):
    """vLLM in the trainer's process: its probabilities after each sync are the trainer's."""
    config = begun("rl.rollouts.engine=vllm_colocate", "rl.max_steps=3")
    make_step(config, "sft")
    settings = [*begun.home, "rl.rollouts.engine=vllm_colocate", "rl.max_steps=3", "rl.learning_rate=0.05"]
    command = [*LORAPAR, "rl", "--force", "configs/smoke.yaml", *flags(*settings)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    steps = json.loads((config.root / "rl/latest/history.json").read_text())
    differences = [row["sampling/sampling_logp_difference/max"] for row in steps]
    with capsys.disabled():
        print(f"\n  vLLM: log-probabilities differ by {max(differences):.4f} at most", end="")
    assert len(steps) == 3 and max(differences) < 0.05
