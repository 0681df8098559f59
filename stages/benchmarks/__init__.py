"""Benchmarks, one file each, found by file name.

`DEFAULTS`: settings of its entry under `eval.benchmarks`. `load(section)`: its items as Examples. `ask(examples, section,
renderer)`: one Asked per item. `grade(example, output, context)`: a Grade. `GROUPS`: fields of the items by which results are
split too. `SANDBOX`: it runs code. A benchmark that is run by someone else's harness has `run` instead of all but DEFAULTS.
"""

from stages.registry import Files

benchmarks = Files("benchmark", __name__, __path__, mark="DEFAULTS")
