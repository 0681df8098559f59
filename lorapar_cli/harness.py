"""Tasks of lm-evaluation-harness named on the command line, as entries of `eval.benchmarks`."""

import json
import re
from pathlib import Path


def entries(tasks: str, task_files: Path | None, limit: int | None) -> dict[str, str]:
    """Benchmark name → override: one entry for each task, so that each becomes an artifact and a table."""
    found = {}
    for task in map(str.strip, tasks.split(",")):
        name = f"lm-eval-{re.sub(r'[^0-9A-Za-z_-]', '-', task)}"
        entry = {"kind": "lm_eval", "tasks": [task], "limit": limit, "path": task_files and str(task_files)}
        found[name] = (
            f"eval.benchmarks.{name}={json.dumps({k: v for k, v in entry.items() if v is not None})}"
        )
    return found
