"""On the real data sets, where a copy is at hand; lm-evaluation-harness is on MMLU of one mind with us.

LORAPAR_DATA=folder with gsm8k/, mmlu/ and humaneval/ (JSON Lines).
"""

import importlib.util
import os
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT

from stages.config import EvalSection, ModelSection
from stages.evaluation.benchmarks import gsm8k, humaneval, mmlu
from stages.evaluation.grading import Context
from stages.pipeline.resolve import registries
from stages.prompts.answers import parse_number
from stages.records import read_jsonl, write_jsonl
from stages.sandbox import Limits, Sandbox, backends, selftest

DATA = Path(os.environ.get("LORAPAR_DATA", "nowhere"))

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="LORAPAR_DATA names no folder")


def section(kind: str, **settings):
    entries = {"benchmarks": {kind: settings}}
    return EvalSection.model_validate(entries, context=registries()).benchmarks[kind]


def test_every_gsm8k_answer_is_a_number_and_its_own_text_is_right():
    files = [str(DATA / "gsm8k" / name) for name in ("train.jsonl.gz", "test.jsonl")]
    problems = [example for file in files for example in gsm8k.load(section("gsm8k", path=file))]
    assert len(problems) == 8792
    assert all(parse_number(e.gold) is not None for e in problems)
    grades = [gsm8k.grade(e, e.response, Context("hash", chat=False)) for e in problems]
    assert all(grade.correct and grade.correct_flexible for grade in grades)


def test_mmlu_s_subjects_and_categories():
    rows = mmlu.load(section("mmlu", path=str(DATA / "mmlu/test.jsonl.gz")))
    assert len(rows) == 14042 and len({row.id for row in rows}) == 14042
    assert len(mmlu.CATEGORY) == 57 == len({row.extra["subject"] for row in rows})
    assert {row.extra["category"] for row in rows} == {"STEM", "humanities", "social sciences", "other"}


EQUAL = """
    class E:
        def __eq__(s, o): return True
        def __ne__(s, o): return False
        __lt__ = __gt__ = __le__ = __ge__ = __eq__
        def __getattr__(s, name): return lambda *a: E()
        def __sub__(s, o): return 0
        def __len__(s): return 0
        def __iter__(s): return iter(())
    return E()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bubblewrap", "landlock"])
def test_humaneval_s_solutions(name, capsys):
    """All canonical solutions pass, of every fourth in a chat, too; nothing, or equal to all, does not."""
    if problems := selftest(backends.BACKENDS[name]):
        pytest.skip(f"{name}: {problems[0]}")
    sandbox = Sandbox(name, Limits(seconds=10))
    tasks = humaneval.load(section("humaneval", path=str(DATA / "humaneval/HumanEval.jsonl")))
    answers = {
        "canonical": lambda e: (e.response, False),
        "canonical, chat": lambda e: (f"Here it is:\n```python\n{e.prompt}{e.response}```\nIt works.", True),
        "canonical body, chat": lambda e: (f"```python\n{e.response}```", True),
        "return None": lambda e: ("    return None\n", False),
        "always equal": lambda e: (EQUAL, False),
    }
    passed, standard = Counter(), Counter()
    for title, answer in answers.items():
        for example in tasks[:: 1 if title == "canonical" else 4]:
            text, chat = answer(example)
            grade = humaneval.grade(example, text, Context("hash", chat, sandbox))
            assert not grade.refused
            passed[title] += grade.correct
            standard[title] += grade.correct_flexible
    with capsys.disabled():
        print(f"\n{name}, of {len(tasks)}: {dict(passed)}; by the benchmark's own verdict: {dict(standard)}")
    assert len(tasks) == 164
    assert [passed[title] for title in answers] == [164, 41, 41, 0, 0]
    assert standard["canonical"] == 164 and standard["return None"] == 0 and standard["always equal"] > 25


CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {test}, dev: {dev}}}}}
test_split: test
fewshot_split: dev
fewshot_config: {{sampler: first_n}}
num_fewshot: 5
description: "The following are multiple choice questions (with answers) about {subject}.\\n\\n"
output_type: multiple_choice
doc_to_text: "{{{{question.strip()}}}}\\nA. {{{{choices[0]}}}}\\nB. {{{{choices[1]}}}}\\n\
C. {{{{choices[2]}}}}\\nD. {{{{choices[3]}}}}\\nAnswer:"
doc_to_choice: [A, B, C, D]
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_our_mmlu_is_the_harness_mmlu(tmp_path, capsys):
    """SmolLM2-135M, five shots, 50 items of two subjects: the same prompts and, item by item, choices."""
    model_dir = ROOT / "models/smollm2-135m-q4"
    if not model_dir.is_dir():
        pytest.skip("needs the fetched model")
    from stages.engines import ChoiceRequest
    from stages.engines.in_process import InProcess
    from stages.models.base import load_base
    from stages.models.tokenizer import load_tokenizer
    from stages.prompts.renderer import Renderer

    # float32: in bfloat16 two letters are often exactly equal, and padding decides.
    model = ModelSection(name=str(model_dir), dtype="float32")
    subjects = ("abstract_algebra", "global_facts")
    test, dev = ([row for _, row in read_jsonl(DATA / "mmlu" / f)] for f in ("test.jsonl.gz", "dev.jsonl"))
    chosen = [row for subject in subjects for row in [r for r in test if r["subject"] == subject][:25]]
    write_jsonl(tmp_path / "chosen.jsonl", chosen)
    for subject in subjects:
        files = {split: tmp_path / f"{subject}-{split}.json" for split in ("test", "dev")}
        for file, rows in zip(files.values(), (chosen, dev), strict=True):
            write_jsonl(file, [row for row in rows if row["subject"] == subject])
        text = CHOICE.format(name=f"local_{subject}", subject=subject.replace("_", " "), **files)
        (tmp_path / f"{subject}.yaml").write_text(text)

    paths = {"path": str(tmp_path / "chosen.jsonl"), "shots_path": str(DATA / "mmlu/dev.jsonl")}
    benchmark, tokenizer = section("mmlu", **paths), load_tokenizer(model)
    asked = mmlu.ask(mmlu.load(benchmark), benchmark, Renderer(tokenizer, benchmark.prompt))
    engine = InProcess(load_base(model), tokenizer, 16)
    choices = dict(engine.choose_words([ChoiceRequest(item.ids, item.words) for item in asked]))
    ours = [max(range(4), key=choices[i].probabilities.__getitem__) for i in range(len(asked))]

    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=engine.model, tokenizer=tokenizer, batch_size=8),
        tasks=[f"local_{subject}" for subject in subjects],
        task_manager=TaskManager(include_path=str(tmp_path)),
        log_samples=True,
        bootstrap_iters=0,
    )
    theirs, prompts = [], []
    for subject in subjects:
        for row in sorted(found["samples"][f"local_{subject}"], key=lambda row: row["doc_id"]):
            scores = [response[0][0] for response in row["resps"]]
            theirs.append(max(range(4), key=scores.__getitem__))
            prompts.append(row["arguments"][0][0])
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    with capsys.disabled():
        right = sum(choice == row["answer"] for choice, row in zip(ours, chosen, strict=True))
        print(f"\nMMLU: {same} of {len(ours)} choices are those of lm-eval; {right} right")
    assert prompts == [item.text for item in asked]
    assert ours == theirs and len(ours) == 50
