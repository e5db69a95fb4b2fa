#!/usr/bin/env python3
"""Tests that client/python is a package of its own: a copy of the folder builds, installs and imports without the
repository beside it and without a network.

Exits with 77 (skipped, for CTest) without setuptools, wheel, pip, or what the client imports.
"""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import unittest
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CLIENT = ROOT / "client" / "python"
NEEDED = ("setuptools", "wheel", "pip", "grpc", "numpy", "xxhash", "google.protobuf")

MISSING = []
for name in NEEDED:
    with contextlib.suppress(ModuleNotFoundError):
        if importlib.util.find_spec(name):
            continue
    MISSING.append(name)
if MISSING or not shutil.which("protoc"):
    print(f"skipped: {MISSING or 'protoc'} not here")
    sys.exit(77)


def run(*command, cwd, **environment):
    """Runs a command of this Python, which fails the test if it fails. No index of packages can be reached."""
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
    )  # fmt: skip
    if done.returncode != 0:
        raise AssertionError(f"{command} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def tracked_files():
    """Lists what a fresh clone has of client/python, so that leftovers of a build in this checkout do not help."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=CLIENT, capture_output=True, text=True)
    if listed.returncode == 0:
        return [CLIENT / name for name in listed.stdout.splitlines() if (CLIENT / name).is_file()]
    left_out = {"build", "dist", "__pycache__"}
    return [p for p in CLIENT.rglob("*") if p.is_file() and not left_out & set(p.parts) and p.suffix != ".binpb"]


USE = """
import prefilld, sys
from prefilld import descriptors, wire
assert not prefilld.__file__.startswith(sys.argv[1]), prefilld.__file__
assert wire.PrefillRequest(token_ids=[1, 2]).ByteSize() == 4
assert wire.enum_value("FinishReason", "stop") == 1
print(wire.descriptor_pb2.FileDescriptorSet.FromString(descriptors.load_descriptors()))
"""


class Package(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory(prefix="prefilld-package-")
        cls.addClassCleanup(cls.folder.cleanup)
        cls.work = Path(cls.folder.name)
        cls.copy = cls.work / "alone"
        for file in tracked_files():
            target = cls.copy / file.relative_to(CLIENT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
        cls.contract = run("-c", USE, "/nowhere", cwd=cls.work, PYTHONPATH=str(CLIENT))

    def install(self, source):
        """Installs a folder, wheel or sdist, and returns what the installed package says the contract is."""
        target = self.work / f"installed-{self.id().rsplit('.', 1)[-1]}"
        run("-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--target", target, source, cwd=self.work)
        self.assertTrue((target / "prefilld" / "py.typed").is_file())
        # Without a compiler, as on the machine of whoever installs it.
        return run("-c", USE, str(self.copy), cwd=self.work, PYTHONPATH=str(target), PATH="/nowhere")

    def test_folder_installs(self):
        self.assertEqual(self.install(self.copy), self.contract)

    def test_folder_works_uninstalled(self):
        # It must not find the repository, whatever lies above it.
        told = run("-c", USE, "/nowhere", cwd=self.work, PYTHONPATH=str(self.copy))
        self.assertEqual(told, self.contract)

    def test_wheel_installs_and_has_what_it_needs(self):
        wheels = self.work / "wheels"
        run("-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", wheels, self.copy, cwd=self.work)
        (wheel,) = wheels.iterdir()
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
            (metadata,) = (n for n in names if n.endswith("METADATA"))
            text = archive.read(metadata).decode()
        modules = {str(p.relative_to(CLIENT)) for p in (CLIENT / "prefilld").rglob("*.py")}
        self.assertLessEqual(modules | {"prefilld/py.typed", "prefilld/descriptors.binpb"}, names)
        self.assertIn("Requires-Python: >=", text)
        project = tomllib.loads((CLIENT / "pyproject.toml").read_text())["project"]
        for dependency in project["dependencies"]:
            self.assertIn(f"Requires-Dist: {dependency.split('>')[0]}", text)
        self.assertEqual(self.install(wheel), self.contract)

    def test_sdist_installs(self):
        dist = self.work / "dist"
        build = f"from setuptools import build_meta; build_meta.build_sdist({str(dist)!r})"
        run("-c", build, cwd=self.copy)
        (sdist,) = dist.iterdir()
        with tarfile.open(sdist) as archive:
            self.assertTrue(any(name.endswith("proto/prefill/v1/prefill.proto") for name in archive.getnames()))
        self.assertEqual(self.install(sdist), self.contract)


if __name__ == "__main__":
    unittest.main()
