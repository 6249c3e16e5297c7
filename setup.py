"""Ship configs/ as jaxdiff/configs; everything else is in pyproject.toml."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["jaxdiff", "jaxdiff.*"]), "jaxdiff.configs"],
    package_dir={"jaxdiff.configs": "configs"},
)
