"""Why a step is not current."""

import copy
from dataclasses import replace

from conftest import make_steps

from stages.pipeline.resolve import resolved
from stages.pipeline.state import state
from stages.pipeline.steps import plan_steps
from stages.store.artifacts import Store


def test_a_setting_of_a_later_version_is_named_as_the_difference(begun):
    """Even where its value is None, as most new settings have."""
    config = resolved(begun())
    made = make_steps(config, "score", "partition:rl")
    artifact = made["partition:rl"][0]
    step = plan_steps(config)["partition:rl"]
    older = artifact.manifest["identity"]
    newer = replace(step, key="0" * 12, identity=copy.deepcopy(older))
    newer.identity["config"]["partition"]["later"] = None
    why = state(Store(config.root), newer).why
    assert why == "partition.later was not there, now None"
