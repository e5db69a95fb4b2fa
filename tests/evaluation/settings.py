"""The settings that are compared: an attention policy with the thresholds a request sets. Standard library only."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import contract

POLICIES = contract.policies()
# These say how much is computed; the last one is of a rule that no server has.
AMOUNTS = ("gamma", "vertical_slash_gamma", "density", "score_threshold", "alpha")


def _flag(text: str) -> bool:
    return {"true": True, "false": False}[text]


THRESHOLDS = {
    name: _flag if kind is bool else kind
    for name, kind in contract.thresholds().items()
    if name != "recall_audit_rows"  # changes no result, so it belongs to no setting
}


@dataclass(frozen=True)
class Setting:
    policy: str
    thresholds: tuple[tuple[str, float | int | bool], ...] = ()  # sorted by name; the rest is the server's default

    @property
    def name(self) -> str:
        """Returns the name that parse() takes: share:gamma=0.9,tau=0.4."""
        return self.policy + ("" if not self.thresholds else ":" + self._listed(self.thresholds))

    @property
    def family(self) -> str:
        """Returns the name without gammas or density. The settings of one family are the points of one curve."""
        rest = [t for t in self.thresholds if t[0] not in AMOUNTS]
        return self.policy + ("" if not rest else ":" + self._listed(rest))

    @staticmethod
    def _listed(thresholds) -> str:
        text = {True: "true", False: "false"}
        return ",".join(f"{k}={text[v] if isinstance(v, bool) else v}" for k, v in thresholds)

    def fields(self) -> dict:
        return {"policy": self.policy, **dict(self.thresholds)}


def parse(text: str) -> list[Setting]:
    """Turns `share:gamma=0.8/0.9,tau=0.4` into two settings. Raises ValueError that says what is wrong."""
    policy, _, listed = text.partition(":")
    if policy not in POLICIES:
        raise ValueError(f"policy {policy!r} unknown; one of {', '.join(POLICIES)}")
    choices = []
    for item in filter(None, listed.split(",")):
        name, _, values = item.partition("=")
        if name not in THRESHOLDS:
            raise ValueError(f"threshold {name!r} unknown; one of {', '.join(THRESHOLDS)}")
        try:
            choices.append([(name, THRESHOLDS[name](value)) for value in values.split("/")])
        except (ValueError, KeyError):
            raise ValueError(f"threshold {name}: {values!r} is not a {THRESHOLDS[name].__name__.strip('_')}") from None
    return [Setting(policy, tuple(sorted(combination))) for combination in itertools.product(*choices)]


def read_back(name: str) -> Setting:
    """Reads the name of anything that was measured, unchecked: a setting, or a rule of real_weights/rules.py."""
    policy, _, listed = name.partition(":")
    pairs = (item.partition("=") for item in filter(None, listed.split(",")))
    values = ((name, value == "true" if value in ("true", "false") else float(value)) for name, _, value in pairs)
    return Setting(policy, tuple(sorted(values)))


def parse_all(texts: list[str]) -> list[Setting]:
    """Parses settings in the order given, each once."""
    return list(dict.fromkeys(setting for text in texts for setting in parse(text)))
