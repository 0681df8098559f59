"""The wheel is whole: built from the source archive, installed alone, it runs the pipeline in any folder."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make dist` does, in a copy, for a build writes beside its sources."""
    home = tmp_path_factory.mktemp("source")
    for name in ("configs", "lorapar_cli", "stages"):
        shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, home)
    run(sys.executable, "-m", "build", "--no-isolation", home)
    return next((home / "dist").glob("*.whl"))


def run(*command: object, cwd: Path | None = None) -> str:
    """The output of a command that sees nothing of this checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


@pytest.mark.slow
def test_the_wheel_has_every_file_and_links_that_lead_somewhere(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = message_from_bytes(archive.read(next(n for n in archive.namelist() if "METADATA" in n)))
    files = [path for name in ("lorapar_cli", "stages") for path in (ROOT / name).rglob("*.*")]
    sources = {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}
    examples = {f"stages/init/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert packed == sources | examples
    text = metadata.get_payload()
    assert "lorapar init --example demo" in text and text.count("](") == text.count("](https://")


def test_pinned_versions_are_in_the_declared_ranges():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / ".ci/constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    for text in project["dependencies"]:
        requirement = Requirement(text)
        assert pins[requirement.name] in requirement.specifier


@pytest.mark.slow
def test_the_notebook_runs_from_the_wheel_alone(wheel, tmp_path):
    """The new environment has lorapar, and takes all other packages from the one that runs the tests."""
    cells = json.loads((ROOT / "docs/quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    commands = [
        re.sub("^!", "", text, flags=re.M) if text.startswith("!") else f"python -P - <<'END'\n{text}\nEND"
        for text in texts
    ]
    environment, home = tmp_path / "environment", tmp_path / "home"
    home.mkdir()
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    others = [path for path in sys.path if path.endswith("-packages")]
    (site / "others.pth").write_text("\n".join(others), encoding="utf-8")
    for module in ("lorapar_cli", "stages"):
        file = run(python, "-P", "-c", f"import {module}; print({module}.__file__)", cwd=home)
        assert Path(file.strip()).is_relative_to(environment)
    path = f"{environment / 'bin'}:{os.environ['PATH']}"
    run("env", f"PATH={path}", "bash", "-c", "\n".join(["set -e", *commands]), cwd=home)
    assert (home / "report/report.html").exists()
