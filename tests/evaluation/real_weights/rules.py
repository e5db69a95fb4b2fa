"""Rules that choose which blocks of attention a head computes, in plain PyTorch: what prefilld serves, and its rivals.

Each chooses for all heads of a layer at once from q and k [H, N, d], which are rotated, with keys matched to heads; N
is a multiple of the block. A pattern is [H, n, n] bool: row r are the queries of block r, column c the keys of block c.
The code is clear and exact, not fast.

  antidiagonal   what prefilld computes for a scored head; with a last_rows_gamma near 0 it is XAttention's rule
  vertical_slash what the last block of queries looks at
  flash_prefill  FlashPrefill's (Fan et al., arXiv 2603.06199), see the class
  best_blocks    the fewest blocks that hold gamma of the exact mass of every row: the limit of rules that go by mass

`mean_of_rest` of any rule adds, for each block left out, one key and one value in place of its tokens, their means, as
FlashPrefill's second version (arXiv 2608.19758) does. prefilld computes nothing of the kind.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "model" / "tiny"))
import reference_policies as reference  # noqa: E402

TILE_ROWS = 512
# Older ones, such as Debian 12's, have none. It is several times as fast as `attend` here.
HAS_FUSED_ATTENTION = hasattr(torch.nn.functional, "scaled_dot_product_attention")


# --- scores -----------------------------------------------------------------------------------------------------------


def antidiagonal_mass(q: Tensor, k: Tensor, block: int, stride: int) -> Tensor:
    """Estimates the block mass [H, n, n] as kernels/antidiagonal_scores.h says."""
    dim = q.shape[-1]
    q_folds = q.float().unflatten(1, (-1, stride)).flip(2).flatten(2)
    k_folds = k.float().unflatten(1, (-1, stride)).flatten(2)
    scores = q_folds @ k_folds.transpose(1, 2) * (dim**-0.5 / stride)
    index = torch.arange(scores.shape[-1], device=q.device)
    mass = scores.masked_fill_(index > index[:, None], -math.inf).softmax(-1)
    per = block // stride
    return mass.unflatten(1, (-1, per)).unflatten(-1, (-1, per)).sum((2, 4)) / per


def pooled_key_energy(q: Tensor, k: Tensor, block: int) -> Tensor:
    """FlashPrefill's score of every block, [H, n, n]: the sum over its queries of exp(q . mean key / sqrt(d)), up to a
    factor of each row. A query has a say on a block only if it sees all of it.
    """
    length, dim = q.shape[1:]
    logits = q.float() @ block_means(k, block).transpose(1, 2) * dim**-0.5
    position = torch.arange(length, device=q.device)
    ends = torch.arange(block - 1, length, block, device=q.device)
    rows = logits.masked_fill_(ends > position[:, None], -math.inf).unflatten(1, (-1, block))
    return (rows - rows.amax((2, 3), keepdim=True)).exp().sum(2)


def block_means(x: Tensor, block: int) -> Tensor:
    return x.float().unflatten(1, (-1, block)).mean(2)


# --- rules ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    block: int = 128
    mean_of_rest: bool = False

    def choose(self, q: Tensor, k: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Antidiagonal(Rule):
    score_threshold: float = 0.95
    last_rows_gamma: float = 0.3
    score_stride: int = 8

    def choose(self, q: Tensor, k: Tensor) -> Tensor:
        scored = reference.smallest_set(antidiagonal_mass(q, k, self.block, self.score_stride), self.score_threshold)
        last_rows = reference.vertical_slash(reference.estimate(q, k, self.block), self.last_rows_gamma, self.block)
        return reference.with_forced(scored | last_rows)


@dataclass(frozen=True)
class VerticalSlash(Rule):
    gamma: float = 0.9

    def choose(self, q: Tensor, k: Tensor) -> Tensor:
        return reference.vertical_slash(reference.estimate(q, k, self.block), self.gamma, self.block)


@dataclass(frozen=True)
class FlashPrefill(Rule):
    """A row takes the blocks whose score is at least alpha of its highest, the first `sink_blocks`, the `window_blocks`
    that end at the diagonal, and, if it is one of the last `full_rows`, everything. The article's code ships alpha 0.08
    to 0.22, model by model, and the other defaults here.
    """

    alpha: float = 0.1
    sink_blocks: int = 2
    window_blocks: int = 4
    full_rows: int = 2

    def choose(self, q: Tensor, k: Tensor) -> Tensor:
        energy = pooled_key_energy(q, k, self.block)
        row = torch.arange(energy.shape[-1], device=q.device)
        behind = row[:, None] - row
        always = (row < self.sink_blocks) | (behind < self.window_blocks) | (row[:, None] >= len(row) - self.full_rows)
        return ((energy >= self.alpha * energy.amax(-1, keepdim=True)) | always).tril()


@dataclass(frozen=True)
class BestBlocks(Rule):
    gamma: float = 0.95

    def choose(self, q: Tensor, k: Tensor) -> Tensor:
        return reference.pivot_pattern(reference.dense_with_mass(q, k, k, self.block)[1], self.gamma)


RULES = {
    "antidiagonal": Antidiagonal,
    "vertical_slash": VerticalSlash,
    "flash_prefill": FlashPrefill,
    "best_blocks": BestBlocks,
}


def parse(text: str) -> dict[str, Rule]:
    """Turns `flash_prefill:alpha=0.1/0.2,window_blocks=1` into two rules by name. Raises ValueError."""
    kind, _, listed = text.partition(":")
    if kind not in RULES:
        raise ValueError(f"rule {kind!r} unknown; one of {', '.join(RULES)}")
    types = {field.name: type(field.default) for field in dataclasses.fields(RULES[kind])}
    choices = []
    for item in filter(None, listed.split(",")):
        name, _, values = item.partition("=")
        if name not in types:
            raise ValueError(f"{kind} has no {name!r}; it has {', '.join(types)}")
        read = _flag if types[name] is bool else types[name]
        choices.append([(name, value, read(value)) for value in values.split("/")])
    rules = {}
    for named in itertools.product(*choices):
        listed = ",".join(f"{name}={text}" for name, text, _ in named)
        rules[kind + (f":{listed}" if listed else "")] = RULES[kind](**{name: value for name, _, value in named})
    return rules


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"{text!r} is neither true nor false")
    return text == "true"


# --- attention --------------------------------------------------------------------------------------------------------


def attend(rule: Rule, q: Tensor, k: Tensor, v: Tensor, pattern: Tensor) -> Tensor:
    """Computes exact softmax over the chosen blocks, and the means of the others if the rule says so, causal inside the
    diagonal block, [H, N, d].
    """
    length, block, scale = q.shape[1], rule.block, q.shape[-1] ** -0.5
    out = torch.empty_like(v)
    mean_k, mean_v = (block_means(x, block) for x in (k, v)) if rule.mean_of_rest else (None, None)
    for start in range(0, length, TILE_ROWS):
        stop = min(start + TILE_ROWS, length)
        chosen = pattern[:, start // block : stop // block, : stop // block].repeat_interleave(block, 1)
        mask = chosen.repeat_interleave(block, 2)
        mask[:, :, start:] &= torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).tril()
        rows, values = q[:, start:stop].float(), v[:, :stop].float()
        logits = (rows @ k[:, :stop].float().transpose(1, 2)).mul_(scale).masked_fill_(~mask, -math.inf)
        if rule.mean_of_rest:
            # A mean stands for a whole block of keys, hence the logarithm. Blocks of the future have none.
            index = torch.arange(stop // block, device=q.device)
            before = torch.arange(start, stop, device=q.device)[:, None] // block > index
            rest = rows @ mean_k[:, : stop // block].transpose(1, 2) * scale + math.log(block)
            logits = torch.cat((logits, rest.masked_fill_(chosen | ~before, -math.inf)), -1)
            values = torch.cat((values, mean_v[:, : stop // block]), 1)
        out[:, start:stop] = (logits.softmax(-1) @ values).to(v.dtype)
    return out


class Prefill:
    """The attention of one text under a rule, for Decoder. Keeps the density of every head."""

    def __init__(self, rule: Rule):
        self.rule, self.density = rule, []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        q, k, v = q[0], k[0].repeat_interleave(group, 0), v[0].repeat_interleave(group, 0)
        pattern = self.rule.choose(q, k)
        self.density.append(reference.density(pattern).mean())
        if HAS_FUSED_ATTENTION and not self.rule.mean_of_rest:
            return reference.attend_chosen(q, k, v, pattern, self.rule.block)[None]
        return attend(self.rule, q, k, v, pattern)[None]
