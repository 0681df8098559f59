"""Sizes that grow unseen; `make check` runs it.

Files and functions: warn past 300 and 50 lines, fail past 350 and 70. At most 14 files at the top of stages/.
"""

import ast
import sys
from pathlib import Path

FILE_WARN, FILE_FAIL, FUNCTION_WARN, FUNCTION_FAIL, TOP_FAIL = 300, 350, 50, 70, 14


def main() -> int:
    failed = False
    for path in sorted(p for folder in ("lorapar_cli", "stages") for p in Path(folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        found = [(f"{path}", text.count("\n"), FILE_WARN, FILE_FAIL)]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                found.append((f"{path}:{node.lineno} {node.name}", length, FUNCTION_WARN, FUNCTION_FAIL))
        for name, length, warn, fail in found:
            if length > warn:
                print(f"{'FAIL' if length > fail else 'warning'}: {name} has {length} lines (wanted: {warn})")
            failed |= length > fail
    top = len(list(Path("stages").glob("*.py")))
    if top > TOP_FAIL:
        print(f"FAIL: {top} files at the top of stages/ (wanted: {TOP_FAIL})")
    return int(failed or top > TOP_FAIL)


if __name__ == "__main__":
    sys.exit(main())
