"""Python runs this at its start where this folder is in PYTHONPATH: it gives the process a pretend GPU.

Variables: PRETEND_GPUS, how many; PRETEND_FAULT, the name of a mistake to put in (see `faults.py`);
PRETEND_REPORT, a folder in which every process writes how many calls it made and what was refused.
"""

import atexit
import json
import os
from pathlib import Path

if os.environ.get("PRETEND_GPUS"):
    import device
    import faults

    device.install(int(os.environ["PRETEND_GPUS"]))
    if os.environ.get("PRETEND_FAULT"):
        faults.put_in(os.environ["PRETEND_FAULT"])

    def report() -> None:
        text = json.dumps({"calls": device.CALLS.total(), "refused": device.REFUSED})
        (Path(os.environ["PRETEND_REPORT"]) / f"{os.getpid()}.json").write_text(text, encoding="utf-8")

    atexit.register(report)
