"""The servers behind the gateway: which of them are up, how long their queues are, and whose turn it is.

Each is asked once a second by a task of its own, and soon after a call that it failed. It is up while it answers that
it serves, which a draining server does not. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Collection, Sequence

import grpc

from prefilld import wire
from prefilld.aio import AsyncDecodeClient, AsyncPrefillClient
from prefilld.errors import PrefilldError
from prefilld.gateway.routing import Choice, Route, Router
from prefilld.prefixes import BLOCK_TOKENS, CachedBlocks

logger = logging.getLogger("prefilld.gateway")

POLL_SECONDS = 1.0
PATIENCE_SECONDS = 2.0  # for which a prompt waits when no server is up
FOLLOW_SECONDS = 5.0  # until a server that stopped telling its cache's contents is asked again
PROBE_SECONDS = 3.0  # until a probe has failed
# A server is asked again so soon after it failed a call; one that fails its calls but answers, later each time, up to
# POLL_SECONDS.
_SOON_SECONDS = 0.01
_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


class Peer:
    """A server that is asked again and again. `reason` says why it is not up."""

    kind: str

    def __init__(self, client: AsyncPrefillClient | AsyncDecodeClient, address: str):
        self.client = client
        self.address = address
        self.is_up = False
        self.reason = "not asked yet"
        self._failures = 0  # how often a call failed while it was up, since one succeeded
        self._wake = asyncio.Event()

    async def watch(self) -> None:
        """Asks until the task is cancelled."""
        while True:
            try:
                if not await self.client.is_serving(timeout=PROBE_SECONDS):
                    raise PrefilldError(grpc.StatusCode.UNAVAILABLE, "it is draining, or not ready yet")
                await self._ask()
            except Exception as error:  # of any kind: whoever stops asking would never know that the server is back
                self._down(str(error))
                self._was_away()
            else:
                self._up()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), POLL_SECONDS)
                await asyncio.sleep(min(POLL_SECONDS, _SOON_SECONDS * 2 ** min(self._failures, 10)))
            self._wake.clear()

    def note_success(self) -> None:
        self._failures = 0

    def note_failure(self, error: PrefilldError) -> None:
        """Leaves the server out until it answers again, if the failure was one of the server and not of the request."""
        if error.code is grpc.StatusCode.UNAVAILABLE and self.is_up:
            self._failures += 1
            self._down(str(error))
            self._wake.set()

    async def _ask(self) -> None:
        """Asks for more than whether the server serves. Raises PrefilldError."""

    def _was_away(self) -> None:
        """Forgets what a server that comes back may have lost."""

    def _up(self) -> None:
        if not self.is_up:
            logger.info("%s %s is up", self.kind, self.address)
        self.is_up, self.reason = True, ""

    def _down(self, reason: str) -> None:
        if self.is_up or reason != self.reason:
            logger.warning("%s %s is left out: %s", self.kind, self.address, reason)
        self.is_up, self.reason = False, reason


class Prefilld(Peer):
    """A prefilld, and the route to it. info: its last ServerInfo, or None."""

    kind = "prefilld"

    def __init__(
        self,
        client: AsyncPrefillClient,
        address: str,
        most_blocks: int,
        metadata: Sequence[tuple[str, str]] = (),
    ):
        """most_blocks: how many are remembered. metadata: goes with the calls that ask for more than its state."""
        super().__init__(client, address)
        self._metadata = metadata
        self.route = Route(address)
        self.info = None
        self._most_blocks = most_blocks
        self._group: PrefillGroup | None = None

    def join(self, group: PrefillGroup) -> None:
        self._group = group

    async def _ask(self) -> None:
        asked = self.route.begin_poll()
        self.info = await self.client.server_info(timeout=PROBE_SECONDS)
        self.route.note_load(asked, self.info.queued_tokens, self.info.queued_requests + self.info.running_requests)
        self.route.memory.resize(min(self._most_blocks, blocks_in_cache(self.info)))
        self._group.check_model(self)

    async def follow_cache(self) -> None:
        """Follows what the server's prefix cache holds, as long as it says so, until the task is cancelled."""
        while True:
            if self.is_up and self.info.HasField("prefix_cache"):
                try:
                    await self._follow()
                except PrefilldError:  # it does not tell, which is its default, or it is away
                    pass
                except Exception:  # of any kind: whoever stops following would never know the cache again
                    logger.exception("%s %s: what its cache holds cannot be followed", self.kind, self.address)
                self.route.told = ()
            await asyncio.sleep(FOLLOW_SECONDS)

    async def _follow(self) -> None:
        """Raises PrefilldError when the server ends the call, or does not take it."""
        picture = CachedBlocks()
        async with self.client.watch_prefix_cache(metadata=self._metadata) as updates:
            async for update in updates:
                picture.apply(update)
                for change in update.changes:
                    if not change.HasField("stored"):
                        self.route.memory.forget(change.removed)
                self.route.told = picture.blocks

    def _up(self) -> None:
        super()._up()
        self.route.is_up = True

    def _down(self, reason: str) -> None:
        super()._down(reason)
        self.route.is_up = False

    def _was_away(self) -> None:
        self.route.memory.clear()


