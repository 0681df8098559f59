"""What the rl stage makes of its settings."""

import shutil
from dataclasses import replace

import pytest
import torch
from conftest import Small, labels_of, make_step, make_steps, trainer_of
from results import history, moved_share
from trl import GRPOTrainer

from stages.engines.continuous_batching import generate
from stages.errors import UnusableResult
from stages.lora.grpo.prompts import RlPrompts
from stages.models.base import load_adapted
from stages.models.tokenizer import load_tokenizer
from stages.prompts.renderer import Renderer
from stages.rewards import loading


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


@pytest.mark.slow
def test_top_k_reaches_the_sampling(ready, odd):
    """With the likeliest token alone the completions of a group are equal, and so are their rewards."""
    (step,) = history(make_step(ready(*odd, "rl.top_k=1"), "rl"))
    assert step["frac_reward_zero_std"] == 1


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
    fields = list(pool.rows[loading.FIELDS])
    loading.with_checks("mine", mine)(completions=["a"] * pool.system2_rows, fields=fields)
    wanted = [row.example.extra for row in labels if row.system == 2]
    assert seen == [([extra["target"] for extra in wanted], [extra["more"] for extra in wanted])]


OPENS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}bot: <think>\n{% endif %}"
)
"""A chat template whose prompts open a thought, and which leaves it out of conversations."""


def test_a_thought_is_closed_at_its_limit_and_its_end_is_not_learned(tiny, demo_data, tmp_path, monkeypatch):
    """Sampled twice, replaced or not, each completion has room for an answer, and the loss skips the tags."""
    model = shutil.copytree(tiny, tmp_path / "thinks")
    (model / "chat_template.jinja").write_text(OPENS, encoding="utf-8")
    limits = ("rl.max_thinking_length=6", "rl.max_completion_length=40", "rl.max_prompt_length=900")
    given = ("classify.voters=[{engine: transformers, persona: effort}]", "rl.start_from=init", *limits)
    config = Small(model, demo_data, tmp_path / "runs")(*given, "rl.beta=0")
    make_steps(config, "classify", "score", "partition")
    trainer, adapted, _ = trainer_of(config, monkeypatch)
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
