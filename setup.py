"""Copy the example policies of the repository into the package: they have one source, policies/examples. All else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithExamples(build_py):
    def run(self) -> None:
        super().run()
        shutil.copytree("policies/examples", Path(self.build_lib, "gateway_addon", "policy", "examples"), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithExamples})
