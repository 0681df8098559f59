"""What SFT and RL can be told: learning rates, where to start, which rows to train on.

A run that cannot go well stops before it does harm, and says where.
"""

from dataclasses import replace

import pytest
import torch
import transformers
from conftest import labels_of, make_step
from results import history, untimed
from safetensors.torch import save_file
from torch import nn
from trl import GRPOTrainer, SFTTrainer

from stages.config import PromptSection, ScoreSection, SftSection
from stages.errors import DataError, OutOfMemoryError, UnusableResult
from stages.lora import examples
from stages.lora.adapter import adapter
from stages.lora.adapter.adapter import ADAPTER
from stages.lora.training import curves, loop
from stages.lora.training.curves import draw  # conftest replaces it before the first test
from stages.lora.training.start import StartingAdapter
from stages.lora.training.trainer import ResumableTrainer
from stages.pipeline.resolve import resolved
from stages.pipeline.steps import plan_steps
from stages.prompts.renderer import Renderer
from stages.records import Example, Labelled, labelled_examples
from stages.sft import run as sft
from stages.store.checkpoints import Checkpoints

SFT = ["sft.max_steps=3", "sft.num_train_epochs=3", "sft.system2_share=0", "sft.weight_decay=0.1"]
SAVED = ["sft.save_steps=1", "rl.start_from=init", "rl.max_steps=3", "rl.save_steps=1"]


@pytest.mark.parametrize("value", [1e-30, float("nan"), -0.0])
def test_a_frozen_element_with_any_other_bits_is_noticed(tmp_path, value):
    active = torch.tensor([[True, False], [True, True]])
    start, end = torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [-0.0, 0.0]])
    for name, weight in {"start": start, "end": end, "harmed": end.clone()}.items():
        if name == "harmed":
            weight[0, 1] = value
        (tmp_path / name).mkdir()
        save_file({"a.weight": weight}, tmp_path / name / adapter.ADAPTER)
    initial = StartingAdapter(tmp_path / "start", {"a.weight": active})
    counts = initial.verify(tmp_path / "end")
    assert (counts["active"], counts["moved"], counts["frozen_drift"]) == (3, 2, 0.0)
    with pytest.raises(AssertionError, match="a.weight: 1 frozen elements changed"):
        initial.verify(tmp_path / "harmed")


@pytest.mark.parametrize(
    ("scheduler", "falling"), [("linear", [3 / 4, 1 / 4]), ("cosine", [(2 + 2**0.5) / 4, (2 - 2**0.5) / 4])]
)
def test_step_i_of_w_warm_up_steps_has_i_parts_in_w_of_the_peak(tmp_path, scheduler, falling):
    class Trainer(ResumableTrainer, transformers.Trainer): ...

    section = SftSection(learning_rate=0.3, lr_scheduler_type=scheduler, warmup_ratio=0.5)
    arguments = sft._arguments(section, 8, 0, Checkpoints(tmp_path, ""))
    trainer = Trainer(model=nn.Linear(2, 2), args=arguments, row_ids=dict, memory_hint="")
    groups = [{"params": [p], "lr": lr} for p, lr in zip(trainer.model.parameters(), (0.3, 1.2), strict=True)]
    optimizer = torch.optim.SGD(groups)
    made = trainer.create_scheduler(8, optimizer)
    assert trainer.create_scheduler(8, optimizer) is made is trainer.lr_scheduler
    rates = []
    for _ in range(8):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        made.step()
    shares = [0.25, 0.5, 0.75, 1, 1, falling[0], 0.5, falling[1]]
    assert rates == [pytest.approx([0.3 * share, 1.2 * share]) for share in shares]


@pytest.mark.slow
def test_the_reversed_order(begun):
    """RL from the initial adapter, SFT from RL's."""
    config = begun(*SFT, "rl.start_from=init", "sft.start_from=rl", "rl.max_steps=1")
    assert [name for name in plan_steps(resolved(config)) if name in ("sft", "rl")] == ["rl", "sft"]
    for stage in ("rl", "sft"):
        summary = make_step(config, stage).manifest["summary"]
        assert summary["frozen_drift"] == 0 and summary["moved"] > 0


