"""What a run will cost, and what is certain to stop it, is said before its first vote."""

import json
import re

import pytest
import torch
from conftest import change_json, config_file, flags, needs_vllm
from safetensors.torch import load_file, save_file

from lorapar_cli import plan as plan_command
from stages.models.tokenizer import load_tokenizer
from stages.pipeline.resolve import resolved
from stages.pipeline.steps import plan_steps
from stages.plan.estimate import Cost, Estimate
from stages.plan.preflight import problems
from stages.plan.texts import Texts
from stages.plan.tokens import Lengths, Span


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


ITEM = dict.fromkeys(("task_id", "prompt", "canonical_solution", "test", "entry_point"), "def f(): 1")
LETTERS = {"question": "Why? " * 4000, "subject": "law", "choices": list("abcd"), "answer": 0}
LABELLED = [{"question": f"Add {i}?", "answer": f"#### {i}", "intended": 1} for i in range(40)]
FILES = {
    "own.py": "def bare(completions):\n    return [0.0 for _ in completions]\n",
    "broken.py": "import no_such_package\n\ndef mine(completions):\n    return []\n",
    "labels.csv": "question,system\nOne?,easy\nTwo?,hard\n",
    "fast.jsonl": lines(LABELLED),
    "undecided.jsonl": lines([LABELLED[0], *({**row, "intended": None} for row in LABELLED[1:])]),
    "bare.jsonl": lines([*LABELLED, *({"question": f"{i}?", "gold": i, "intended": 2} for i in range(40))]),
    "items.jsonl": lines([ITEM]),
    "letters.jsonl": lines([LETTERS]),
}
"""Files of a person, in the folder HERE."""


