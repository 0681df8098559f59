"""What `lorapar plan` tells against what a run then takes, by step, on a machine that does nothing else.

Makes all steps of a config in a store of its own, so that none is there before. Prints for each step seconds
and MiB, planned and taken, with their ratios, and at last those of the whole.

python benchmarks/plan.py [CONFIG] [--set section.key=value …]
"""

import json
import subprocess
import tempfile
from pathlib import Path

from measure import lorapar, options

from stages.pipeline.resolve import load, resolved
from stages.pipeline.steps import ancestors, plan_steps
from stages.store.artifacts import Store
from stages.store.estimates import actual_and_planned


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("config", nargs="?", default="configs/demo.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as runs:
        settings = [*given.set, f"runs_dir={runs}"]
        for command in ("plan", "run"):
            asked = lorapar(command, given.config, settings=settings)
            subprocess.run(asked, stdout=subprocess.DEVNULL, check=True)
        config = resolved(load(Path(given.config), settings))
        store, together = Store(config.root), [0.0, 0.0]
        print("step", "seconds", "planned", "ratio", "MiB", "planned", "ratio", sep="\t")
        for name, step in ancestors(config, plan_steps(config), None).items():
            manifest = json.loads((store.folder(step.stage.name, step.key) / "manifest.json").read_bytes())
            took, told = actual_and_planned(manifest["provenance"])
            if took.seconds is not None and told.seconds is not None:
                together = [together[0] + took.seconds, together[1] + told.seconds]
            print(name, *_beside(took.seconds, told.seconds), *_beside(took.mib, told.mib), sep="\t")
        print("together", *_beside(*together), sep="\t")


def _beside(took: float | None, told: float | None) -> tuple[str, str, str]:
    if took is None or told is None:
        return ("–" if took is None else f"{took:.0f}"), "–", "–"
    return f"{took:.0f}", f"{told:.0f}", f"{told / took:.2f}" if took else "–"


if __name__ == "__main__":
    main()
