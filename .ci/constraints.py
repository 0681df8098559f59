"""Writes constraints.txt: the version installed here of everything that lorapar needs, directly or not.

.venv/bin/python .ci/constraints.py      (`make constraints`, after the tests passed with these versions)

vLLM's own packages are left out: it pins them, and its two builds pin different ones. So is Triton: torch
pins it.
"""

import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
HEAD = """\
# The versions with which the tests passed last (Python 3.11): pip install -c .ci/constraints.txt …
# Written by `make constraints`.
"""
EXTRAS = ("fetch", "lm-eval", "slurm", "qlora", "dev")


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    versions: dict[str, str] = {}
    texts = [*project["dependencies"], *(text for extra in EXTRAS for text in extras[extra])]
    for text in texts:
        _add(Requirement(text), versions)
    lines = [f"{name}=={version}\n" for name, version in sorted(versions.items())]
    (ROOT / ".ci/constraints.txt").write_text(HEAD + "".join(lines), encoding="utf-8")


def _add(requirement: Requirement, versions: dict[str, str]) -> None:
    """Add the installed versions of a requirement and of what it needs; nothing if it is not installed."""
    name = requirement.name.lower().replace("_", "-")
    if name in versions or name == "triton":
        return
    try:
        installed = distribution(name)
    except PackageNotFoundError:
        return
    versions[name] = installed.version.partition("+")[0]
    for text in installed.requires or ():
        needed = Requirement(text)
        if needed.marker is None or any(
            needed.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)
        ):
            _add(needed, versions)


if __name__ == "__main__":
    main()
