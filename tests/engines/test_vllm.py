"""A real vLLM server on a tiny model.

It votes as the model in this process does, and nothing of it is left behind.
"""

import json
import signal
import subprocess
from contextlib import ExitStack, suppress
from pathlib import Path

import openai
import psutil
import pytest
import torch
from conftest import LORAPAR, ROOT, alive, flags, free_port, make_steps, needs_vllm, servers, wait_for

from stages.ask import TrainedModel
from stages.config import LoraSection, ModelSection, ServerSection
from stages.engines import ChoiceRequest, EngineCache, EngineSpec, GenerateRequest, Sampling, vllm
from stages.engines.continuous_batching import generate
from stages.errors import ServerError
from stages.lora.adapter import adapter
from stages.models.base import load_base
from stages.records import read_samples

pytestmark = [pytest.mark.vllm, needs_vllm]
RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
NEEDS_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="V2 needs Triton"))
BALLOTS = [
    ChoiceRequest("Question: 2 + 2?\nSteps:", (" one", " many")),
    ChoiceRequest([{"role": "user", "content": "Is it hard?"}], ("System1", "System2")),
]


def test_one_server_answers_for_several_targets(begun, demo_data, lorapar, monkeypatch):
    """Three targets and two benchmarks; the answers are those of the model in process."""
    other = f"eval.benchmarks.other={{kind: demo, path: {demo_data}/test.jsonl, limit: 5, label: false}}"
    overrides = [
        *begun.home, "sft.learning_rate=0.05", "eval.benchmarks.demo.label=false", other,
        "eval.benchmarks.demo.limit=6", "eval.targets=[base, sft, rl]",
    ]  # fmt: skip
    make_steps(begun(*overrides), "sft", "rl")
    monkeypatch.setattr(vllm, "serves_modules", lambda: True)  # as on a GPU; a CPU merges, a server each
    answers = {}
    for engine in ("vllm", "transformers"):
        sets = flags(*overrides, f"eval.engine={engine}")
        done = lorapar("eval", ROOT / "configs/smoke.yaml", *sets)
        assert done.code == 0 and done.err.count("starting a vLLM server") == (engine == "vllm")
        made = make_steps(begun(*overrides, f"eval.engine={engine}"))
        answers[engine] = {
            name: [sample.output for sample in read_samples(artifact.path / "samples.jsonl")]
            for name, (artifact, is_new) in made.items()
            if name.startswith("eval") and not is_new
        }
    assert len(answers["vllm"]) == 6 and answers["vllm"] == answers["transformers"]
    assert answers["vllm"]["eval:base@demo"] != answers["vllm"]["eval:sft@demo"]
    assert servers() == []


@pytest.mark.parametrize(
    ("how", "runner"),
    [("merged", None), ("module", None), *(pytest.param("module", v, marks=NEEDS_GPU) for v in ("V1", "V2"))],
)
def test_votes_agree_with_the_model_in_process(tiny, tmp_path, monkeypatch, how, runner):
    """Greedy tokens and choices of a merged adapter, and of a LoRA module, are the merged model's here.

    runner: which of vLLM's model runners, V2 by default on CUDA and V1 on a CPU.
    """
    monkeypatch.delenv(RUNNER, raising=False)
    if runner is not None:
        monkeypatch.setenv(RUNNER, "1" if runner == "V2" else "0")
    model = ModelSection(name=str(tiny), dtype="float32")
    monkeypatch.setattr(vllm, "serves_modules", lambda: how == "module")
    monkeypatch.setattr(adapter, "STD", 0.3)
    adapter.save(adapter.initial(load_base(model), LoraSection(r=12), 0), tmp_path, model)
    questions = [
        GenerateRequest([5 * i + 40, 9, 60 + i], tuple(f"stop {n}" for n in range(12))) for i in range(6)
    ]
    words = [*BALLOTS, *(ChoiceRequest(question.ids, (" a", " b", " c")) for question in questions)]
    said, given, chosen = [], {}, {}
    for name, folder in (("vllm", tmp_path), ("transformers", tmp_path), ("base", None)):
        with EngineCache() as pool:
            served = EngineSpec("vllm" if name == "vllm" else "transformers", model, folder)
            engine = pool.get(served, ServerSection(), said.append)
            given[name] = dict(engine.generate(questions, Sampling(16, (3,))))
            chosen[name] = {i: choice.probabilities for i, choice in engine.choose_words(words)}
    if runner is not None:
        log = Path(said[0].partition("log in ")[2]).read_text(encoding="utf-8")
        assert ("Using V2 Model Runner" in log) == (runner == "V2")
    assert given["vllm"] == given["transformers"] != given["base"]
    for i in range(len(words)):
        assert chosen["vllm"][i] == pytest.approx(chosen["transformers"][i], abs=1e-3)
        assert chosen["vllm"][i] != pytest.approx(chosen["base"][i], abs=1e-3)
    assert servers() == []


