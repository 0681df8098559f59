"""HumanEval: 164 Python functions with unit tests (Chen et al. 2021, arXiv 2107.03374), run in a sandbox.

With the template `chat` the prompt asks for the whole function in a code block; with any other, the model
completes the function. The strict verdict accepts only results of built-in types. The flexible verdict is the
benchmark's own: program and tests run in one process, where an object that claims to equal everything passes,
and so does a program that writes the verdict itself.
"""

from typing import Any

from stages.config import BenchmarkSection
from stages.data.formats import other_fields, text_field
from stages.data.rows import drop_duplicates, parse_rows
from stages.evaluation.grading import Context, Grade
from stages.prompts.code import STOP, program_from_output, stub
from stages.prompts.renderer import RenderedPrompt, Renderer
from stages.records import Example
from stages.sandbox import SandboxFailure

DEFAULTS: dict[str, Any] = {
    "path": "openai/openai_humaneval",
    "split": "test",
    "revision": "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
    "label": False,
    "max_new_tokens": 512,
    "prompt": {"template": "plain"},
}
GROUPS = ()
SANDBOX = True


def load(section: BenchmarkSection) -> list[Example]:
    return drop_duplicates(parse_rows(section, _example, f"humaneval needs {', '.join(_FIELDS)}")[0], section)


def _example(row: dict[str, Any], _: int) -> Example:
    prompt, solution, tests, entry, task = (text_field(row, name) for name in _FIELDS)
    stub(prompt)  # SyntaxError unless a program can begin like this
    extra = {**other_fields(row, *_FIELDS), "test": tests, "entry_point": entry}
    return Example(task, prompt, solution, None, extra)


_FIELDS = ("prompt", "canonical_solution", "test", "entry_point", "task_id")


def ask(examples: list[Example], section: BenchmarkSection, renderer: Renderer) -> list[RenderedPrompt]:
    if renderer.section.template == "chat":
        request = "Complete this Python function. Answer with the whole function in one code block."
        texts = [renderer.prompt(f"{request}\n\n```python\n{e.prompt}```", example=e) for e in examples]
        return [RenderedPrompt(text, renderer.ids(text)) for text in texts]
    # The last line break is left out: most tokenizers merge it with the indentation that follows.
    return [RenderedPrompt(*renderer.few_shot("", [], e.prompt.rstrip()), STOP) for e in examples]


def grade(example: Example, output: str, context: Context) -> Grade:
    assert context.sandbox is not None
    entry, tests = example.extra["entry_point"], example.extra["test"]
    program = program_from_output(output, example.prompt, entry, context.chat)
    if program is None:
        return Grade(None, None, False, False, extra={"verdict": "no code"})
    try:
        verdict = context.sandbox.check(program, tests, entry, setup=stub(example.prompt))
        # The benchmark's own verdict can differ only where program and tests were run at all.
        doubtful = verdict.status in ("failed", "suspicious", "crashed", "flooded")
        standard = verdict.passed or (
            doubtful and context.sandbox.check_in_one_process(program, tests, entry)
        )
    except SandboxFailure as failure:
        extra = {"verdict": "refused", "why": str(failure)}
        return Grade(program, program, False, False, refused=True, extra=extra)
    extra = {"verdict": verdict.status, "why": verdict.why, "printed": verdict.output[-500:]}
    return Grade(program, program, verdict.passed, standard, extra=extra)
