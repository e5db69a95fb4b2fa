"""The worker's side: receives KV and writes it into vLLM's cache. Nothing here needs vLLM."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import grpc
import torch

from prefilld.arrays import to_torch
from prefilld.clients import PrefillClient, PrefillStream
from prefilld.errors import Cancelled, PrefilldError, TransferError
from prefilld.options import Attention, Layout
from prefilld.transfer import KvBlocks
from prefilld.vllm.config import ConnectorConfig, Load, SharedPrefill
from prefilld.vllm.connections import Connections

logger = logging.getLogger("vllm.prefilld")

_Code = grpc.StatusCode
# Statuses of shared prefills that may pass: rank 0 has not come yet, or its broken call is still known by the id.
_NOT_YET = {_Code.NOT_FOUND, _Code.ALREADY_EXISTS}
# The server is away, or goes: all ranks see that, so that all of them go on to the next.
_AWAY = {_Code.UNAVAILABLE, _Code.ABORTED}
_PAUSE_SECONDS = 0.5  # before another try, unless the server names a time
_LONGEST_PAUSE_SECONDS = 60.0  # that prefilld names


@dataclass(frozen=True)
class CacheShape:
    """The part of the model's KV cache that one worker has.

    block_tokens: tokens of one of vLLM's blocks. first_head, num_heads: the range of KV heads.
    write: write(layer, keys, values, slots) stores [tokens, num_heads, head_dim], on the CPU, at slots, which are
    block id * block_tokens + position. rank, num_ranks: which of how many tensor-parallel workers this is.
    order: that of a block which holds K and V together, as prefilld.Layout names it; None: only `write` knows how the
    cache is kept. memory: memory(layer) is then [blocks, elements of a block], the cache itself.
    """

    num_layers: int
    first_head: int
    num_heads: int
    head_dim: int
    block_tokens: int
    dtype: str  # as prefilld.Layout names it
    device: torch.device
    write: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]
    rank: int = 0
    num_ranks: int = 1
    order: str | None = None
    memory: Callable[[int], torch.Tensor] | None = None

    def wire_block_tokens(self) -> int:
        """Returns the largest block of prefilld of which vLLM's is a multiple."""
        for size in (128, 64, 32, 16):
            if self.block_tokens % size == 0:
                return size
        raise ValueError(f"vLLM's block_size is {self.block_tokens}; it must be a multiple of 16")

    def takes_blocks(self) -> bool:
        """Tells whether a block from the wire is a piece of the cache's memory."""
        # The tokens of a part of a block lie together only where they are the outer axis.
        return self.order == "nh2d" or (self.order == "hn2d" and self.wire_block_tokens() == self.block_tokens)


class _Running:
    """One load under way."""

    def __init__(self, load: Load, fence):
        self.load = load
        self.fence = fence
        self.ended = threading.Event()  # the request is gone
        self.stream: PrefillStream | None = None
        self.was_accepted = False  # by a server, in any try
        self.was_known = False  # the last try found that the server still knew this rank


