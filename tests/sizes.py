"""Sizes that grow unseen; `make check` runs it.

Files and functions: warn past 300 and 50 lines, fail past 350 and 70. Parameters in stages/: the longest list
is said, and past 8 a verb's `run` is warned of. Files at the top of stages/: fail past 14.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FILE_WARN, FILE_FAIL, FUNCTION_WARN, FUNCTION_FAIL = 300, 350, 50, 70
PARAMETERS_WARN, TOP_FAIL = 8, 14
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(text: str) -> Iterator[Function]:
    yield from (node for node in ast.walk(ast.parse(text)) if isinstance(node, Function))


def parameters(function: Function) -> int:
    given = function.args
    return len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)


def lengths() -> bool:
    """Whether a file or function is too long."""
    failed = False
    for path in sorted(p for folder in ("lorapar_cli", "stages") for p in Path(folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        found = [(f"{path}", text.count("\n"), FILE_WARN, FILE_FAIL)]
        for node in functions(text):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            found.append((f"{path}:{node.lineno} {node.name}", length, FUNCTION_WARN, FUNCTION_FAIL))
        for name, length, warn, fail in found:
            if length > warn:
                print(f"{'FAIL' if length > fail else 'warning'}: {name} has {length} lines (wanted: {warn})")
            failed |= length > fail
    return failed


def breadths() -> bool:
    """Whether there are too many files at the top of stages/; says the longest list of parameters."""
    top = sorted(Path("stages").glob("*.py"))
    found = []
    for path in sorted(Path("stages").rglob("*.py")):
        for node in functions(path.read_text(encoding="utf-8")):
            number = parameters(node)
            found.append((number, f"{path}:{node.lineno} {node.name}"))
            if node.name == "run" and path in top and number > PARAMETERS_WARN:
                print(f"warning: {found[-1][1]} has {number} parameters (wanted: {PARAMETERS_WARN})")
    print("longest parameter list: {} in {}".format(*max(found)))
    if len(top) > TOP_FAIL:
        print(f"FAIL: {len(top)} files at the top of stages/ (wanted: {TOP_FAIL})")
    return len(top) > TOP_FAIL


def main() -> int:
    return int(any([lengths(), breadths()]))


if __name__ == "__main__":
    sys.exit(main())
