"""Packs `configs/` into the wheel as `stages/init/configs`, data of a package."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

# Each folder is a package, although it holds data alone.
CONFIGS = [".".join(("stages.init", *path.parts)) for path in Path().glob("configs/**/")]

setup(
    packages=[*find_namespace_packages(include=["lorapar_cli*", "stages*"]), *CONFIGS],
    package_dir={"stages.init.configs": "configs"},
)
