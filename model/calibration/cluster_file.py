"""Reading and writing head_clusters.json.

The format is that of the SharePrefill release, `clusters` and `shared_clusters`, and optional fields that
model/sparse/head_clusters.h describes. Without them it is a plain file of the release, which both sides read.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

FORMAT_VERSION = 1
Pair = tuple[int, int]  # layer, head


@dataclass
class ClusterFile:
    clusters: dict[str, list[Pair]]
    shared: list[str]
    thresholds: dict[str, float] | None = None
    fingerprint: str | None = None
    sharing: dict[str, str] | None = None  # "scored" for shared clusters whose pivot is scored, not exact


def read(path: Path, num_layers: int, num_heads: int) -> ClusterFile:
    """Reads a file, the release's or ours, for a model of that shape."""
    data = json.loads(path.read_text())
    version = data.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version {version} unsupported; built for {FORMAT_VERSION}")
    clusters, seen = {}, set()
    for name, heads in data["clusters"].items():
        clusters[name] = [tuple(head) for head in heads]
        for layer, head in clusters[name]:
            if not (0 <= layer < num_layers and 0 <= head < num_heads):
                raise ValueError(
                    f"{path}: cluster {name!r} has head {layer}.{head}, "
                    f"outside {num_layers} layers of {num_heads} heads"
                )
            if (layer, head) in seen:
                raise ValueError(f"{path}: head {layer}.{head} is in two clusters")
            seen.add((layer, head))
    for name in data["shared_clusters"]:
        if name not in clusters:
            raise ValueError(f"{path}: shared_clusters names {name!r}, which is not among the clusters")
    return ClusterFile(
        clusters, data["shared_clusters"], data.get("thresholds"), data.get("model_fingerprint"), data.get("sharing")
    )


def write(path: Path, file: ClusterFile, calibration: dict | None = None, statistics: dict | None = None) -> None:
    """Writes a file. Fields that are None are left out, so with the clusters alone it is a plain file of the release.
    """
    optional = {
        "model_fingerprint": file.fingerprint,
        "sharing": file.sharing,
        "thresholds": file.thresholds,
        "calibration": calibration,
        "statistics": statistics,
    }
    optional = {name: value for name, value in optional.items() if value is not None}
    data = {"format_version": FORMAT_VERSION} if optional else {}
    data |= {"clusters": file.clusters, "shared_clusters": file.shared, **optional}
    text = json.dumps(data, indent=1)
    text = re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text)  # [layer, head] on one line
    path.write_text(text + "\n")
