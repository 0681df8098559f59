"""A real vLLM server on a tiny model: it votes as the model in this process does, and nothing of it is left behind."""

import importlib.util
import os
import signal
import subprocess
import sys
import time

import pytest

from stages.config import LoraSection, ModelSection, ServerSection
from stages.engines import Ballot, Pool, Question, Sampling, Served
from stages.errors import ServerError

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]
BALLOTS = [
    Ballot("Question: 2 + 2?\nSteps:", (" one", " many")),
    Ballot([{"role": "user", "content": "Is it hard?"}], ("System1", "System2")),
]


def servers() -> list[str]:
    """Living processes of a server; a dead one that nobody has waited for yet is none."""
    shown = subprocess.run(["ps", "-eo", "stat,pid,args"], capture_output=True, text=True, check=True).stdout
    found = [line for line in shown.splitlines() if "vllm.entrypoints" in line or "VLLM::" in line]
    return [line for line in found if not line.startswith("Z")]


def test_votes_agree_with_the_model_in_process_and_the_server_ends(tiny):
    model = ModelSection(name=str(tiny), dtype="float32")
    given = {}
    for name in ("vllm", "transformers"):
        with Pool() as pool:
            engine = pool.get(Served(name, model), ServerSection(), print)
            given[name] = {i: choice.shares[1] for i, choice in engine.choose(BALLOTS)}
    assert given["vllm"] == pytest.approx(given["transformers"], abs=1e-3)
    assert servers() == []


@pytest.mark.parametrize("how", ["merged", "module"])
def test_an_adapter_is_served(tiny, tmp_path, how):
    """Greedy tokens and choices of a merged adapter and of a LoRA module are those of the merged model in this process."""
    from stages.lora import adapter

    model = ModelSection(name=str(tiny), dtype="float32")
    adapter.save(adapter.initial(adapter.load_base(model), LoraSection(r=12, std=0.3), 0), tmp_path, str(tiny))
    questions = [Question([5 * i + 40, 9, 60 + i]) for i in range(6)]
    words = [Ballot(question.ids, (" a", " b", " c")) for question in questions]
    given, chosen = {}, {}
    for name, folder in (("vllm", tmp_path), ("transformers", tmp_path), ("base", None)):
        with Pool() as pool:
            served = Served("vllm" if name == "vllm" else "transformers", model, folder)
            engine = pool.get(served, ServerSection(adapter=how), print)
            given[name] = dict(engine.generate(questions, Sampling(16, (3,))))
            chosen[name] = {i: choice.shares for i, choice in engine.choose(words)}
    assert given["vllm"] == given["transformers"] != given["base"]
    for i in range(6):
        assert chosen["vllm"][i] == pytest.approx(chosen["transformers"][i], abs=1e-3)
        assert chosen["vllm"][i] != pytest.approx(chosen["base"][i], abs=1e-3)


def test_a_killed_parent_leaves_no_server(tiny):
    code = (
        "import sys\nfrom stages.engines import Served, vllm\nfrom stages.config import *\n"
        "with vllm.open(Served('vllm', ModelSection(name=sys.argv[1])), ServerSection(), lambda t: print(t, flush=True)) as c:\n"
        "    import time; time.sleep(100)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tiny)], stdout=subprocess.PIPE, text=True)
    assert "starting" in child.stdout.readline()
    time.sleep(5)
    assert servers()
    os.kill(child.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while servers() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert servers() == []


def test_a_server_that_cannot_start_says_why(tmp_path):
    with pytest.raises(ServerError, match="the vLLM server ended with code 1") as caught, Pool() as pool:
        pool.get(Served("vllm", ModelSection(name=str(tmp_path))), ServerSection(), print)
    assert "its log is" in caught.value.hint
