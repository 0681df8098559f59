"""Which elements train: against an oracle of exact fractions and a plain sort, and rows to protect."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from results import artifacts

from stages.config import PartitionSection
from stages.errors import UnusableResult
from stages.lora import read_masks
from stages.lora.adapter import adapter
from stages.lora.importance.masks import Masks, flatten_weights, read_importance
from stages.lora.importance.strategies import NONE, S1_ONLY, S2_ONLY, SHARED, needed_set, strategies
from stages.pipeline.resolve import resolved
from stages.pipeline.steps import plan_steps
from stages.plan.preflight import problems
from stages.plan.texts import Texts

# Few distinct values, so that ties are the rule; the smallest and largest float32 among them.
tied = st.sampled_from([0.0, 1e-45, 1.4e-42, 1e-38, 0.1, 0.25, 0.3, 1.0, 1.5, 3.4e38])
scores = st.lists(tied | st.floats(0, 2.0**100, width=32), min_size=1, max_size=60)
shares = st.sampled_from([0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.999])


def oracle(values: list[float], theta: Fraction) -> list[bool]:
    exact = [Fraction(v) for v in values]
    goal = theta * sum(exact)
    order = sorted(range(len(values)), key=lambda i: (-exact[i], i))
    chosen, reached = [False] * len(values), Fraction(0)
    for i in order:
        if reached >= goal:
            break
        chosen[i], reached = True, reached + exact[i]
    return chosen


@example([1.0] * 900 + [2.0**-149] * 100, 0.5)  # without the smallest float32s, fewer elements would do
@given(scores.filter(any), shares)
def test_top_set_is_the_oracle_s(values, share):
    t = torch.tensor(values)
    assert needed_set(t, share, "a").tolist() == oracle(t.tolist(), Fraction(str(share)))


def split(one, two, sizes=None, **settings):
    section = PartitionSection(**settings)
    scores = {1: torch.tensor(one), 2: torch.tensor(two)}
    return strategies.pick(section.strategy)(scores, section, 0, sizes or [len(one)])


@pytest.mark.parametrize(
    ("one", "two", "theta", "wanted"),
    [  # θ as typed: 0.9 of 10 is 9, reached exactly by 5 + 4; a float sum of 0.9 would ask for more.
        ([5.0, 4.0, 1.0], [1.0, 1.0, 8.0], 0.9, [S1_ONLY | S2_ONLY, S1_ONLY, S2_ONLY]),
        ([0.0, 1.0], [1.0, 1.0], 1, [SHARED, SHARED]),
        ([-0.0, 1.0], [1.0, 1.0], 0.9, [S2_ONLY, SHARED]),
    ],
    ids=["the element that crosses theta", "theta one is every element", "minus zero is zero"],
)
def test_regions_by_hand(one, two, theta, wanted):
    assert split(one, two, theta=theta).region.tolist() == wanted


positive = st.floats(0.015625, 8, width=32)


@settings(max_examples=40)
@given(st.lists(st.tuples(positive, positive), min_size=2, max_size=40), shares, shares, shares)
def test_active_elements(pairs, theta, alpha, beta):
    one, two = map(list, zip(*pairs, strict=True))
    regions = split(one, two, theta=theta, alpha=alpha, beta=beta)
    shared = regions.region == SHARED
    for system, only, share in ((1, S1_ONLY, alpha), (2, S2_ONLY, beta)):
        active = regions.active[system]
        assert torch.equal(active & ~shared, regions.region == only)
        assert int(active[shared].sum()) == math.floor(Fraction(str(share)) * int(shared.sum()))


@pytest.mark.parametrize(
    ("strategy", "sizes"), [("random", [200]), ("random_within", [50, 150]), ("random_half", [200])]
)
def test_a_control_is_a_seeded_permutation(strategy, sizes):
    """Of what `importance` chooses, if it has scores; each weight keeps the numbers of its elements."""
    values = torch.rand(2, 200, generator=torch.Generator().manual_seed(1))
    scores = {1: values[0], 2: values[1]}
    section = PartitionSection(strategy=strategy, theta=0.5)
    draw = strategies.pick(strategy)
    one, same, other = (draw(scores, section, seed, sizes) for seed in (0, 0, 1))
    real = other if strategy == "random_half" else split(*values.tolist(), theta=0.5)
    assert torch.equal(one.region, same.region) and not torch.equal(one.region, other.region)
    for mine, theirs in zip(one.region.split(sizes), real.region.split(sizes), strict=True):
        assert mine.bincount(minlength=4).tolist() == theirs.bincount(minlength=4).tolist()
        assert not torch.equal(mine, theirs)
    for system in (1, 2):
        assert torch.equal(one.active[system], (one.region & system).bool())


@settings(max_examples=40)
@given(st.lists(st.tuples(tied, tied), min_size=2, max_size=60), st.sampled_from([0.25, 0.5, 0.9, 1]))
def test_topk_takes_so_many_of_each_system(pairs, density):
    one, two = (list(values) for values in zip(*pairs, strict=True))
    one[0] = two[0] = 1.0  # an importance of nothing but zeros is refused
    found = split(one, two, strategy="topk", density=density)
    number = int(Fraction(str(density)) * len(pairs))
    for bit, values in ((1, one), (2, two)):
        order = sorted(range(len(values)), key=lambda i: (-values[i], i))[:number]
        assert (found.region & bit).nonzero().flatten().tolist() == sorted(order)
    assert torch.equal(found.active[1], (found.region & 1).bool())


def test_random_half_needs_no_scores_and_trains_one_half_in_both_stages():
    found = split([0.0] * 101, [0.0] * 101, strategy="random_half")
    assert found.region.tolist().count(SHARED) == 50 and found.region.tolist().count(NONE) == 51
    assert torch.equal(found.active[1], found.active[2]) and int(found.active[2].sum()) == 50
    assert int(split([0.0] * 10, [0.0] * 10, strategy="random_half", density=0.1).active[1].sum()) == 1


@pytest.mark.parametrize(
    ("values", "text"),
    [([0.0, 0.0], "zero for every"), ([math.nan, math.inf], "2 non-f"), ([-1.0, 1.0], "nega")],
)
def test_meaningless_scores_are_refused(values, text):
    with pytest.raises(UnusableResult, match=text):
        split(values, [1.0, 1.0])


def test_the_stage_writes_for_sft_and_rl_their_own_elements_and_tells_how_many(begun):
    made = artifacts(begun("partition.theta=0.5", "partition.alpha=0", "partition.beta=0"), "partition")
    for stage, only in (("sft", S1_ONLY), ("rl", S2_ONLY)):
        artifact = made[f"partition:{stage}"]
        masks = Masks.load(artifact.path, stage)
        assert read_masks(artifact.path, stage).keys() == masks.active.keys()
        assert all(torch.equal(masks.active[name], region == only) for name, region in masks.region.items())
        told = artifact.manifest["summary"]
        none, first, second, both = torch.bincount(flatten_weights(masks.region), minlength=4).tolist()
        assert none and first and second and both
        shares = first / (first + both), second / (second + both), both / (first + second + both)
        assert (told["s1_only_share"], told["s2_only_share"], told["jaccard"]) == pytest.approx(shares)


QUICK = ("rl.max_steps=2", "sft.max_steps=2", "score.examples=4", "partition.strategy=all")


@pytest.fixture
def old(demo_data, tmp_path) -> str:
    """A setting that names 12 rows to protect."""
    lines = (demo_data / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "old.jsonl").write_text("".join(lines[60:72]), encoding="utf-8")
    return f"partition.protect={tmp_path / 'old.jsonl'}"


def test_a_protected_element_is_the_same_to_the_bit_after_both_stages(begun, old):
    steps = artifacts(begun(*QUICK, old), "score", "partition", "sft", "rl")
    importance = read_importance(steps["score:protected"].path / "importance.safetensors")
    assert list(importance) == ["protected"]
    needed = needed_set(flatten_weights(importance["protected"]), 0.9, "the protected rows")
    start = flatten_weights(adapter.read(steps["score"].adapter))
    for stage in ("sft", "rl"):
        end = flatten_weights(adapter.read(steps[stage].adapter))
        assert torch.equal(start[needed], end[needed])
        active = Masks.load(steps[f"partition:{stage}"].path, stage).active
        assert torch.equal(flatten_weights(active), ~needed)
        assert steps[f"partition:{stage}"].manifest["summary"]["protected"] == int(needed.sum())
    assert (start != end)[~needed].float().mean() > 0.9


def test_keys_change_with_the_rows_and_the_share(begun, old):
    plain, ours, less = (
        plan_steps(resolved(begun(*more))) for more in ((), (old,), (old, "partition.protect_theta=0.5"))
    )
    assert plain["score"].key == ours["score"].key and "score:protected" not in plain
    assert ours["score:protected"].key == less["score:protected"].key
    assert len({steps["partition:sft"].key for steps in (plain, ours, less)}) == 3


def test_errors_of_the_file_and_of_too_large_a_share(begun, smoke, old, tmp_path):
    with pytest.raises(UnusableResult, match="no element is active in sft") as caught:
        artifacts(begun(*QUICK, old, "partition.protect_theta=1"), "score", "partition:sft")
    assert "lower partition.protect_theta" in str(caught.value.hint)
    (tmp_path / "old.jsonl").write_text('{"question": "1 + 1?", "gold": "2"}\n', encoding="utf-8")
    config = resolved(smoke(old))
    [problem] = problems(Texts(config), list(plan_steps(config).values()))
    assert problem.startswith("score:protected: ")
