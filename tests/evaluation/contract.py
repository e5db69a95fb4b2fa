"""Reads policies and thresholds from the text of attention.proto. Standard library only."""

from __future__ import annotations

import re
from pathlib import Path

PROTO = Path(__file__).resolve().parents[2] / "proto" / "prefill" / "v1" / "attention.proto"
PYTHON_TYPES = {"float": float, "double": float, "uint32": int, "uint64": int, "bool": bool}


def _body(kind: str, name: str) -> str:
    """Returns the lines between the braces of an enum, or of a message without nested ones."""
    found = re.search(rf"^{kind} {name} {{\n(.*?)^}}", PROTO.read_text(), re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"{PROTO.name} has no {kind} {name}")
    return found.group(1)


def policies() -> tuple[str, ...]:
    """Lists policies as flags and the Python client spell them, in the order of the contract."""
    names = re.findall(r"^  ATTENTION_POLICY_(\w+) = [1-9]", _body("enum", "AttentionPolicy"), re.MULTILINE)
    return tuple(name.lower() for name in names)


def thresholds() -> dict[str, type]:
    """Returns the Python type of every field of AttentionOptions but the policy, in the order of the contract."""
    fields = re.findall(r"^  optional (\w+) (\w+) = \d+;", _body("message", "AttentionOptions"), re.MULTILINE)
    return {name: PYTHON_TYPES[wire_type] for wire_type, name in fields}
