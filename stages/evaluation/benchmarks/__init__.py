"""Benchmarks, one file each; `BUILT_IN` lists them.

A file defines these names at its top level:

- `DEFAULTS`: the default settings of its entry under `eval.benchmarks`.
- `load(section)`: the items as Examples.
- `ask(examples, section, renderer)`: the rendered prompt of each item.
- `grade(example, output, context)`: the Grade of an answer.
- `GROUPS`: the fields of an item by which the results are also split.
- `SANDBOX = True`, if grading runs code that a model wrote.
"""

from stages.registry import Registry

BUILT_IN = ("demo", "gsm8k", "humaneval", "jsonl", "mmlu")
benchmarks = Registry("benchmark", {name: f"{__name__}.{name}" for name in BUILT_IN})