def blocks_in_cache(info) -> int:
    """Returns how many blocks of prompts the prefix cache of a server holds."""
    if not info.HasField("prefix_cache"):
        return 0
    element = _BYTES.get(wire.enum_name("DType", info.native_dtype), 2)
    block = 2 * info.num_layers * info.num_kv_heads * info.head_dim * BLOCK_TOKENS * element
    return info.prefix_cache.capacity_bytes // max(1, block)


class Group:
    """All servers of one kind."""

    def __init__(self, members: Sequence[Peer]):
        self.members = list(members)

    async def wait_for_one(self, left_out: Collection[Peer]) -> None:
        """Waits a little for a server that is up, those left out aside, so that a short outage fails no prompt."""
        end = time.monotonic() + PATIENCE_SECONDS
        candidates = [m for m in self.members if m not in left_out]
        while candidates and not any(m.is_up for m in candidates) and time.monotonic() < end:
            await asyncio.sleep(0.02)


class PrefillGroup(Group):
    """All prefilld. They run one model: a server with another fingerprint than the others is left out."""

    def __init__(self, members: Sequence[Prefilld]):
        super().__init__(members)
        self._router = Router([m.route for m in self.members])
        self._member_of = {m.route: m for m in self.members}
        self.fingerprint = ""
        for member in self.members:
            member.join(self)

    @property
    def info(self):
        """The ServerInfo of a server that is up, or None."""
        return next((m.info for m in self.members if m.is_up), None)

    def check_model(self, member: Prefilld) -> None:
        """Raises PrefilldError where servers that are up run another model; else this one's is the model."""
        others = [m for m in self.members if m.is_up and m is not member]
        if others and member.info.model_fingerprint != self.fingerprint:
            raise PrefilldError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"it runs model_fingerprint {member.info.model_fingerprint}, the others {self.fingerprint}",
            )
        self.fingerprint = member.info.model_fingerprint

    def choose(
        self, num_tokens: int, keys: Sequence[bytes], left_out: Collection[Peer] = ()
    ) -> tuple[Prefilld, Choice]:
        choice = self._router.choose(num_tokens, keys, [m.route for m in self.members if m in left_out])
        if choice is None:
            raise nobody("prefilld", self.members)
        return self._member_of[choice.route], choice


class DecodeWorker(Peer):
    """A decode worker. running: requests that this gateway has there."""

    kind = "decode worker"

    def __init__(self, client: AsyncDecodeClient, address: str):
        super().__init__(client, address)
        self.running = 0


class DecodeGroup(Group):
    """All decode workers. The one with the fewest requests of this gateway has the next, of equal ones in turn."""

    def __init__(self, members: Sequence[DecodeWorker]):
        super().__init__(members)
        self._turn = 0

    def choose(self, left_out: Collection[Peer] = ()) -> DecodeWorker:
        self._turn += 1
        first = self._turn % max(1, len(self.members))
        candidates = [m for m in self.members[first:] + self.members[:first] if m.is_up and m not in left_out]
        if not candidates:
            raise nobody("decode worker", self.members)
        return min(candidates, key=lambda worker: worker.running)


def nobody(kind: str, members: Sequence[Peer]) -> PrefilldError:
    """Returns the error that says why each of the servers is left out."""
    why = "; ".join(f"{m.address}: {m.reason or 'it refused this request'}" for m in members) or "none is configured"
    return PrefilldError(grpc.StatusCode.UNAVAILABLE, f"no {kind} can take the request ({why})")
