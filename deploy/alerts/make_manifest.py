#!/usr/bin/env python3
"""Makes prometheus_rule.yaml, for the Prometheus operator, of prefilld.rules.yaml. Needs PyYAML.

    deploy/alerts/make_manifest.py
"""

from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
RULES, MANIFEST = HERE / "prefilld.rules.yaml", HERE / "prometheus_rule.yaml"
NOTE = "# Made by make_manifest.py of prefilld.rules.yaml; change that one.\n"


def manifest(rules: dict) -> str:
    """Returns the manifest whose spec are these rules."""
    labels = {"app.kubernetes.io/name": "prefilld", "app.kubernetes.io/part-of": "prefilld"}
    resource = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "prefilld", "labels": labels},
        "spec": rules,
    }
    return NOTE + yaml.safe_dump(resource, sort_keys=False, width=1000)


if __name__ == "__main__":
    MANIFEST.write_text(manifest(yaml.safe_load(RULES.read_text())))
