"""Rows without padding give the trainers' losses and gradients as TRL's own padded batches do."""

import json
from functools import partial

import pytest
import torch
from conftest import make_step, trainer_of
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM
from trl import SFTConfig
from trl.trainer.utils import use_adapter

from stages.lora.adapter import adapter
from stages.models.base import device
from stages.packing import support, trainer_inputs
from stages.packing.batch import padded
from stages.packing.trainer_inputs import accept_packed, prefix_groups
from stages.prompts.renderer import IGNORED
from stages.sft.run import SftTrainer

GROUP = 4
LENGTHS = [8, 5, 7, 3, 2, 6, 1, 4]
"""Of the completions; the first four follow a prompt of six tokens, the others one of three."""


@pytest.fixture(scope="module")
def grpo(begun):
    """RL's trainer and model, on an SFT adapter that differs from the base; `ref` is a copy of it."""
    config = begun("sft.learning_rate=0.1", "rl.beta=0.04", "rl.kl_reference=sft")
    make_step(config, "sft")
    with pytest.MonkeyPatch.context() as patch:
        trainer, model, _ = trainer_of(config, patch)
    return trainer, model.train()


@pytest.fixture(scope="module")
def sft(begun):
    """The trainer and model of SFT without dropout, on an adapter whose every element does something."""
    with pytest.MonkeyPatch.context() as patch:
        trainer, model, _ = trainer_of(begun("sft.lora_dropout=0"), patch, "sft")
    torch.manual_seed(0)
    for weight in adapter.trained_parameters(model).values():
        weight.data.normal_(0, 0.1)
    return trainer, model.train()


def batch() -> dict[str, Tensor]:
    """Two groups of four completions, as TRL pads them."""
    generator = torch.Generator().manual_seed(0)
    some = lambda n: torch.randint(3, 200, (n,), generator=generator).tolist()  # noqa: E731
    prompts = [ids for ids in (some(6), some(3)) for _ in range(GROUP)]
    prompt_ids, prompt_mask = padded(prompts, 0, device())
    completion_ids, completion_mask = padded([some(n) for n in LENGTHS], 0, device(), "right")
    return {
        "prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": torch.tensor([1.2, -0.4, 0.3, -1.1, 0.8, -0.9, 0.7, -0.6], device=device()),
        "num_items_in_batch": torch.tensor(3 * sum(LENGTHS), device=device()),
    }  # fmt: skip


