"""Adds the compiled wire contract to the package, so that an installed client needs no compiler."""

import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


class BuildWithDescriptors(build_py):
    def run(self):
        super().run()
        module = runpy.run_path(str(HERE / "prefilld" / "descriptors.py"))
        module["write_descriptors"](Path(self.build_lib) / "prefilld" / module["FILE_NAME"])


setup(cmdclass={"build_py": BuildWithDescriptors})
