"""MMLU: four choices, 57 subjects (Hendrycks et al. 2021, arXiv 2009.03300); 5 shots; likelihood or text.

In mode `likelihood` the answer is the likeliest of ` A`, ` B`, ` C` and ` D` after `Answer:`. The prompts are
those of lm-evaluation-harness' task `mmlu`. Results are split by subject and by category, with a macro
average over each.
"""

from typing import Any

from stages.config import BenchmarkSection, SourceSection
from stages.data.formats import other_fields, text_field
from stages.data.rows import parse_rows, shots_source
from stages.errors import DataError
from stages.evaluation.grading import Context, Grade
from stages.prompts.answers import extract, extract_letter
from stages.prompts.renderer import RenderedPrompt, Renderer
from stages.records import Example
from stages.store.digests import id_of

DEFAULTS: dict[str, Any] = {
    "path": "cais/mmlu",
    "subset": "all",
    "split": "test",
    "revision": "c30699e8356da336a370243923dbaf21066bb9fe",
    "shots": 5,
    "shots_split": "dev",
    "mode": "likelihood",
    "max_new_tokens": 16,
    "prompt": {"template": "plain"},
}
GROUPS = ("category", "subject")
LETTERS = ("A", "B", "C", "D")

_OF_CATEGORY = {
    "STEM": "abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science "
    "college_mathematics college_physics computer_security conceptual_physics electrical_engineering "
    "elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science "
    "high_school_mathematics high_school_physics high_school_statistics machine_learning",
    "humanities": "formal_logic high_school_european_history high_school_us_history "
    "high_school_world_history international_law jurisprudence logical_fallacies moral_disputes "
    "moral_scenarios philosophy prehistory professional_law world_religions",
    "social sciences": "econometrics high_school_geography high_school_government_and_politics "
    "high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality "
    "professional_psychology public_relations security_studies sociology us_foreign_policy",
    "other": "business_ethics clinical_knowledge college_medicine global_facts human_aging management "
    "marketing medical_genetics miscellaneous nutrition professional_accounting professional_medicine "
    "virology",
}
CATEGORY = {subject: category for category, subjects in _OF_CATEGORY.items() for subject in subjects.split()}


def load(section: SourceSection) -> list[Example]:
    """Rows have `subject`, `question`, `choices` and `answer` (an index). Repeated rows all count."""
    rows, _ = parse_rows(section, _example, "mmlu needs subject, question, choices, answer")
    return [example for _, example in rows]


def _example(row: dict[str, Any], number: int) -> Example:
    subject, question = text_field(row, "subject"), text_field(row, "question").strip()
    choices = row["choices"]
    if not isinstance(choices, list) or [type(choice) for choice in choices] != [str] * len(LETTERS):
        raise ValueError(f"field choices must hold {len(LETTERS)} texts")
    if type(row["answer"]) is not int or row["answer"] not in range(len(LETTERS)):
        raise ValueError(f"field answer must be 0 to 3, got {row['answer']!r}")
    listed = (f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=True))
    prompt = "\n".join([question, *listed])
    gold = LETTERS[row["answer"]]
    extra = other_fields(row, "subject", "question", "choices", "answer")
    extra |= {"subject": subject, "category": CATEGORY.get(subject, "unknown")}
    # The id includes the row's number because some questions occur twice.
    return Example(
        id_of([subject, prompt, gold, number]), prompt, f"{gold}. {choices[row['answer']]}", gold, extra
    )


def ask(examples: list[Example], section: BenchmarkSection, renderer: Renderer) -> list[RenderedPrompt]:
    """Render each question after the first `shots` worked questions of the same subject."""
    shots: dict[str, list[Example]] = {example.extra["subject"]: [] for example in examples}
    for shot in load(shots_source(section)) if section.shots else []:
        of_subject = shots.get(shot.extra["subject"])
        if of_subject is not None and len(of_subject) < section.shots:
            of_subject.append(shot)
    if missing := {subject for subject, worked in shots.items() if len(worked) < section.shots}:
        raise DataError(
            f"fewer than {section.shots} shots for {', '.join(sorted(missing))}",
            "lower shots, or give shots_path",
        )
    words = LETTERS if renderer.section.template == "chat" else tuple(f" {name}" for name in LETTERS)
    # The plain prompt has worked examples of one line each; a chat may work its answer out.
    stop = () if section.mode == "likelihood" or renderer.section.template == "chat" else ("\n",)
    prompts = []
    for example in examples:
        subject = example.extra["subject"]
        turns = [(f"{shot.prompt}\nAnswer:", str(shot.gold)) for shot in shots[subject]]
        topic = subject.replace("_", " ")
        head = f"The following are multiple choice questions (with answers) about {topic}.\n\n"
        text, ids = renderer.few_shot(head, turns, f"{example.prompt}\nAnswer:")
        prompts.append(RenderedPrompt(text, ids, stop, words if section.mode == "likelihood" else ()))
    return prompts


def grade(example: Example, output: str, context: Context) -> Grade:
    """Strict: the output begins with a letter or has the answer format. Flexible: it names a letter."""
    strict = extract_letter(extract(output, context.answer_format).strict or output, leading_only=True)
    flexible = strict or extract_letter(output)
    return Grade(strict, flexible, strict == example.gold, flexible == example.gold)