def test_a_server_that_cannot_start_says_why(tmp_path):
    spec = EngineSpec("vllm", ModelSection(name=str(tmp_path), dtype="float32"))
    ended = pytest.raises(ServerError, match="the vLLM server ended with code 1")
    with ended as caught, EngineCache() as pool:
        pool.get(spec, ServerSection(), print)
    assert "its log is" in caught.value.hint


def test_serve_offers_three_modes_and_ends_with_its_command(begun):
    """OpenAI's client gets what the model in this process answers in each; a wrong mode is refused."""
    modes = {
        mode: {"system": text} for mode, text in (("fast", "Be quick."), ("slow", "Think."), ("auto", ""))
    }
    settings = [f"modes={json.dumps(modes)}", "sft.system2_share=0", "sft.learning_rate=0.05"]
    config = begun(*settings)
    trained = make_steps(config, "score", "partition", "sft", "rl")["rl"][0]
    port = free_port()
    command = [*LORAPAR, "serve", "configs/smoke.yaml", "--port", str(port), *flags(*begun.home, *settings)]
    with ExitStack() as stack:
        child = stack.enter_context(subprocess.Popen(command, cwd=ROOT))
        stack.callback(child.kill)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

        def ask(**how: object) -> tuple[list[int], list[int]]:
            """Token ids of prompt and answer."""
            chat = {"model": "smoke", "messages": [{"role": "user", "content": "What is 3 + 4?"}]}
            how |= {"return_token_ids": True, "add_special_tokens": False}
            asked = client.chat.completions.create(**chat, max_tokens=12, temperature=0, extra_body=how)
            return asked.model_extra["prompt_token_ids"], asked.choices[0].model_extra["token_ids"]

        def ready() -> bool:
            with suppress(openai.APIConnectionError):
                return bool(client.models.list().data)
            return False

        assert wait_for(lambda: ready() or child.poll() is not None, 300) and child.poll() is None
        model, expected = TrainedModel(config, trained), {}
        for mode, renderer in model.renderers.items():
            ids = renderer.ids(renderer.prompt("What is 3 + 4?"))
            sampling = Sampling(12, tuple(renderer.stop_ids))
            [(_, completion)] = generate(model.model, model.tokenizer, [ids], sampling)
            expected[mode] = ids, completion.ids
        given = {mode: ask(chat_template_kwargs={"mode": mode}) for mode in expected}
        assert given == expected and given["fast"] != given["slow"] and ask() == given["auto"]
        with pytest.raises(openai.BadRequestError, match="mode is one of fast, slow, auto"):
            ask(chat_template_kwargs={"mode": "quick"})
        own = {process.pid for process in psutil.Process(child.pid).children(recursive=True)}
        child.send_signal(signal.SIGTERM)
        child.wait(60)
        assert wait_for(lambda: not any(map(alive, own)), 30)
    assert servers() == []
