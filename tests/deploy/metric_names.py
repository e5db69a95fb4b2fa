"""Finds the names of metrics in queries."""

from __future__ import annotations

import re


def of_query(expr: str) -> set[str]:
    """Returns the programs' metrics that a query names; those that rules record have colons, and are no metrics."""
    without_labels = re.sub(r"\{[^}]*\}", "", expr)
    names = re.findall(r"(?<![a-zA-Z0-9_:])(?:prefilld|process)_[a-z_]+(?![a-zA-Z0-9_:])", without_labels)
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}


def queries_of_dashboard(dashboard: dict) -> list[tuple[str, str, str]]:
    """Returns the panel's title, the query and its legend for every query."""
    return [
        (panel["title"], target["expr"], target["legendFormat"])
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    ]


def of_dashboard(dashboard: dict) -> set[str]:
    return set().union(*(of_query(expr) for _, expr, _ in queries_of_dashboard(dashboard)))


def of_rules(rules: dict) -> set[str]:
    return set().union(*(of_query(rule["expr"]) for group in rules["groups"] for rule in group["rules"]))


def in_table(page: str) -> set[str]:
    """Returns the metrics that the section Metrics of deploy/README.md describes."""
    section = re.search(r"^## Metrics\n(.*?)^## ", page, re.M | re.S)[1]
    return set(re.findall(r"`((?:prefilld|process)_[a-z_]+)(?:{[a-z,]*})?`", section))


def on_page(page: str) -> set[str]:
    """Returns the names of the families on a page of metrics."""
    return set(re.findall(r"^# TYPE (\S+)", page, re.MULTILINE))