def log_probs(trainer, model, inputs: dict[str, Tensor], size: int | None = None) -> tuple[Tensor, Tensor]:
    """Those of the trainer and its entropies, zero behind the end of each completion."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    keep = inputs["completion_ids"].shape[1]
    found = trainer._get_per_token_logps_and_entropies(model, ids, mask, keep, size, compute_entropy=True)
    assert found[2] is None
    return tuple(x * inputs["completion_mask"] for x in found[:2])


def trained(trainer, model, loss) -> tuple[float, Tensor, dict]:
    """The loss, the gradients of all active elements, and what was logged."""
    trainer._metrics["train"].clear()
    model.zero_grad()
    value = loss()
    value.backward()
    slopes = [p.grad.flatten() for _, p in sorted(adapter.trained_parameters(model).items())]
    return value.item(), torch.cat(slopes), {n: list(v) for n, v in trainer._metrics["train"].items()}


def same(one, two) -> None:
    (loss, slope, logged), (wanted, usual, metrics) = one, two
    assert loss == pytest.approx(wanted, abs=1e-5)
    assert usual.norm() > 1e-4 and float((slope - usual).norm() / usual.norm()) < 1e-4
    ours = ("tokens_saved", "completions_skipped")
    logged = {name: values for name, values in logged.items() if name not in ours}
    assert logged.keys() == metrics.keys()
    for name, values in metrics.items():
        assert logged[name] == pytest.approx(values, rel=1e-4, abs=1e-6), name


KINDS = ["grpo", "bnpo", "dr_grpo", "dapo"]


def set_loss(trainer, monkeypatch, kind: str, beta: float) -> None:
    for name, value in {"loss_type": kind, "beta": beta, "current_gradient_accumulation_steps": 2}.items():
        monkeypatch.setattr(trainer, name, value, raising=False)


SILENT = [[0, 1, 2, 3], [1, 4, 7], [1, 2, 3, 4, 5, 6, 7]]
"""Completions without an advantage, which are not computed where there is no KL term."""


@pytest.mark.parametrize(
    ("kind", "reference", "iterations", "silent"),
    [(kind, ("base", "ref", None)[i % 3], 2 - (i + i // 3) % 2, []) for i, kind in enumerate(KINDS)]
    + [(kind, None, 1 + i % 2, SILENT[i % 3]) for i, kind in enumerate(KINDS)],
)
def test_every_loss_and_its_gradient_are_trl_s(grpo, monkeypatch, kind, reference, iterations, silent):
    """With the KL term to the base and to the SFT adapter, and without; in a second iteration some clip."""
    trainer, model = grpo
    set_loss(trainer, monkeypatch, kind, 0.04 if reference else 0.0)
    found, computed = {}, []
    watched = lambda *rows: computed.append(list(map(len, rows[1]))) or prefix_groups(*rows)  # noqa: E731
    monkeypatch.setattr(trainer_inputs, "prefix_groups", watched)
    for sharing in (False, True):
        monkeypatch.setattr(trainer, "prefix_sharing", sharing)
        inputs = batch()
        inputs["advantages"][silent] = 0
        with torch.no_grad():
            if iterations == 2:
                # Of a CPU, because generators of a GPU draw other numbers.
                noise = torch.randn(8, max(LENGTHS), generator=torch.Generator().manual_seed(2)).to(device())
                inputs["old_per_token_logps"] = log_probs(trainer, model, inputs)[0] + 0.3 * noise
            if reference:
                with use_adapter(model, None if reference == "base" else "ref"):
                    inputs["ref_per_token_logps"] = log_probs(trainer, model, inputs)[0]
        computed.clear()
        found[sharing] = trained(trainer, model, lambda inputs=inputs: trainer._compute_loss(model, inputs))
        metrics = found[sharing][2]
        clipped = metrics["clip_ratio/region_mean"]
        assert metrics["entropy"][0] > 0 and (silent or (iterations == 1) == (clipped == [0]))
        assert (reference == "base") == (metrics.get("kl", [0])[0] > 1e-3)
    rows = [row for row in range(8) if row not in silent]
    assert computed == [[LENGTHS[row] for row in rows]]
    logged = found[True][2]
    if silent:  # entropy is that of the completions computed
        with torch.no_grad():
            entropies, tokens = log_probs(trainer, model, inputs)[1], inputs["completion_mask"]
        mean = float(entropies[rows].sum() / tokens[rows].sum())
        assert logged.pop("entropy")[0] == pytest.approx(mean, rel=1e-4) and found[False][2].pop("entropy")
    else:
        tokens = 5 + 2 + sum(LENGTHS)  # a prompt's last token is its completions', whose last is not read
        assert logged["tokens_saved"] == pytest.approx([1 - tokens / (8 * (6 + 8))])
    assert reference or logged["completions_skipped"] == [len(silent) / 8]
    same(found[True], found[False])


def test_where_no_completion_has_an_advantage_the_shortest_is_computed(grpo, monkeypatch):
    """Its gradient is zero, and no metric tells of it."""
    trainer, model = grpo
    set_loss(trainer, monkeypatch, "dapo", 0.0)
    monkeypatch.setattr(trainer, "prefix_sharing", True)
    inputs = batch()
    inputs["advantages"].zero_()
    loss, slope, logged = trained(trainer, model, lambda: trainer._compute_loss(model, inputs))
    assert loss == 0 and not slope.any() and logged["completions_skipped"] == [7 / 8]
    assert not logged.keys() & {"entropy", "tokens_saved"}


def test_whole_steps_are_trl_s_where_groups_are_split(own, tmp_path):
    """Micro batches hold half a group; TRL shuffles completions over them."""
    rewards = tmp_path / "mine.py"
    rewards.write_text(
        "def odd(completions, **_):\n    return [sum(map(ord, t)) % 97 / 97 for t in completions]\n"
    )
    odd = ["rl.start_from=init", f"rl.rewards_file={rewards}", "rl.rewards={odd: 1}", "rl.kl_reference=base"]
    odd += ["rl.max_steps=2", "rl.num_train_epochs=9", "rl.learning_rate=0.001"]
    ways = [["rl.prefix_sharing=off"], ["rl.per_device_train_batch_size=2"]]
    runs = (make_step(own(*odd, *way), "rl").path for way in ways)
    usual, shared = (json.loads((folder / "history.json").read_text()) for folder in runs)
    assert usual[0]["grad_norm"] > 1e-3 and usual[1]["kl"] > 0
    for step, same_step in zip(usual, shared, strict=True):
        assert 0.4 < same_step["tokens_saved"] < 0.8 and step.keys() == same_step.keys() - {"tokens_saved"}
        for name in {"loss", "grad_norm", "kl", "entropy", "clip_ratio/region_mean", "reward"} & step.keys():
            assert same_step[name] == pytest.approx(step[name], rel=1e-3, abs=1e-5), name


def test_dropout_gives_each_completion_a_prompt_of_its_own(begun, monkeypatch, caplog):
    trainer, model, _ = trainer_of(begun("rl.start_from=init", "rl.lora_dropout=0.05"), monkeypatch)
    said = "with dropout each completion is computed with a prompt of its own; see rl.lora_dropout"
    assert caplog.messages.count(said) == 1
    assert not trainer.prefix_sharing
    monkeypatch.setattr(trainer_inputs, "completion_logprobs", lambda *_: pytest.fail("computed in a row"))
    assert log_probs(trainer, model.train(), batch())[0].requires_grad
    with torch.no_grad():  # nothing drops out of passes that only compare, or equal models would differ
        one, two = (log_probs(trainer, model, batch())[0] for _ in range(2))
    assert torch.equal(one, two) and model.training
    # Nor is a model in a row that does not fit.
    monkeypatch.setattr(trainer, "prefix_sharing", True)
    monkeypatch.setattr(support, "supports_packing", lambda *_: False)
    assert log_probs(trainer, model, batch())[0].requires_grad


def rows_of(lengths: list[tuple[int, int]], shared: int) -> list[dict]:
    """Rows as SFT has them: by row the tokens before its labels and those with labels."""
    generator = torch.Generator().manual_seed(1)
    some = lambda n: torch.randint(3, 200, (n,), generator=generator).tolist()  # noqa: E731
    head = some(shared)
    rows = [(head + some(before - shared), some(own)) for before, own in lengths]
    return [{"input_ids": p + own, "labels": [IGNORED] * len(p) + own} for p, own in rows]


ROWS = {
    "a shared beginning": rows_of([(9, 5), (7, 8), (12, 1)], shared=6),
    "nothing in common": rows_of([(4, 5), (7, 2), (1, 9), (3, 3)], shared=0),
    "one prompt": rows_of([(6, 5), (6, 2), (6, 9)], shared=6),
    "labels from the first token": rows_of([(0, 5), (0, 3)], shared=0),
    "one row twice": rows_of([(6, 5)], shared=0) * 2,
    "a row without labels": rows_of([(5, 4), (7, 0)], shared=4),
    "a row of one token": rows_of([(1, 0), (3, 4)], shared=1),
}
ROWS["a gap in the labels"] = [
    {**row, "labels": [IGNORED if i % 5 == 3 else t for i, t in enumerate(row["labels"])]}
    for row in ROWS["a shared beginning"]
]


def collated(trainer, rows) -> dict[str, Tensor]:
    return {name: value.to(device()) for name, value in trainer.data_collator(rows).items()}


@pytest.mark.parametrize(
    ("kind", "shares"),
    [*((kind, i % 2 == 0) for i, kind in enumerate(ROWS)), ("as rendered", True), ("as rendered", False)],
)
def test_sft_s_loss_gradient_and_metrics_are_trl_s(sft, monkeypatch, kind, shares):
    trainer, model = sft
    rows = ROWS.get(kind) or [trainer.train_dataset[i] for i in range(4)]
    monkeypatch.setattr(trainer, "share_prefix", shares)
    tokens, usual = [], support.packed_hidden_states
    watched = lambda *given: tokens.append(given[1].numel()) or usual(*given)  # noqa: E731
    monkeypatch.setattr(support, "packed_hidden_states", watched)
    inputs = collated(trainer, rows)
    for number in (None, torch.tensor(50)):
        found, loss = {}, partial(trainer.compute_loss, model, inputs, num_items_in_batch=number)
        for way in (True, False):
            monkeypatch.setattr(trainer, "_supports_packing", lambda *_, way=way: way)
            assert support.supports_packing(model, [5, 6, 7])
            tokens.clear()
            trainer._total_train_tokens = 0
            found[way] = trained(trainer, model, loss)
            assert len(tokens) == way
            if way:
                read = tokens[0]
        same(found[True], found[False])
        assert found[True][2]["num_tokens"] == [sum(len(row["input_ids"]) for row in rows)]
        assert found[True][2].keys() == {"entropy", "mean_token_accuracy", "num_tokens"}
    whole = sum(len(row["input_ids"]) - 1 for row in rows)  # no last token is read
    if kind == "as rendered":
        assert (read < 0.8 * whole) == shares, "the system prompt is computed once"


def test_a_mixture_of_experts_has_its_router_s_loss(tmp_path, tiny):
    """Which a row does not give: such a model computes padded batches."""
    shape = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"intermediate_size": 48, "num_local_experts": 4, "num_key_value_heads": 1}
    model = MixtralForCausalLM(MixtralConfig(**shape, sliding_window=None, router_aux_loss_coef=0.1))
    options = {"use_cpu": device().type == "cpu", "bf16": False, "report_to": "none", "max_length": None}
    trainer = SftTrainer(
        model=model, args=SFTConfig(output_dir=str(tmp_path), **options),
        train_dataset=Dataset.from_list(ROWS["a shared beginning"]),
        processing_class=AutoTokenizer.from_pretrained(tiny), row_ids=dict, memory_hint="", share_prefix=True,
    )  # fmt: skip
    accept_packed(model)
    model.train()
    inputs = collated(trainer, ROWS["a shared beginning"])
    with_router = trainer.compute_loss(model, inputs)
    (aux,) = trainer._metrics["train"]["aux_loss"]
    assert aux > 0
    trainer.aux_loss_enabled = False
    without = trainer.compute_loss(model, inputs).item()
    assert with_router.item() == pytest.approx(without + 0.1 * aux, abs=1e-5)


def test_rows_share_beginnings_so_that_the_fewest_tokens_are_computed(monkeypatch):
    """Three tokens of two rows, which is more than one token of three; every row can be read back."""
    rows = [[2, 2, 3, 4], [1, 1, 1, 1, 5], [2, 2, 5, 6], [1, 1, 1, 1, 7, 8], [9, 9], [1, 6, 6]]
    prompts = (2, 4, 2, 4, 1, 2)  # the token before the first label stays with its row
    labels = [[IGNORED] * n + ids[n:] for n, ids in zip(prompts, rows, strict=True)]
    groups = trainer_inputs.groups_of_rows(rows, labels, shares=True)
    assert [group.prefix for group in groups] == [[1, 1, 1], [], [2], []]
    read_back = [
        (group.prefix + suffix.ids, [IGNORED] * len(group.prefix) + suffix.targets)
        for group in groups
        for suffix in group.suffixes
    ]
    pairs = sorted(zip(rows, labels, strict=True), key=lambda pair: pair[0])
    assert read_back == [(ids[:-1], targets[1:]) for ids, targets in pairs]
    monkeypatch.setattr(trainer_inputs, "MAX_MASK_CELLS", 0)  # where masks would be large: one group
    for chosen, prefix in ((slice(6), []), (slice(1, 4, 2), [1, 1, 1])):
        (together,) = trainer_inputs.groups_of_rows(rows[chosen], labels[chosen], shares=True)
        assert together.prefix == prefix
