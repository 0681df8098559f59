"""A second round of SFT: System 2's elements on System 2 rows, from the adapter of the first."""

from dataclasses import replace

from conftest import ROOT, flags, labels_of, make_steps
from results import artifacts, moved_share

from stages.pipeline.resolve import resolved
from stages.pipeline.run import pending_stages
from stages.pipeline.steps import plan_steps
from stages.plan import preflight
from stages.plan.preflight import problems
from stages.plan.texts import Texts
from stages.records import write_jsonl
from stages.store.artifacts import Store

TWO = ["sft.rounds=2", "sft.max_steps=4", "sft.num_train_epochs=9", "sft.weight_decay=0.1"]
SECOND = "sft:system2"


def test_only_rl_and_what_follows_from_it_has_another_key_and_without_it_a_run_ends_with_sft(smoke):
    one, two = (plan_steps(resolved(smoke(*more))) for more in ((), TWO[:1]))
    assert [name for name in two if name not in one] == [SECOND]
    assert {name for name in one if one[name].key != two[name].key} == {"rl", "eval:rl@demo"}
    assert list(two[SECOND].inputs) == ["classify:train", "partition:rl", "sft"]
    assert list(two["rl"].inputs) == ["classify:train", "partition:rl", SECOND]
    from_init = plan_steps(resolved(smoke(*TWO[:1], "rl.start_from=init")))
    assert from_init["rl"].key == plan_steps(resolved(smoke("rl.start_from=init")))["rl"].key
    baseline = plan_steps(resolved(smoke(*TWO[:1], "baseline.method=ia3", "eval.targets=[sft2]")))
    assert list(baseline[SECOND].inputs) == ["classify:train", "sft"]
    config = resolved(smoke(*TWO, "eval.targets=[base, sft2]"))
    pending = pending_stages(plan_steps(config), Store(config.root), None, None)
    assert [task.stage.name for task in pending] == ["classify", "score", "partition", "sft", "eval"]


def test_system_2_s_elements_learn_from_its_rows_and_no_other_moves(begun):
    config = begun(*TWO)
    made = artifacts(config, "score", "partition", "sft")
    first, second, masks = made["sft"], made[SECOND], made["partition:rl"]
    assert moved_share(config, SECOND) == 1 and moved_share(config, "sft") > 0.95
    summary = second.manifest["summary"]
    assert first.manifest["summary"]["frozen_drift"] == summary["frozen_drift"] == 0
    assert summary["moved"] == summary["active"] > 0
    assert summary["active"] == masks.manifest["summary"]["active"] != first.manifest["summary"]["active"]
    assert summary["rows"] == sum(row.system == 2 for row in labels_of(config))


def test_the_command_exports_the_slow_mode_and_says_what_a_config_lacks(begun, lorapar, tmp_path):
    export_command = ("export", ROOT / "configs/smoke.yaml")
    make_steps(begun(*TWO), "sft")
    done = lorapar(*export_command, tmp_path / "out", *flags(*begun.home, *TWO, "eval.targets=[sft2]"))
    assert done.code == 0 and "adapter of sft2" in done.out + done.err
    done = lorapar(*export_command, tmp_path / "new", *flags(*begun.home), "--target", "sft2")
    assert done.code == 78 and "--target sft2: SFT has one round" in done.err


def test_system_2_without_a_response_is_said_before_training(begun, monkeypatch, tmp_path):
    settings = ["sft.rounds=2", "partition.strategy=all", "sft.system2_share=0", "eval.targets=[sft2]"]

    def stopped(*more: str) -> list[tuple[str, ...]]:
        config = resolved(begun(*settings, *more))
        return [problem.stopped for problem in problems(Texts(config), list(plan_steps(config).values()))]

    assert stopped("rl.rewards={text_overlap: 1}") == []
    bare = tmp_path / "bare.jsonl"
    write_jsonl(bare, ({"prompt": f"{i} + 1?", "gold": str(i + 1)} for i in range(48)))
    assert stopped(f"data.path={bare}") == [("sft", SECOND)]
    without = [
        replace(row, example=replace(row.example, response="")) if row.system == 2 else row
        for row in labels_of(begun())
    ]
    monkeypatch.setattr(preflight, "_labels", lambda texts, steps: without)
    assert stopped("rl.rewards={correctness: 1}") == [(SECOND,)]
