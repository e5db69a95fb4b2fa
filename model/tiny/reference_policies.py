"""The attention policies in plain PyTorch: `dense`, `vertical_slash` and `share` by coverage, as block masks.

The kernels are checked against them. Decisions use only what the online algorithm sees: the scores of the last query
block, and the exact block mass of heads that are computed densely anyway. The code is clear and exact, not fast.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import tasks
from decoder import Decoder

TILE_ROWS = 512


@dataclass(frozen=True)
class Policy:
    name: str  # dense, vertical_slash, share
    block: int = 64
    gamma: float = 0.9  # mass that a pattern must hold
    tau: float = 0.4  # largest JS distance at which a pivot's pattern is taken
    coverage: float = 0.85  # a pivot that vertical-slash covers this well for as many blocks is not worth sharing
    with_recall: bool = False  # measure it, which makes a policy as slow as exact maps of all heads


# --- patterns ---------------------------------------------------------------------------------------------------------
# Everything below is for all heads of a layer at once: q, k, v are [H,N,d] with keys and values already matched to heads.


def smallest_set(mass: Tensor, gamma: float | Tensor) -> Tensor:
    """Returns, per row, the fewest entries whose sum reaches gamma of the row's, as bool of the same shape. Ties go by
    index.
    """
    ordered, index = mass.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    keep = before < gamma * mass.sum(-1, keepdim=True)
    return torch.zeros_like(keep).scatter(-1, index, keep)


def js_distance(p: Tensor, q: Tensor) -> Tensor:
    """Returns the square root of the Jensen-Shannon divergence in nats, over the last axis, with 0 ln 0 = 0."""
    m = (p + q) / 2
    divergence = (torch.xlogy(p, p / m.clamp_min(1e-30)) + torch.xlogy(q, q / m.clamp_min(1e-30))).sum(-1) / 2
    return divergence.clamp_min(0).sqrt()


def with_forced(pattern: Tensor) -> Tensor:
    """Adds block 0 and the diagonal, and removes everything above the diagonal."""
    pattern = pattern | torch.eye(pattern.shape[-1], dtype=torch.bool, device=pattern.device)
    pattern[..., 0] = True
    return pattern.tril()


def density(pattern: Tensor) -> Tensor:
    """Returns the share of the causal blocks, per head."""
    n = pattern.shape[-1]
    return pattern.sum((-2, -1)) / (n * (n + 1) / 2)


def mass_inside(mass: Tensor, pattern: Tensor) -> Tensor:
    """Returns the share of the attention inside the pattern, mean over the rows, per head."""
    return (mass * pattern).sum(-1).mean(-1)


@dataclass
class Estimate:
    """The mass that the last query block finds."""

    blocks: Tensor  # [H,n], rows sum to 1
    vertical: Tensor  # [H,N], mass per key column
    slash: Tensor  # [H,N], mass per distance of the key behind the query


def estimate(q: Tensor, k: Tensor, block: int) -> Estimate:
    length = q.shape[1]
    positions = torch.arange(length, device=q.device)
    last = positions[-block:, None]
    scores = q[:, -block:].float() @ k.float().mT * q.shape[-1] ** -0.5
    mass = scores.masked_fill(positions > last, -math.inf).softmax(-1)
    column = last - positions  # [rows, N]: the column that lies `position` behind the row
    at_distance = mass.gather(-1, column.clamp_min(0).expand_as(mass))
    vertical = mass.mean(1)
    return Estimate(
        blocks=F.pad(vertical, (0, -length % block)).unflatten(-1, (-1, block)).sum(-1),
        vertical=vertical,
        slash=at_distance.masked_fill(column < 0, 0).mean(1),
    )


def vertical_slash(seen: Estimate, gamma: float | Tensor, block: int) -> Tensor:
    """Returns the pattern [H,n,n]. gamma may differ by head, [H,1]."""
    n = seen.blocks.shape[-1]
    in_blocks = lambda kept: F.pad(kept, (0, n * block - kept.shape[-1])).unflatten(-1, (n, block))  # noqa: E731
    columns = in_blocks(smallest_set(seen.vertical, gamma)).any(-1)
    offsets = in_blocks(smallest_set(seen.slash, gamma))
    # A diagonal off the block grid crosses two block diagonals.
    diagonals = offsets.any(-1)
    diagonals[:, 1:] |= offsets[:, :-1, 1:].any(-1)
    index = torch.arange(n, device=columns.device)
    return with_forced(columns[:, None] | diagonals[:, (index[:, None] - index).clamp_min(0)])


def vertical_slash_of_cost(seen: Estimate, cost: Tensor, block: int) -> Tensor:
    """Finds, per head, the largest vertical-slash set of at most cost [H] blocks, by bisection on its gamma."""
    low, high = torch.zeros_like(cost[:, None], dtype=torch.float), torch.ones(len(cost), 1, device=cost.device)
    for _ in range(10):
        middle = (low + high) / 2
        fits = (vertical_slash(seen, middle, block).sum((1, 2)) <= cost)[:, None]
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return vertical_slash(seen, low, block)


def pivot_pattern(mass: Tensor, gamma: float) -> Tensor:
    return with_forced(smallest_set(mass, gamma))


def shared_pattern(pivot: Tensor, seen: Estimate, gamma: float) -> Tensor:
    """Returns the pivot's pattern [H,n,n], with the blocks added that each head wants by its own estimate in the last
    row.
    """
    pattern = pivot.expand(len(seen.blocks), -1, -1).clone()
    pattern[:, -1] |= smallest_set(seen.blocks, gamma)
    return with_forced(pattern)


def pick(seen: Estimate, heads: list[int]) -> Estimate:
    return Estimate(seen.blocks[heads], seen.vertical[heads], seen.slash[heads])


# --- attention --------------------------------------------------------------------------------------------------------


def dense_with_mass(q: Tensor, k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Returns out [H,N,d] and the exact block mass [H,n,n]: the mean over a block's rows of the mass on each key block.
    """
    heads, length, dim = q.shape
    n = -(-length // block)
    out = torch.empty_like(v)
    mass = torch.zeros(heads, n, n, device=q.device)
    tile = max(1, TILE_ROWS // block) * block
    for start in range(0, length, tile):
        stop = min(start + tile, length)
        columns = -(-stop // block)
        # The scores are in fp32, because bf16 scores have 8 bits, too coarse for the mass of 16k keys.
        scores = q[:, start:stop].float() @ k[:, :stop].float().mT * dim**-0.5
        ahead = torch.arange(stop, device=q.device) > torch.arange(start, stop, device=q.device)[:, None]
        probability = scores.masked_fill_(ahead, -math.inf).softmax(-1)
        out[:, start:stop] = (probability @ v[:, :stop].float()).to(v.dtype)
        padded = F.pad(probability, (0, -stop % block, 0, -(stop - start) % block))
        pooled = padded.unflatten(1, (-1, block)).unflatten(-1, (-1, block)).sum((2, 4))
        mass[:, start // block : columns, :columns] = pooled / pooled.sum(-1, keepdim=True)
    return out, mass


def attend_chosen(q: Tensor, k: Tensor, v: Tensor, patterns: Tensor, block: int) -> Tensor:
    """Computes exact softmax over the chosen blocks [H,n,n] alone, causal inside the diagonal block."""
    length = q.shape[1]
    out = torch.empty_like(v)
    tile = max(1, TILE_ROWS // block) * block
    for start in range(0, length, tile):
        stop = min(start + tile, length)
        chosen = patterns[:, start // block : -(-stop // block), : -(-stop // block)]
        mask = chosen.repeat_interleave(block, 1)[:, : stop - start].repeat_interleave(block, 2)[:, :, :stop]
        mask[:, :, start:] &= torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).tril()
        part = F.scaled_dot_product_attention(
            q[None, :, start:stop], k[None, :, :stop], v[None, :, :stop], attn_mask=mask[None]
        )
        out[:, start:stop] = part[0]
    return out


@dataclass
class Pivot:
    pattern: Tensor
    blocks: Tensor
    worth_sharing: bool = True


@dataclass
class Trace:
    density: list[float] = field(default_factory=list)  # per head, layer by layer
    recall: list[float] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)  # dense, pivot, shared, vertical_slash


class Prefill:
    """The attention of one prompt under a policy, layer by layer. Keeps keys and values for decoding."""

    def __init__(self, policy: Policy, clusters: dict[tuple[int, int], str]):
        self.policy, self.clusters = policy, clusters  # (layer, head) -> shared cluster
        self.pivots: dict[str, Pivot] = {}
        self.trace = Trace()
        self.cache: list[tuple[Tensor, Tensor]] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.cache.append((k, v))
        group = q.shape[1] // k.shape[1]
        q, k, v = q[0], k[0].repeat_interleave(group, 0), v[0].repeat_interleave(group, 0)
        if self.policy.name == "dense":
            out = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
            self._note([1.0] * len(q), [1.0] * len(q), ["dense"] * len(q))
            return out[None]
        block, gamma = self.policy.block, self.policy.gamma
        seen = estimate(q, k, block)
        kinds = self._decide(layer, seen)
        out = torch.empty_like(q)
        pivots = [h for h, kind in enumerate(kinds) if kind == "pivot"]
        if pivots:
            out[pivots], mass = dense_with_mass(q[pivots], k[pivots], v[pivots], block)
            self._keep_pivots(layer, pivots, pick(seen, pivots), mass)
        patterns = vertical_slash(seen, gamma, block)
        for h, kind in enumerate(kinds):
            if kind == "shared":
                pivot = self.pivots[self.clusters[layer, h]]
                if pivot.worth_sharing:
                    patterns[h] = shared_pattern(pivot.pattern, pick(seen, [h]), gamma)[0]
                else:
                    kinds[h] = "vertical_slash"
        others = [h for h in range(len(q)) if h not in pivots]
        if others:
            out[others] = attend_chosen(q[others], k[others], v[others], patterns[others], block)
        cost, recall = density(patterns), torch.ones(len(q))
        cost[pivots] = 1
        if self.policy.with_recall:
            recall = mass_inside(dense_with_mass(q, k, v, block)[1], patterns)
            recall[pivots] = 1
        self._note(cost.tolist(), recall.tolist(), kinds)
        return out[None]

    def _decide(self, layer: int, seen: Estimate) -> list[str]:
        kinds, ahead = [], {name: pivot.blocks for name, pivot in self.pivots.items()}
        for head, here in enumerate(seen.blocks):
            cluster = self.clusters.get((layer, head)) if self.policy.name == "share" else None
            if cluster is None:
                kinds.append("vertical_slash")
            elif cluster not in ahead:
                ahead[cluster] = here
                kinds.append("pivot")
            else:
                near = js_distance(here, ahead[cluster]) < self.policy.tau
                kinds.append("shared" if near else "vertical_slash")
        return kinds

    def _keep_pivots(self, layer: int, heads: list[int], seen: Estimate, mass: Tensor) -> None:
        patterns = pivot_pattern(mass, self.policy.gamma)
        rivals = vertical_slash_of_cost(seen, patterns.sum((1, 2)), self.policy.block)
        covered = mass_inside(mass, rivals) >= self.policy.coverage
        for head, pattern, blocks, is_covered in zip(heads, patterns, seen.blocks, covered.tolist()):
            self.pivots[self.clusters[layer, head]] = Pivot(pattern, blocks, not is_covered)

    def _note(self, density: list[float], recall: list[float], kinds: list[str]) -> None:
        self.trace.density += density
        self.trace.recall += recall
        self.trace.kinds += kinds


@torch.no_grad()
def answers_right(model: Decoder, example: tasks.Example, prefill: Prefill) -> bool:
    """Tells whether every byte of the answer is the likeliest one. The prompt runs under the policy, and the answer
    decodes densely over its keys and values, as in a decode worker.
    """
    device = model.embedding.device
    prompt, answer = tasks.encode(example.prompt), list(example.answer)
    hidden = model(torch.tensor([prompt], device=device), prefill)[0, -1:]

    def decode(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        past_k, past_v = prefill.cache[layer]
        k, v = torch.cat((past_k, k), 2), torch.cat((past_v, v), 2)
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=device).tril(k.shape[2] - q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    rest = model(torch.tensor([answer[:-1]], device=device), decode, first_position=len(prompt))[0]
    return model.logits(torch.cat((hidden, rest))).argmax(-1).tolist() == answer


def read_clusters(path: Path) -> dict[tuple[int, int], str]:
    """Reads (layer, head) -> cluster, for shared clusters only."""
    data = json.loads(path.read_text())
    return {(layer, head): name for name in data["shared_clusters"] for layer, head in data["clusters"][name]}
