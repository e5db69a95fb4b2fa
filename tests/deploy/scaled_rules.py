"""Rules for a test that has less time than an operator."""

from __future__ import annotations

import copy
import re

MILLISECONDS = {"s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


def scaled_duration(duration: str, factor: float) -> str:
    number, unit = re.fullmatch(r"(\d+)([smhd])", duration).groups()
    return f"{max(1, round(int(number) * MILLISECONDS[unit] * factor))}ms"


def scaled(rules: dict, factor: float) -> dict:
    """Returns the rules with every window, every offset and every `for` times the factor. Thresholds stay."""
    rules = copy.deepcopy(rules)
    for group in rules["groups"]:
        for rule in group["rules"]:
            times = r"(\[|\boffset )(\d+[smhd])\b"
            rule["expr"] = re.sub(times, lambda m: m[1] + scaled_duration(m[2], factor), rule["expr"])
            if "for" in rule:
                rule["for"] = scaled_duration(rule["for"], factor)
    return rules
