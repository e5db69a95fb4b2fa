#!/usr/bin/env python3
"""Groups the heads that may share scores: one head of a group is scored, and the others take its blocks.

    scored_groups.py DUMPS --out groups.json
    calibrate.py … --clusters groups.json PROMPTS       chooses thresholds with these groups, by loss

DUMPS are files of prefill-calibrate, or folders of them. A head joins an earlier one whose blocks hold nearly as much of
its attention as its own would, and are not many more. Needs NumPy and safetensors; seconds for hundreds of heads.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import cluster_file
import numpy as np
from cluster_file import ClusterFile
from dumps import Causal, smallest_set
from safetensors import safe_open

Group = tuple[int, ...]  # heads, layer * num_heads + head; the first one is scored


@dataclass(frozen=True)
class Maps:
    """Block mass of every head over one prompt, [heads, causal entries]."""

    fingerprint: str
    num_heads: int  # of a layer
    mass: np.ndarray
    causal: Causal

    @staticmethod
    def read(path: Path) -> Maps:
        with safe_open(str(path), "np") as file:
            facts = file.metadata()
            layers = [file.get_tensor(f"layers.{i}.block_mass") for i in range(int(facts["num_layers"]))]
        causal = Causal.of(layers[0].shape[-1])
        mass = np.concatenate([layer[:, causal.row, causal.column] for layer in layers])
        return Maps(facts["model_fingerprint"], int(facts["num_heads"]), mass, causal)

    def patterns(self, threshold: float) -> np.ndarray:
        """Returns the fewest blocks of each row that hold the threshold, with block 0 and the diagonal."""
        chosen = np.empty(self.mass.shape, bool)
        square = np.zeros((self.causal.n, self.causal.n), np.float32)
        for head, mass in enumerate(self.mass):
            square[self.causal.row, self.causal.column] = mass
            chosen[head] = smallest_set(square, threshold)[self.causal.row, self.causal.column] | self.causal.forced
        return chosen


def fits(prompts: list[Maps], threshold: float, holds: float, size: float) -> np.ndarray:
    """Tells of each pair whether the second head may take the first one's blocks, in every prompt: [heads, heads]."""
    fit = None
    for maps in prompts:
        patterns = maps.patterns(threshold).astype(np.float32)
        held = patterns @ maps.mass.T / maps.causal.n  # [whose blocks, whose attention]
        blocks = patterns.sum(1)
        here = (held >= holds * held.diagonal()) & (blocks[:, None] <= size * blocks[None, :])
        fit = here if fit is None else fit & here
    return np.triu(fit, 1)  # a pivot comes before its members


def groups_of(fit: np.ndarray) -> list[Group]:
    """Takes the head that most others fit to, with all of them, then the next of what is left."""
    left, groups = fit.copy(), []
    while (members := left.sum(1)).any():
        first = int(members.argmax())
        group = (first, *map(int, np.flatnonzero(left[first])))
        groups.append(group)
        left[list(group), :] = left[:, list(group)] = False
    return sorted(groups)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dumps", nargs="+", type=Path, help="files of prefill-calibrate, or folders of them")
    parser.add_argument("--out", type=Path, required=True, help="the cluster file")
    parser.add_argument("--threshold", type=float, default=0.95, help="score threshold that will be served (%(default)s)")
    parser.add_argument("--holds", type=float, default=0.96, help="least part of what a head's own blocks hold of its "
                        "attention that the other head's must hold (%(default)s)")  # fmt: skip
    parser.add_argument("--size", type=float, default=1.1, help="most blocks, beside the head's own (%(default)s times)")
    args = parser.parse_args()
    for name in ("threshold", "holds"):
        if not 0 < getattr(args, name) <= 1:
            parser.error(f"--{name} {getattr(args, name)} is outside (0, 1]")
    return args


def main() -> None:
    args = read_arguments()
    files = sorted({f for path in args.dumps for f in (path.rglob("*.safetensors") if path.is_dir() else [path])})
    if not files:
        raise ValueError(f"no .safetensors files in {', '.join(map(str, args.dumps))}")
    prompts = [Maps.read(file) for file in files]
    if len({(maps.fingerprint, maps.num_heads) for maps in prompts}) > 1:
        raise ValueError("the dumps are of several models")
    groups = groups_of(fits(prompts, args.threshold, args.holds, args.size))
    pairs = {str(i): [divmod(head, prompts[0].num_heads) for head in group] for i, group in enumerate(groups)}
    file = ClusterFile(pairs, list(pairs), fingerprint=prompts[0].fingerprint, sharing={name: "scored" for name in pairs})
    cluster_file.write(args.out, file)
    members = sum(map(len, groups)) - len(groups)
    print(f"{args.out}: {len(groups)} groups; {members} of {len(prompts[0].mass)} heads need no scores of their own")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"scored_groups.py: {error}")
