"""lm-evaluation-harness is on MMLU of one mind with our evaluations."""

import importlib.util
import os
from pathlib import Path

import pytest
from conftest import ROOT

from stages.config import EvalSection, ModelSection
from stages.evaluation.benchmarks import mmlu
from stages.pipeline.resolve import registries
from stages.records import read_jsonl, write_jsonl

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)

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
def test_our_mmlu_is_the_harness_mmlu(tmp_path, capsys):
    """SmolLM2-135M, five shots, 50 items of two subjects: the same prompts and, item by item, choices."""
    data, model_dir = Path(os.environ.get("LORAPAR_DATA", "nowhere")), ROOT / "models/smollm2-135m-q4"
    if not data.is_dir() or not model_dir.is_dir():
        pytest.skip("needs LORAPAR_DATA and the fetched model")
    from stages.engines import ChoiceRequest
    from stages.engines.in_process import InProcess
    from stages.models.base import load_base
    from stages.models.tokenizer import load_tokenizer
    from stages.prompts.renderer import Renderer

    # float32: in bfloat16 two letters are often exactly equal, and padding decides.
    model = ModelSection(name=str(model_dir), dtype="float32")
    subjects = ("abstract_algebra", "global_facts")
    test, dev = ([row for _, row in read_jsonl(data / "mmlu" / f)] for f in ("test.jsonl.gz", "dev.jsonl"))
    chosen = [row for subject in subjects for row in [r for r in test if r["subject"] == subject][:25]]
    write_jsonl(tmp_path / "chosen.jsonl", chosen)
    for subject in subjects:
        files = {split: tmp_path / f"{subject}-{split}.json" for split in ("test", "dev")}
        for file, rows in zip(files.values(), (chosen, dev), strict=True):
            write_jsonl(file, [row for row in rows if row["subject"] == subject])
        text = CHOICE.format(name=f"local_{subject}", subject=subject.replace("_", " "), **files)
        (tmp_path / f"{subject}.yaml").write_text(text)

    entry = {"path": str(tmp_path / "chosen.jsonl"), "shots_path": str(data / "mmlu/dev.jsonl")}
    evaluated = EvalSection.model_validate({"benchmarks": {"mmlu": entry}}, context=registries())
    section = evaluated.benchmarks["mmlu"]
    tokenizer = load_tokenizer(model)
    asked = mmlu.ask(mmlu.load(section), section, Renderer(tokenizer, section.prompt))
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
