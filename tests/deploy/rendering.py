"""Renders the kustomizations of this repository with kubectl."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
KUSTOMIZATIONS = [KUBERNETES / "base", *sorted((KUBERNETES / "overlays").iterdir())]
OLDEST_KUSTOMIZE = 5  # of kubectl 1.27; what is written here says `components` and `patches`


def of_the_environment() -> str:
    """Returns the kubectl of requirements.txt."""
    return str(Path(sys.executable).parent / "kubectl")


def on_the_path() -> str | None:
    """Returns the machine's own kubectl, if there is one beside that of the environment."""
    folders = [f for f in os.environ["PATH"].split(os.pathsep) if Path(f) != Path(sys.executable).parent]
    return shutil.which("kubectl", path=os.pathsep.join(folders))


def kustomize_version(kubectl: str) -> tuple[int, ...]:
    """Returns the version of the kustomize inside. Those of kubectl 1.20 and before do not say theirs: (2,)."""
    said = json.loads(run(kubectl, "version", "--client", "--output=json"))
    return tuple(int(n) for n in said.get("kustomizeVersion", "v2").lstrip("v").split("."))


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr[:2000]}")
    return done.stdout


@functools.cache
def render_text(folder: Path, kubectl: str | None = None) -> str:
    return run(kubectl or of_the_environment(), "kustomize", str(folder))


def render(folder: Path) -> list[dict]:
    return list(yaml.safe_load_all(render_text(folder)))


def of_kind(resources: list[dict], *kinds: str) -> list[dict]:
    return [resource for resource in resources if resource["kind"] in kinds]


def pod_of(deployment: dict) -> dict:
    return deployment["spec"]["template"]["spec"]


def containers_of(deployment: dict) -> list[dict]:
    """Returns the containers of a pod, sidecars included."""
    pod = pod_of(deployment)
    return [*pod.get("initContainers", []), *pod["containers"]]


def program_of(container: dict) -> str | None:
    """Returns which program of ours a container runs, or None."""
    name = container.get("command", [""])[0]
    return name if name.startswith("prefilld") else None


def flag_value(container: dict, name: str) -> str | None:
    for argument in container["args"]:
        if argument.startswith(f"--{name}="):
            return argument.split("=", 1)[1]
    return None
