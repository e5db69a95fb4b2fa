"""One prompt through a prefilld and a decode worker, with another try where a server fails before the first token.

    1  gateway -- Generate(prompt, transfer id) --> decode worker, which reserves room for the cache and says its layout
    2  gateway -- Prefill(prompt, deliver_to) --> prefilld, which pushes the cache to the worker, layer by layer
    3  gateway <-- tokens -- decode worker

Ending the iteration at any time ends both calls, and with them what they hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import grpc

from prefilld.aio import AsyncGenerateStream, AsyncPrefillStream
from prefilld.errors import PrefilldError, data_loss
from prefilld.gateway.peers import DecodeGroup, DecodeWorker, Peer, Prefilld, PrefillGroup
from prefilld.options import Attention, Delivery, Layout, Sampling
from prefilld.tokens import Token

_Code = grpc.StatusCode
# Another try may succeed where one failed so.
_TRY_AGAIN = {_Code.UNAVAILABLE, _Code.RESOURCE_EXHAUSTED, _Code.ABORTED, _Code.DATA_LOSS}
# A broken push ends both calls, and the one of prefilld tells the reason; it is waited for so long.
_REASON_SECONDS = 1.0


@dataclass(frozen=True)
class Prompt:
    """A prompt as the servers take it. keys: prefix_keys() of it. id: names it in the logs of all servers."""

    id: str
    tokens: Sequence[int]
    keys: Sequence[bytes]
    cache_salt: str
    max_new_tokens: int
    sampling: Sampling
    stop_token_ids: Sequence[int]
    ignore_eos: bool


@dataclass(frozen=True)
class Upstream:
    """Where prompts go, and what all of their calls have in common.

    tries: how often a prompt is given to a pair of servers, at most.
    count_choice(address, num_tokens, cached_tokens) is told each choice.
    """

    prefills: PrefillGroup
    workers: DecodeGroup
    attention: Attention
    metadata: tuple[tuple[str, str], ...]
    tries: int
    count_choice: Callable[[str, int, int], None]


class Generation:
    """Iterates over the tokens of one answer.

    result: the GenerateResult message, once the iteration has ended by itself.
    cached_tokens: of the prompt, as prefilld says; None before it has said so.
    """

    def __init__(self, upstream: Upstream, prompt: Prompt, deadline: float):
        """deadline: of time.monotonic()."""
        self._upstream = upstream
        self._prompt = prompt
        self._deadline = deadline
        self._push: AsyncPrefillStream | None = None
        self.result = None

    @property
    def cached_tokens(self) -> int | None:
        if self.result is not None:
            return self.result.prefill.cached_tokens
        done = self._push.result if self._push is not None else None
        return None if done is None else done.cached_tokens

    async def tokens(self) -> AsyncGenerator[Token, None]:
        """Raises PrefilldError. To be closed (contextlib.aclosing) by whoever stops before its end."""
        left_out: list[Peer] = []
        error: PrefilldError | None = None
        for number in range(1, self._upstream.tries + 1):
            try:
                await self._upstream.workers.wait_for_one(left_out)
                await self._upstream.prefills.wait_for_one(left_out)
                worker = self._upstream.workers.choose(left_out)
                server, choice = self._upstream.prefills.choose(len(self._prompt.tokens), self._prompt.keys, left_out)
            except PrefilldError:
                if error is None:
                    raise
                raise error from None  # what a server said tells more than that no other is left
            sent = server.route.note_sent(len(self._prompt.tokens) - choice.cached_tokens)
            self._upstream.count_choice(server.address, len(self._prompt.tokens), choice.cached_tokens)
            has_begun = False
            try:
                async with contextlib.aclosing(self._try(number, worker, server)) as tokens:
                    async for token in tokens:
                        has_begun = True
                        server.route.note_done(sent)
                        yield token
                return
            except _PeerError as failure:
                error = failure.error
                failure.peer.note_failure(error)
                if has_begun or error.code not in _TRY_AGAIN:
                    raise error from None
                if failure.peer.is_up:  # one that is down may have the prompt as soon as it answers again
                    left_out.append(failure.peer)
            finally:
                server.route.note_done(sent)
        raise error

    async def _try(self, number: int, worker: DecodeWorker, server: Prefilld) -> AsyncGenerator[Token, None]:
        """Raises _PeerError."""
        name = self._prompt.id if number == 1 else f"{self._prompt.id}-{number}"
        worker.running += 1
        try:
            async with self._generate(worker, name) as answer:
                with _blaming(worker):
                    started = await answer.wait_started()
                async with self._prefill(server, worker, name, started) as push:
                    self._push = push
                    async with contextlib.aclosing(self._read(answer, worker, push, server)) as tokens:
                        async for token in tokens:
                            yield token
                self.result = answer.result
        finally:
            worker.running -= 1

    def _generate(self, worker: DecodeWorker, name: str) -> AsyncGenerateStream:
        return worker.client.generate(
            self._prompt.tokens,
            self._prompt.max_new_tokens,
            sampling=self._prompt.sampling,
            stop_token_ids=self._prompt.stop_token_ids,
            ignore_eos=self._prompt.ignore_eos,
            request_id=name,
            pushed_transfer_id=name,
            timeout=self._left(),
        )

    def _prefill(self, server: Prefilld, worker: DecodeWorker, name: str, started) -> AsyncPrefillStream:
        return server.client.submit(
            self._prompt.tokens,
            layout=Layout.from_wire(started.kv_layout),
            attention=self._upstream.attention,
            sampling=self._prompt.sampling,
            deliver_to=Delivery(worker.address, name),
            request_id=name,
            model_fingerprint=started.model_fingerprint,
            cache_salt=self._prompt.cache_salt,
            metadata=self._upstream.metadata,
            timeout=self._left(),
        )

    def _left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    async def _read(
        self, answer: AsyncGenerateStream, worker: DecodeWorker, push: AsyncPrefillStream, server: Prefilld
    ) -> AsyncGenerator[Token, None]:
        """Yields tokens. Until the first one comes, a failed push ends the wait for it."""
        items = aiter(answer)
        first = asyncio.ensure_future(_first(items))
        pushing = asyncio.ensure_future(self._finish(push, server))
        try:
            await asyncio.wait({first, pushing}, return_when=asyncio.FIRST_COMPLETED)
            if first.done() and first.exception() is not None:
                await asyncio.wait({pushing}, timeout=_REASON_SECONDS)
            if pushing.done() and (error := pushing.exception()) is not None:
                # The status of a receiver has its address before its message.
                raise _PeerError(worker if error.details.startswith(worker.address) else server, error)
            with _blaming(worker):
                token = await first
                server.note_success()
                worker.note_success()
                yield token
                async for token in items:
                    yield token
        finally:
            for task in (first, pushing):
                task.cancel()
            await asyncio.gather(first, pushing, return_exceptions=True)

    async def _finish(self, push: AsyncPrefillStream, server: Prefilld) -> None:
        """Waits for the end of a push; it brings no blocks, and raises PrefilldError if it fails."""
        await push.wait_accepted()
        server.route.memory.remember(self._prompt.keys)
        async for _ in push:
            pass


async def _first(items: AsyncIterator[Token]) -> Token:
    async for token in items:
        return token
    raise data_loss("the answer ended without a token")


class _PeerError(Exception):
    """A call failed, and which server is to blame."""

    def __init__(self, peer: Peer, error: PrefilldError):
        super().__init__(peer, error)
        self.peer = peer
        self.error = error


@contextlib.contextmanager
def _blaming(peer: Peer):
    try:
        yield
    except PrefilldError as error:
        raise _PeerError(peer, error) from error
