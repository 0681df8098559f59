"""Turns tasks of lm-evaluation-harness on the command line into entries of `eval.benchmarks`."""

import json
import re
from pathlib import Path


def entries(tasks: str, task_files: Path | None, limit: int | None) -> dict[str, str]:
    """Map benchmark name → override, one per task, so that each task has its own artifact and table."""
    overrides = {}
    for task in map(str.strip, tasks.split(",")):
        name = f"lm-eval-{re.sub(r'[^0-9A-Za-z_-]', '-', task)}"
        entry = {"kind": "lm_eval", "tasks": [task], "limit": limit, "path": task_files and str(task_files)}
        overrides[name] = (
            f"eval.benchmarks.{name}={json.dumps({k: v for k, v in entry.items() if v is not None})}"
        )
    return overrides