class Loader:
    """Runs loads, each in a thread of its own. Thread-safe.

    A load that fails is told by the blocks that it should have filled; nothing is raised.
    """

    def __init__(self, config: ConnectorConfig, shape: CacheShape):
        self._config = config
        self._shape = shape
        self._connections = Connections(config.credentials())
        self._unit = shape.wire_block_tokens()
        self._order = shape.order if shape.takes_blocks() else "nhd"
        self._threads = ThreadPoolExecutor(config.max_loads, thread_name_prefix="prefilld-load")
        self._lock = threading.Lock()  # of all below
        self._running: dict[str, _Running] = {}
        self._finished: set[str] = set()
        self._bad_blocks: set[int] = set()
        self._counts: Counter = Counter()

    def start(self, loads: list[Load]) -> None:
        """Starts loads. Waits for those that are not asynchronous."""
        fence = None
        if loads and self._shape.device.type == "cuda":
            fence = torch.cuda.Event()  # the blocks may still be written by what was launched before
            fence.record()
        awaited: list[Future] = []
        for load in loads:
            running = _Running(load, fence)
            with self._lock:
                self._running[load.request_id] = running
            future = self._threads.submit(self._run, running)
            if not load.is_async:
                awaited.append(future)
        wait(awaited)

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Ends the loads of requests that are gone. They are reported as finished all the same."""
        with self._lock:
            gone = [self._running[i] for i in request_ids if i in self._running]
        for running in gone:
            running.ended.set()
            if running.stream is not None:
                running.stream.cancel()

    def take_finished(self) -> set[str]:
        """Returns the asynchronous loads that ended since the last call, however they ended."""
        with self._lock:
            finished, self._finished = self._finished, set()
        return finished

    def take_bad_blocks(self) -> set[int]:
        """Returns the blocks of loads that failed. Asked after take_finished(), it knows those of all it returned."""
        with self._lock:
            bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def take_counts(self) -> dict[str, float]:
        """Returns what was counted since the last call: loads by outcome, tokens, bytes and seconds."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return dict(counts)

    def close(self) -> None:
        with self._lock:
            ids = list(self._running)
        self.cancel(ids)
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._connections.close()

    def _run(self, running: _Running) -> None:
        load, begin = running.load, time.monotonic()
        counts: dict[str, float] = {}
        bad: list[int] = []
        try:
            counts = self._load_with_retries(running)
            counts["loads_ok"] = 1
        except Cancelled:
            counts["loads_cancelled"] = 1
        except Exception as error:  # nothing that happens here may end the engine
            bad = load.blocks_to_fill(self._shape.block_tokens)
            counts["loads_failed"] = 1
            reason = f"{error}; {error.advice}" if isinstance(error, PrefilldError) else repr(error)
            logger.warning(
                "prefilld: tokens %d to %d of request %s were not loaded from %s after %.2f s: %s",
                load.first_token, load.end_token, load.request_id, load.address or ", ".join(self._config.addresses),
                time.monotonic() - begin, reason.replace("\n", " "),
            )  # fmt: skip
        counts["load_seconds"] = time.monotonic() - begin
        with self._lock:
            self._running.pop(load.request_id, None)
            self._counts.update(counts)
            if not running.ended.is_set():
                self._bad_blocks.update(bad)
            if load.is_async:
                self._finished.add(load.request_id)

    def _load_with_retries(self, running: _Running) -> dict[str, float]:
        begin = time.monotonic()
        deadline = begin + self._config.timeout_s
        retries = self._config.retries if running.load.is_async else 0
        tries_left = 1 + retries
        meet_until = begin + retries * _LONGEST_PAUSE_SECONDS
        shared = running.load.shared
        while True:
            if running.ended.is_set():  # it may have waited long for a thread
                raise Cancelled()
            tries_left -= 1
            try:
                return self._load(running, deadline, shared)
            except PrefilldError as error:
                pause = _PAUSE_SECONDS if error.retry_after is None else error.retry_after
                is_alone = shared is not None and self._is_left_alone(running, error)
                is_early = shared is not None and not is_alone and self._is_early(running, error, meet_until)
                running.was_known = error.code is _Code.ALREADY_EXISTS
                if is_alone:
                    shared, pause = None, 0.0
                if is_alone or is_early:
                    tries_left += 1  # it has computed nothing, and is no try
                may_pass = error.retryable or is_alone or (shared is not None and error.code in _NOT_YET)
                if not may_pass or not tries_left or time.monotonic() + pause > deadline:
                    raise
                if shared is not None and error.code in _AWAY:
                    shared = shared.at_next_address()
                logger.info("prefilld: request %s is tried again in %.1f s: %s", running.load.request_id, pause, error)
                if running.ended.wait(pause):
                    raise Cancelled() from None

    def _is_left_alone(self, running: _Running, error: PrefilldError) -> bool:
        """Tells whether the others go on without this rank, so that it has to ask for a prefill of its own.

        A shared prefill that fails as a whole is asked for again by rank 0, under the same id, and the others attach
        again. A rank that lost its stream alone finds that the others are done, or that it had attached, and the latter
        twice: a server may need a moment to notice that all have lost theirs. One that was never accepted does not ask
        for itself: rank 0 may have been refused, and each rank would ask once more.
        """
        if self._shape.rank == 0:
            return False
        if error.code is _Code.UNIMPLEMENTED:
            return True
        if error.code is _Code.ALREADY_EXISTS:
            return running.was_accepted and running.was_known
        return running.was_accepted and error.code is _Code.NOT_FOUND

    def _is_early(self, running: _Running, error: PrefilldError, meet_until: float) -> bool:
        """Tells whether this rank may have come before rank 0 has asked, or asked again.

        A server waits 10 s for rank 0, which may have been told to come back later than that.
        """
        if self._shape.rank == 0:
            return False
        if running.was_accepted:
            return error.code is _Code.ALREADY_EXISTS
        return error.code is _Code.NOT_FOUND and time.monotonic() < meet_until

    def _submit(
        self, client: PrefillClient, load: Load, shared: SharedPrefill | None, timeout: float
    ) -> PrefillStream:
        shape = self._shape
        layout = Layout(
            block_tokens=self._unit,
            order=self._order,
            dtype=shape.dtype,
            first_head=shape.first_head,
            num_heads=shape.num_heads,
            first_block=load.first_token // self._unit,
        )
        common = dict(
            layout=layout,
            lanes=self._config.lanes,
            model_fingerprint=self._config.model_fingerprint,
            metadata=tuple(self._config.metadata.items()),
            resumable=self._config.resumable,
            timeout=timeout,
        )
        if shared is not None and shape.rank > 0:
            return client.attach_receiver(shared.request_id, shared.key, shape.rank, len(load.tokens), **common)
        if shared is not None:
            common.update(request_id=shared.request_id, receivers=shape.num_ranks, receiver_key=shared.key)
        return client.submit(
            load.tokens,
            attention=Attention(**load.attention),
            cache_salt=load.cache_salt,
            priority=load.priority,
            **common,
        )

    def _load(self, running: _Running, deadline: float, shared: SharedPrefill | None) -> dict[str, float]:
        load = running.load
        own = self._config.addresses if load.address is None else (load.address,)
        with self._connections.client(own if shared is None else shared.addresses[:1]) as client:
            with self._submit(client, load, shared, max(0.001, deadline - time.monotonic())) as stream:
                running.stream = stream
                if running.ended.is_set():  # it was cancelled before it had a stream
                    raise Cancelled()
                stream.wait_accepted()
                running.was_accepted = True
                self._check_model(stream.layout)
                self._receive(running, stream)
        result = stream.result
        logger.info(
            "prefilld: tokens %d to %d of request %s loaded, %.1f MB; there: %d ms computing, %d ms queued, %d tokens cached",
            load.first_token, load.end_token, load.request_id, result.kv_bytes / 1e6, result.compute_us // 1000,
            result.queue_us // 1000, result.cached_tokens,
        )  # fmt: skip
        return {"loaded_tokens": load.end_token - load.first_token, "loaded_bytes": result.kv_bytes}

    def _check_model(self, layout) -> None:
        for name in ("num_layers", "head_dim"):
            theirs, ours = getattr(layout, name), getattr(self._shape, name)
            if theirs != ours:
                raise TransferError(
                    grpc.StatusCode.FAILED_PRECONDITION, f"{name} of the server's model is {theirs}, of vLLM's {ours}"
                )

    @torch.inference_mode()
    def _receive(self, running: _Running, stream: PrefillStream) -> None:
        load, shape = running.load, self._shape
        positions = torch.arange(load.end_token)
        blocks_of = torch.tensor(load.block_ids, dtype=torch.int64)[positions // shape.block_tokens]
        slots = (blocks_of * shape.block_tokens + positions % shape.block_tokens).to(shape.device)
        on_gpu = shape.device.type == "cuda"
        side = torch.cuda.Stream(shape.device) if on_gpu else None
        with torch.cuda.stream(side) if on_gpu else contextlib.nullcontext():
            if on_gpu:
                side.wait_event(running.fence)
            try:
                for blocks in stream:
                    self._store(running, blocks, slots)
            finally:
                if on_gpu:  # vLLM may give the blocks to another request once this returns, however it does
                    side.synchronize()

    def _store(self, running: _Running, blocks: KvBlocks, slots: torch.Tensor) -> None:
        load, shape = running.load, self._shape
        begin = blocks.first_block * self._unit
        first = max(begin, load.first_token)  # both are at the same block, unless vLLM changes its mind
        end = min(begin + len(blocks.keys) * self._unit, load.end_token)
        if first >= end or running.ended.is_set():
            return
        if shape.takes_blocks() and first == begin:
            return self._copy_blocks(load, blocks)
        keys, values = (_by_token(t, self._order)[first - begin : end - begin] for t in blocks.torch())
        shape.write(blocks.layer, keys, values, slots[first:end])

    def _copy_blocks(self, load: Load, blocks: KvBlocks) -> None:
        """Copies whole blocks into the cache, neighbours at once. The last block's tokens past the prompt become zero."""
        parts = self._shape.block_tokens // self._unit  # of the cache's block
        rows = to_torch(blocks.array).flatten(1)
        cache = self._shape.memory(blocks.layer).view(-1, rows.shape[1])
        numbers = range(blocks.first_block, blocks.first_block + len(rows))
        places = [load.block_ids[number // parts] * parts + number % parts for number in numbers]
        start = 0
        for end in range(1, len(places) + 1):
            if end == len(places) or places[end] != places[end - 1] + 1:
                cache[places[start] : places[end - 1] + 1].copy_(rows[start:end])
                start = end


def _by_token(blocks: torch.Tensor, order: str) -> torch.Tensor:
    """Returns [tokens, num_heads, head_dim] of blocks in this order: nhd, nh2d or hn2d."""
    return (blocks.transpose(1, 2) if order == "hn2d" else blocks).flatten(0, 1)