@pytest.mark.slow
def test_tensorboard_has_the_loss_of_every_step_in_a_folder_that_stays(own, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    config = own(*SFT, "sft.report_to=[tensorboard]")
    artifact = make_step(config, "sft")
    log = events.EventAccumulator(str(config.root / f"tensorboard/sft-{artifact.path.name}")).Reload()
    losses = [row["loss"] for row in history(artifact)]
    assert [event.value for event in log.Scalars("train/loss")] == pytest.approx(losses)


def test_rows_that_do_not_teach_to_stop_are_named(tokenizer):
    renderer = Renderer(tokenizer, PromptSection())
    whole = renderer.row(Example("one", "1?", "1\n#### 1", "1"))
    cut = replace(whole, id="two", input_ids=whole.input_ids[:-3], labels=whole.labels[:-3])
    assert renderer.rows_without_stop([whole, cut]) == ["two"]


def labelled(n: int, system: int | None, response: str = "A", gold: str | None = None) -> Labelled:
    return Labelled(Example(str(n), "Q", response, gold), system, {})


def imitated(rows: list[Labelled], sft: SftSection) -> list[Example]:
    return examples.trained_by_sft(rows, sft, None, 0)[""]


def test_system_1_may_learn_to_answer_at_once():
    rows = [
        labelled(0, 1, "Two and two.\n#### 4", "4"), labelled(1, 2, "Slowly.\n#### 5", "5"),
        labelled(2, 1, "Nothing to verify."),
    ]  # fmt: skip
    section = SftSection(system1_targets="answer", system2_share=0.5)
    given = imitated(rows, section)
    assert [e.response for e in given] == ["#### 4", "Slowly.\n#### 5", "Nothing to verify."]
    assert [e.response for e in imitated(rows, SftSection())][0] == "Two and two.\n#### 4"
    with pytest.raises(DataError, match="none of 1 System 1 rows has a verifiable answer"):
        imitated(rows[1:], section)


def test_undecided_rows_are_trained_by_neither_stage():
    rows = [labelled(i, system) for i, system in enumerate((1, 2, None))]
    assert [example.id for example in labelled_examples(rows)] == ["0", "1"]
    assert [example.id for example in imitated(rows, SftSection(data="all"))] == ["0", "1"]
    with pytest.raises(DataError, match="all 1 examples are undecided"):
        labelled_examples(rows[2:])


def test_steps_are_exact_and_a_limit_that_no_training_reaches_is_said(caplog):
    for batches, epochs, steps in ((50, 1.1, 55), (25, 2.2, 55), (3, 0.5, 2), (7, 1, 7)):
        assert loop.steps_of(batches, SftSection(num_train_epochs=epochs)) == steps
    for limit, steps in ((4, 4), (40, 10)):
        assert loop.steps_of(5, SftSection(max_steps=limit, num_train_epochs=2), stage="sft") == steps
    assert len(caplog.messages) == 1 and "sft ends after 10 steps (num_train_epochs 2)" in caplog.text


def test_the_cold_start_is_a_share_of_the_system_1_rows(caplog):
    rows = [labelled(i, 1 + i % 2) for i in range(20)]
    found = imitated(rows, SftSection(system2_share=0.3))
    assert len(found) == 13 and sum(int(example.id) % 2 for example in found) == 3 and not caplog.messages
    few = [row for row in rows if row.system == 1] + [row for row in rows if row.system == 2][:2]
    assert len(imitated(few, SftSection(system2_share=0.3))) == 12
    assert caplog.messages == ["sft.system2_share 0.3 asks for 3 System 2 rows, and 2 have a response"]


def test_the_figure_has_a_panel_for_all_that_there_is_and_does_not_tell_when_it_was_made(tmp_path):
    logged = {"rewards/a/mean": 1.0, "rewards/b/mean": 2.0}
    steps = [{"step": step, "loss": 1 / step, "reward": float(step), **logged} for step in (1, 2, 3)]
    drawn = {axes.get_title(): axes for axes in curves.history_figure(steps).axes}
    assert list(drawn) == ["loss", "reward"]
    lines = {line.get_label(): list(line.get_ydata()) for line in drawn["reward"].lines}
    assert lines == {"all, weighted": [1, 2, 3], "a": [1, 1, 1], "b": [2, 2, 2]}
    assert [axes.get_title() for axes in curves.history_figure(steps, "reward").axes] == ["reward"]
    draw(steps, tmp_path / "one.png")
    draw(steps, tmp_path / "two.png")
    made = (tmp_path / "one.png").read_bytes()
    assert made.startswith(b"\x89PNG") and made == (tmp_path / "two.png").read_bytes()


def test_score_and_sft_read_rows_with_a_response():
    rows = [labelled(i, 1 + i % 2, f"#### {i}" if i % 3 else "", str(i)) for i in range(24)]
    for chosen in examples.scored(rows, ScoreSection(examples=8), 0)[0].values():
        assert len(chosen) == 8 and all(example.response for example in chosen)
    mixed = imitated(rows, SftSection(system2_share=0.5))
    assert len(mixed) == 8 + 4 and all(example.response for example in mixed)
    taught = imitated(rows, SftSection(system1_targets="answer", system2_share=0.0))
    assert {example.response for example in taught} == {f"#### {i}" for i in range(0, 24, 2)}
    assert len(imitated(rows, SftSection(data="all"))) == 16
    bare = [replace(row, example=replace(row.example, response="")) for row in rows if row.system == 2]
    with pytest.raises(DataError, match="none of 12 rows labelled System 2 has a response"):
        examples.scored([*rows[::2], *bare], ScoreSection(), 0)
    with pytest.raises(DataError, match="no row has a response for SFT to imitate"):
        imitated(bare, SftSection(data="all"))


def endless_gradient(model, loss):
    """The loss itself stays finite."""
    values = next(p for p in model.parameters() if p.requires_grad)
    return loss + torch.where(values > -9e9, 0.0, values.sqrt()).sum()


@pytest.mark.parametrize(
    ("trainer", "spoil", "said"),
    [
        (SFTTrainer, lambda model, loss: loss * float("nan"), "loss is nan"),
        (GRPOTrainer, endless_gradient, "gradient norm is nan"),
    ],
    ids=["loss of sft", "gradient of rl"],
)
def test_a_non_finite_number_stops_before_the_step_and_names_rows(own, monkeypatch, trainer, spoil, said):
    stage, system = ("sft", 1) if trainer is SFTTrainer else ("rl", 2)
    config, usual = own(*SFT, *SAVED), trainer.compute_loss

    def compute_loss(self, model, *inputs, **options):
        loss = usual(self, model, *inputs, **options)
        return spoil(model, loss) if self.state.global_step + 1 == 2 else loss

    monkeypatch.setattr(trainer, "compute_loss", compute_loss)
    with pytest.raises(UnusableResult, match=rf"{said} in step 2, rows \w+") as caught:
        make_step(config, stage)
    named = str(caught.value).partition("rows ")[2].split(", ")
    assert set(named) <= {row.example.id for row in labels_of(config) if row.system == system}
    saved = {path.name for path in config.root.glob(f"{stage}/checkpoints/*/checkpoint-*")}
    assert saved == {"checkpoint-1"}


@pytest.mark.parametrize(
    ("stage", "number", "said"),
    [
        ("sft", 1, r"in the longest micro batch, 4 rows of up to \d+ tokens"),
        ("rl", 1, r"in the longest micro batch, 8 completions of 12 tokens, prompts of up to \d+"),
        ("sft", 2, r"in step 1, input_ids of 4 × \d+ tokens"),
    ],
)
def test_out_of_memory_names_step_lengths_and_setting(own, monkeypatch, stage, number, said):
    """The longest micro batch is tried before anything."""
    calls = []

    def supports_packing(*_):
        calls.append(None)
        if len(calls) == number:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr("stages.packing.support.supports_packing", supports_packing)
    with pytest.raises(OutOfMemoryError, match=f"out of memory {said}") as caught:
        make_step(own("rl.start_from=init"), stage)
    assert caught.value.exit_code == 74
    assert f"lower {stage}.per_device_train_batch_size from " in caught.value.hint


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_the_rehearsal_changes_nothing(own, monkeypatch, stage):
    """With dropout, which draws random numbers."""
    config = own(f"{stage}.lora_dropout=0.1", "rl.start_from=init", "sft.learning_rate=0.02")

    def trained() -> tuple[bytes, list[dict[str, float]]]:
        artifact = make_step(config, stage, force=True)
        return (artifact.adapter / ADAPTER).read_bytes(), untimed(artifact.path)

    rehearsed = trained()
    monkeypatch.setattr("stages.lora.training.health.LongestBatch.on_train_begin", lambda *_, **__: None)
    assert trained() == rehearsed
