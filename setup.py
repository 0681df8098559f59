"""Packs `configs/` into the wheel as `stages/init/configs`, data of a package."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["lorapar_cli*", "stages*"]), "stages.init.configs"],
    package_dir={"stages.init.configs": "configs"},
)
