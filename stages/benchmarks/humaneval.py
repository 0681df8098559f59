"""HumanEval: 164 Python functions with unit tests (Chen et al. 2021, arXiv 2107.03374); programs run in a sandbox only.

prompt.template plain asks for a completion of the function; chat asks for the whole function in a code block. The strict
verdict takes results of built-in types only; the flexible one is the benchmark's own, program and tests in one process, which
believes an object that claims to equal everything.
"""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING, Any

from stages.benchmarks.grading import Context, Grade, bad_rows
from stages.config import BenchmarkSection
from stages.language.prompts import Asked
from stages.records import Example
from stages.sandbox import SandboxFailure
from stages.sources import table, text_field

if TYPE_CHECKING:
    from stages.language.prompts import Renderer

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
STOP = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\nassert ", "\n```", "\nfrom ", "\nimport ")
"""What begins after the function: those of the paper and four more, which cannot be part of a function's body either."""


def load(section: BenchmarkSection) -> list[Example]:
    where, rows = table(section)
    examples, bad = [], []
    for number, row in rows:
        try:
            prompt, solution, tests, entry, task = (
                text_field(row, name) for name in ("prompt", "canonical_solution", "test", "entry_point", "task_id")
            )
            examples.append(Example(task, prompt, solution, None, {"test": tests, "entry_point": entry}))
        except ValueError as error:
            bad.append(f"{where}:{number}: {error}")
    bad_rows("humaneval", bad, "task_id, prompt, canonical_solution, test, entry_point")
    return examples


def ask(examples: list[Example], section: BenchmarkSection, renderer: Renderer) -> list[Asked]:
    if renderer.section.template == "chat":
        texts = [
            f"Complete this Python function. Answer with the whole function in one code block.\n\n```python\n{e.prompt}```"
            for e in examples
        ]
        return [Asked(renderer.prompt(text), renderer.prompt_ids(text)) for text in texts]
    # Without its last line break, which most tokenizers merge with the indentation that follows it.
    return [Asked(*renderer.few_shot("", [], e.prompt.rstrip()), STOP) for e in examples]


def code_of(output: str, prompt: str, entry: str, chat: bool) -> str | None:
    """The program in an answer: the one place that decides what counts as code. None if there is nothing to run.

    A completion continues the prompt up to the first STOP text. From a chat the last code block with the function is taken,
    else the last one, else the whole text; if it does not define the function, it continues the prompt. Indentation is left
    as it is: a wrong one is the model's mistake.
    """
    if not chat:
        ends = [at for stop in STOP if (at := output.find(stop)) >= 0]
        body = output[: min(ends)] if ends else output
        return "\n".join([prompt.rstrip(), body.removeprefix("\n"), ""]) if body.strip() else None
    blocks = re.findall(r"```(?:[Pp]ython|py)?[ \t]*\n(.*?)(?:```|\Z)", output, re.DOTALL)
    with_entry = [block for block in blocks if _defines(block, entry)]
    code = (with_entry or blocks or [output])[-1]
    if not code.strip():
        return None
    # What the prompt defines or imports stays available to a function written anew.
    return f"{prompt}    pass\n\n{code}\n" if _defines(code, entry) else f"{prompt}{code}\n"


def _defines(code: str, entry: str) -> bool:
    try:
        return any(isinstance(node, ast.FunctionDef) and node.name == entry for node in ast.parse(code).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return re.search(rf"^def {re.escape(entry)}\b", code, re.MULTILINE) is not None


def grade(example: Example, output: str, context: Context) -> Grade:
    assert context.sandbox is not None
    entry, tests = example.extra["entry_point"], example.extra["test"]
    program = code_of(output, example.prompt, entry, context.chat)
    if program is None:
        return Grade(None, None, False, False, extra={"verdict": "no code"})
    try:
        verdict = context.sandbox.check(program, tests, entry, setup=example.prompt)
        # Only where program and tests ran at all can the benchmark's own verdict differ.
        doubtful = verdict.status in ("failed", "suspicious", "crashed", "flooded")
        standard = verdict.passed or (doubtful and context.sandbox.plain(program, tests, entry))
    except SandboxFailure as failure:
        return Grade(program, program, False, False, refused=True, extra={"verdict": "refused", "why": str(failure)})
    extra = {"verdict": verdict.status, "why": verdict.why, "printed": verdict.output[-500:]}
    return Grade(program, program, verdict.passed, standard, extra=extra)