@pytest.fixture
def certain(smoke, tmp_path):
    """Returns the problems of the smoke config with these settings, of all its steps, as text."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)

    def find(*settings: str) -> list[str]:
        config = resolved(smoke(*(text.replace("HERE", str(tmp_path)) for text in settings)))
        return [str(problem) for problem in problems(Texts(config), list(plan_steps(config).values()))]

    return find


def add_token(model, use="chat_template"):
    """A token that the model has no embedding of: in its chat template, or as its pad token."""
    file = model / "tokenizer.json"
    known = json.loads(file.read_text())["added_tokens"]
    change_json(file, added_tokens=[*known, {**known[0], "id": 259, "content": "<|new|>"}])
    if use == "chat_template":
        file = model / "chat_template.jinja"
        file.write_text(file.read_text().replace("<|im_start|>", "<|im_start|><|new|>"))
    else:
        change_json(model / "tokenizer_config.json", **{use: "<|new|>"})


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        (
            ["data.max_length=150", "rl.max_prompt_length=60",
             "lora.target_modules=[q_proj, query]", "eval.sandbox.backend=refuse",
             "eval.benchmarks.code={kind: humaneval, path: HERE/items.jsonl, label: false}"],
            ["score: lora.target_modules: no query in Llama",
             "score, sft: .* longer than data.max_length 150, such as ",
             r"rl: 0 RL prompts \(64 too long\)", "eval: .*sandbox.backend is refuse"],
        ),
        (
            ["data.max_length=20", "data.too_long=drop", "rl.max_prompt_length=60", "eval.targets=[sft]",
             "eval.benchmarks.m={kind: mmlu, path: HERE/letters.jsonl, shots: 0, label: false}"],
            ["score, sft: no row fits into data.max_length 20",
             r"rl: 0 RL prompts \(64 too long\) are fewer than the 4 of a step",
             "eval:sft@m: prompt of m: 1 of 1 are longer than "],
        ),
    ],
)  # fmt: skip
def test_certain_failures_are_found_all_at_once(certain, settings, found):
    problems = certain(*settings)
    assert len(problems) == len(found), problems
    assert all(any(re.match(text, problem) for problem in problems) for text in found), problems


def cut_short(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def quantize(model):
    change_json(model / "config.json", quantization_config={"bits": 4})


def weights(change):
    """Returns what changes the weights of a model."""

    def damage(model):
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", {"format": "pt"})

    return damage


NORM = "model.norm.weight"
OWN = ["rl.rewards_file=HERE/own.py", "rl.rewards={bare: 1.0}"]
KNOWN = ["classify.strategy=known", "classify.known=intended", "data.limit=null"]


@pytest.mark.parametrize(
    ("damage", "settings", "found"),
    [
        (add_token, [], r"score, sft, rl, eval:.*: .* writes <\|new\|> as token 259, and .* 259 embeddings"),
        (quantize, [], "score, sft, rl: .* is quantized itself"),
        (cut_short, [], "score, .*: cannot load model .*not fully covered"),
        (weights(lambda w: w.update({NORM: w[NORM][:-1]})), [], "score, .* other shapes than its config"),
        (weights(lambda w: w.pop(NORM)), [], f"score, .* no weights for {NORM}"),
        (weights(lambda w: w[NORM].fill_(torch.nan)), [], f"score, .*{NORM} has values that are no numbers"),
        (None, ["model.attention=flash_attention_2"], "score, sft, rl, eval:.* flash_attention_2 is not"),
        (None, OWN, r"rl: reward bare\(completions\) cannot be called: .* unexpected keyword"),
        (None, ["classify.voters=[{base_url: http://127.0.0.1:1/v1, model: x}]"],
         "classify:train, classify:demo: base_url http://127.0.0.1:1/v1 cannot be reached"),
        (None, ["rl.rewards={code_tests: 1.0}", "rl.sandbox.backend=unsafe-no-sandbox"],
         "rl: reward code_tests reads"),
        (None, ["rl.rewards_file=HERE/broken.py", "rl.rewards={mine: 1.0}"],
         "rl: .*does not load: ModuleNotFoundError"),
        (None, ["classify.strategy=known", "classify.labels_file=HERE/labels.csv"],
         "classify:train, classify:demo: 2 × label in .*neither 1 nor 2"),
        (None, [*KNOWN, "data.path=HERE/fast.jsonl"],
         r"score, sft, rl: no example is labelled System 2 \(40 System 1, 0 System 2"),
        (None, [*KNOWN, "data.path=HERE/undecided.jsonl"],
         r"score, .*no example is labelled System 2 \(1 System 1, 0 System 2, 39 undecided\)"),
        (None, [*KNOWN, "data.path=HERE/bare.jsonl"],
         "score, sft: none of 40 rows labelled System 2 has a response"),
        (None, ["runs_dir=HERE/own.py"], "classify: runs_dir: .* is no folder to write in"),
    ],
)  # fmt: skip
def test_each_certain_failure_is_found_without_loading_anything(
    certain, model_copy, monkeypatch, damage, settings, found
):
    monkeypatch.setattr("stages.models.base._run_once", lambda _: pytest.fail("loaded"))
    if damage:
        damage(model_copy)
    few = [f"model.name={model_copy}", "data.limit=8", "eval.benchmarks.demo.limit=2", "eval.targets=[base]"]
    [problem] = certain(*few, *settings)
    assert re.match(found, problem), problem


def test_what_may_go_well_is_not_refused(certain, smoke, model_copy, tmp_path):
    """A pad token without an embedding, which is not needed; a server whose votes may all be here."""
    add_token(model_copy, "pad_token")
    assert certain(f"model.name={model_copy}", "partition.strategy=topk", "partition.density=1.6e-4") == []
    assert load_tokenizer(smoke(f"model.name={model_copy}").model).pad_token == "<|im_end|>"
    (tmp_path / "runs/votes").mkdir(parents=True)
    (tmp_path / "runs/votes/x-steps-0123456789ab.jsonl").touch()
    assert certain("classify.voters=[{base_url: http://127.0.0.1:1/v1, model: me/x, persona: steps}]") == []


def test_a_mode_may_learn_from_answers_alone(certain, model_copy, tmp_path):
    with (model_copy / "chat_template.jinja").open("a") as template:
        template.write("{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}")
    (tmp_path / "golds.jsonl").write_text(lines({"question": f"{i}?", "gold": i} for i in range(40)))
    on, off = ({"chat_template_kwargs": {"enable_thinking": thinks}} for thinks in (True, False))
    modes = f"modes={json.dumps({'fast': off, 'slow': on | {'system': 'Think.'}, 'auto': on})}"
    own = (f"model.name={model_copy}", "data.path=HERE/golds.jsonl", modes)
    assert certain(*own, "sft.system2_share=0", "partition.strategy=all", "eval.targets=[rl]") == []


def test_labels_tell_of_more(certain):
    """24 rows, half of them System 2, are too few for a step of 16; with rl.data=all they are enough."""
    step = ("data.limit=24", "rl.prompts_per_step=16")
    known = ("classify.strategy=known", "classify.known=intended")
    [problem] = certain(*step, *known)
    assert problem.startswith("rl: ") and "are fewer than the 16 of a step" in problem
    assert certain(*step) == certain(*step, *known, "rl.data=all") == []


def test_rows_without_a_verifiable_answer_may_be_of_system_1(certain, tmp_path):
    rows = [f'{{"question": "What is {i}?", "answer": "number {i}"}}' for i in range(4)]
    rows += [f'{{"question": "Add {i}?", "answer": "#### {i}"}}' for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    assert certain("data.path=HERE/rows.jsonl") == []
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[:4]))
    [problem] = certain("data.path=HERE/rows.jsonl")
    assert problem.startswith("rl: reward correctness reads gold, and 4 of 4 RL rows have none")


def test_votes_may_fail_as_often_as_the_config_allows():
    lengths = Lengths([10, 20, 300])
    assert Span("prompt of x", 100, lengths, "s", 200, "fail").fails
    assert not Span("vote", 100, lengths, "s", 200, "fail", allowed=1).fails
    assert Span("vote", 100, lengths, "s", 200, "fail", allowed=0.5).fails
    assert not Span("row", 100, lengths, "s", 200, "drop").fails


def test_a_run_checks_first_and_again_with_labels(smoke, lorapar, tmp_path, monkeypatch):
    done = []
    checked = "lorapar_cli.run.checked_texts"
    monkeypatch.setattr(checked, lambda *given: done.append([step.name for step in given[2]]))
    make = "lorapar_cli.run.make"
    monkeypatch.setattr(make, lambda _, store, steps, *__: done.append(steps[0].stage.name) or ())
    assert lorapar("run", config_file(smoke(), tmp_path), "--to", "sft").code == 0
    every = ["classify:train", "score", "partition:sft", "sft"]
    assert done == [every, "classify", every, "score", "partition", "sft"]


def test_plan_ends_with_65_and_measures_nothing(smoke, lorapar, tmp_path, monkeypatch):
    monkeypatch.setattr("lorapar_cli.plan.estimate", lambda *_: pytest.fail("measured"))
    path = config_file(smoke("rl.prompts_per_step=66"), tmp_path)
    done = lorapar("plan", path)
    assert done.code == 65 and "1 thing is certain to stop this run\n  rl: 64 RL prompts" in done.err
    two = lorapar("plan", path, "--set", "lora.target_modules=[query]")
    assert two.code == 65 and "2 things are certain to stop this run\n  score: " in two.err
    unread = lorapar("plan", path, "--check", "--to", "sft", *flags("partition={strategy: topk, theta: 0.8}"))
    assert unread.code == 0 and "partition.theta is not read by strategy topk\n" in unread.err


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
