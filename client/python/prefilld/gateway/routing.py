"""Chooses the prefilld for a prompt. Nothing here reads a network or a clock.

The rule: the prompt goes where the fewest tokens stand between it and its first token. For each server that is up,

    cost = tokens waiting in its queue + tokens of this prompt that it would have to compute

The queue is what GetServerInfo said when it was last asked, plus what this gateway has sent since and does not know to
be done. Tokens to compute are those behind the prefix that the server should have in its prefix cache: for each server
the gateway remembers the blocks of the prompts that it took (prefilld.prefix_keys, which tell tenants and salts apart:
nobody is routed by the prompts of others). So a conversation stays with its server until the queue
there is longer than what its cache saves, and then goes elsewhere, where it is remembered too. A prompt that was
refused is not remembered. Of equal costs the server with the fewest requests is taken, and of those the next in turn.

The memory of each server is bounded by what its cache can hold, and by the gateway's own limit. Blocks that were not
sent for the longest time are forgotten first, of one prompt the last block first, as a prefix is worth nothing without
its beginning. A server that was away is taken to have lost its cache. Where a server tells what its cache holds
(WatchPrefixCache), blocks that others sent there count as well, and blocks that it dropped are forgotten. A block
counts whatever policy computed it, because the gateway does not know which one will run.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from prefilld.prefixes import BLOCK_TOKENS


class PrefixMemory:
    """The keys of the blocks that one server should have, at most `capacity` of them."""

    def __init__(self, capacity: int = 0):
        self._capacity = capacity
        self._keys: dict[bytes, None] = {}  # in the order in which they were last sent

    def __len__(self) -> int:
        return len(self._keys)

    def resize(self, capacity: int) -> None:
        self._capacity = capacity
        self._shrink()

    def clear(self) -> None:
        self._keys.clear()

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def forget(self, key: bytes) -> None:
        self._keys.pop(key, None)

    def remember(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys[: self._capacity]):  # the first block is to be forgotten last
            self._keys.pop(key, None)
            self._keys[key] = None
        self._shrink()

    def _shrink(self) -> None:
        while len(self._keys) > self._capacity:
            del self._keys[next(iter(self._keys))]


class Route:
    """One prefilld as the choice sees it."""

    def __init__(self, address: str):
        self.address = address
        self.is_up = False
        self.memory = PrefixMemory()
        self.told: Collection[bytes] = ()  # keys of the blocks that are in its cache, where the server says so
        self._sent: dict[int, int] = {}  # tokens of prompts that the server's last answer cannot have counted
        self._next = 0
        self._queued_tokens = 0
        self._requests = 0

    @property
    def queue(self) -> int:
        return self._queued_tokens + sum(self._sent.values())

    @property
    def requests(self) -> int:
        return self._requests + len(self._sent)

    def cached_blocks(self, keys: Sequence[bytes]) -> int:
        """Returns how many blocks at the beginning of a prompt should be in the server's cache."""
        for i, key in enumerate(keys):
            if key not in self.memory and key not in self.told:
                return i
        return len(keys)

    def note_sent(self, tokens: int) -> int:
        """Counts a prompt of which the server has to compute so many tokens. Returns its number, for note_done()."""
        self._sent[self._next] = tokens
        self._next += 1
        return self._next - 1

    def note_done(self, number: int) -> None:
        """Says that a prompt has been computed, or given up."""
        self._sent.pop(number, None)

    def begin_poll(self) -> int:
        """Returns what note_load() needs to tell prompts sent before the question from those sent after it."""
        return self._next

    def note_load(self, asked: int, queued_tokens: int, requests: int) -> None:
        self._queued_tokens, self._requests = queued_tokens, requests
        self._sent = {number: tokens for number, tokens in self._sent.items() if number >= asked}


@dataclass(frozen=True)
class Choice:
    """route: where the prompt goes. cached_tokens: those at its beginning that should be in that server's cache."""

    route: Route
    cached_tokens: int


class Router:
    """Chooses among routes, which others keep up to date. Belongs to one thread."""

    def __init__(self, routes: Sequence[Route]):
        self._routes = list(routes)
        self._turn = 0

    def choose(self, num_tokens: int, keys: Sequence[bytes], left_out: Collection[Route] = ()) -> Choice | None:
        """Returns None if no server is up, those left out aside.

        The caller says note_sent() once it sends the prompt, and memory.remember() once the server has taken it.

        num_tokens: of the prompt; 0 if nobody knows, and the shortest queue is taken. keys: of its whole blocks.
        """
        best, best_cost = None, None
        for i in range(len(self._routes)):
            route = self._routes[(self._turn + i) % len(self._routes)]
            if not route.is_up or route in left_out:
                continue
            cached = min(route.cached_blocks(keys) * BLOCK_TOKENS, max(0, num_tokens - 1))
            cost = (route.queue + num_tokens - cached, route.requests)
            if best_cost is None or cost < best_cost:
                best, best_cost = Choice(route, cached), cost
        self._turn += 1
        return best
