"""What a run will cost, told before: time, memory, lengths, and what does not fit."""

import re

from conftest import config_file, needs_vllm

from lorapar_cli import plan as plan_command
from stages.pipeline.steps import plan_steps
from stages.plan.estimate import Cost, Estimate


def test_what_is_not_known_is_said_beside_the_total(capsys):
    states = {"a": "missing", "b": "missing"}
    plan_command._print_all(states, Estimate({"a": Cost(30.0), "b": Cost(None)}, []))
    assert "about 30 s plus what is not known" in capsys.readouterr().out
    plan_command._print_all(states, Estimate({"a": Cost(None)}, []))
    assert capsys.readouterr().out.endswith("how long it takes is not known\n")


@needs_vllm
def test_prompts_that_are_longer_than_a_server_reads_are_refused(smoke, lorapar, tmp_path):
    """Of a benchmark, and of a voter that is the base."""
    voter = "classify.voters=[{persona: role_play, engine: vllm}]"
    sets = ("eval.engine=vllm", "server.max_model_len=64", "eval.benchmarks.demo.max_new_tokens=24", voter)
    done = lorapar("plan", config_file(smoke(*sets), tmp_path))
    longer = r": \d+ of \d+ are longer than {} tokens \(server.max_model_len, less {}\)"
    assert done.code == 65
    assert re.search("prompt of demo" + longer.format(40, 24), done.err)
    assert re.search("vote on train, role_play" + longer.format(56, 8), done.err)


def test_what_vllm_has_of_the_gpu_is_named_first(smoke):
    colocated = plan_steps(smoke("rl.rollouts.engine=vllm_colocate"))["rl"].planned.memory_hint
    assert colocated.startswith("rl.rollouts.gpu_memory_utilization, or rl.per_device_train_batch_size")
