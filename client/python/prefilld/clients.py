"""PrefillClient and DecodeClient. Both are safe to use from several threads, one stream per thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import grpc
import numpy as np

from prefilld import wire
from prefilld.options import Attention, Layout, Sampling
from prefilld.transfer import KvBlocks, TransferCheck, TransferError, block_shape, check_layout, element_type

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),  # a KV frame is 1 to 4 MiB, one large block can be more
    ("grpc.max_send_message_length", 64 << 20),  # a million token ids are 5 MiB
    ("grpc.http2.lookahead_bytes", 8 << 20),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.http2.max_pings_without_data", 0),  # we send nothing during a long prefill
    ("grpc.use_local_subchannel_pool", 1),
    # A server that was away is called again within about 2 s of its return, not after up to 2 minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # the time of an attempt that nobody answers, in truth
    ("grpc.dns_min_time_between_resolutions_ms", 2_000),
    ("grpc.lb_policy_name", "round_robin"),  # where an address stands for several servers
)


def retry_after(error: grpc.RpcError) -> float | None:
    """Returns after how many seconds the server asks to come back (RESOURCE_EXHAUSTED), or None when it does not say.
    """
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for detail in wire.RpcStatus.FromString(value).details:
                if detail.type_url.endswith("/google.rpc.RetryInfo"):
                    delay = wire.RetryInfo.FromString(detail.value).retry_delay
                    return delay.seconds + delay.nanos / 1e9
    return None


class _Client:
    _service: str

    def __init__(
        self,
        address: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        use_proxy: bool = False,
        options: Sequence[tuple[str, object]] = (),
    ):
        """Connects lazily: a server that is not there fails the first call with UNAVAILABLE.

        address: host:port, or "unix:/path" on the same machine. Several servers of one model take
        the calls in turn: "ipv4:10.0.0.1:50051,10.0.0.2:50051", or a name with several addresses.
        credentials: grpc.ssl_channel_credentials(...) for TLS, None for plain text. use_proxy: go
        through the proxy that grpc_proxy, https_proxy or http_proxy names; otherwise they are
        ignored. options: more gRPC channel arguments.
        """
        arguments = (*_CHANNEL_OPTIONS, ("grpc.enable_http_proxy", int(use_proxy)), *options)
        if credentials is None:
            self._channel = grpc.insecure_channel(address, arguments)
        else:
            self._channel = grpc.secure_channel(address, credentials, arguments)
        self._stub = wire.Stub(self._channel, self._service)

    def close(self) -> None:
        """Ends every call still running."""
        self._channel.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class _Stream:
    """A response stream. Leaving its `with` block, or close(), cancels what is not finished."""

    def __init__(self, call):
        self._call = call

    def close(self) -> None:
        self._call.cancel()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class PrefillStream(_Stream):
    """Iterates over KvBlocks as the server computes them, layer by layer.

    request_id, layout, queue_position, priority: known at once (layout: the KvLayout message;
    priority: the class that the request has, which may be lower than what it asked for).
    result: the PrefillResult message, once the iteration has ended; None before.
    """

    def __init__(self, call, accepted, prompt_logprobs: bool, on_progress: Callable | None):
        super().__init__(call)
        self.request_id: str = accepted.request_id
        self.queue_position: int = accepted.queue_position
        self.layout = accepted.layout
        self.priority: int = accepted.priority
        self.result = None
        self._on_progress = on_progress
        self._check = TransferCheck(accepted.layout, prompt_logprobs)
        self._blocks = self._receive()

    def __iter__(self) -> Iterator[KvBlocks]:
        return self._blocks

    def __next__(self) -> KvBlocks:
        return next(self._blocks)

    def read_all(self) -> np.ndarray:
        """Reads the whole cache: [num_layers, 2 (K, V), num_blocks, *block_shape(layout)], writable.

        num_blocks counts from layout.first_block. With block order NHD and all blocks, `.reshape(layers, 2, -1, heads,
        head_dim)[:, :, :num_tokens]` is the cache by token.
        """
        first, layout = self.layout.first_block, self.layout
        shape = (layout.num_layers, 2, layout.num_blocks - first, *block_shape(layout))
        cache = np.empty(shape, element_type(layout))
        for blocks in self:
            place = slice(blocks.first_block - first, blocks.first_block - first + len(blocks.keys))
            cache[blocks.layer, 0, place] = blocks.keys
            cache[blocks.layer, 1, place] = blocks.values
        return cache

    def _receive(self) -> Iterator[KvBlocks]:
        try:
            for event in self._call:
                kind = event.WhichOneof("event")
                if kind == "kv_frame":
                    yield self._check.take(event.kv_frame)
                elif kind == "progress" and self._on_progress:
                    self._on_progress(event.progress)
                elif kind == "result":
                    self._check.finish(event.result)
                    self.result = event.result
        except TransferError:
            self.close()
            raise
        if self.result is None:
            raise TransferError(grpc.StatusCode.DATA_LOSS, "the stream ended without a result")


class PrefillClient(_Client):
    """The client of a prefilld server. Frames come on one lane; the C++ client has several."""

    _service = "PrefillService"

    def server_info(self, timeout: float = 10):
        """Returns the ServerInfo message: model, fingerprint, limits, policies, load."""
        return self._stub.GetServerInfo(wire.GetServerInfoRequest(), timeout=timeout)

    def prefill(
        self,
        tokens: Sequence[int],
        *,
        layout: Layout = Layout(),
        attention: Attention = Attention(),
        sampling: Sampling = Sampling(),
        request_id: str = "",
        model_fingerprint: str = "",
        layer_stats: bool = False,
        prompt_logprobs: bool = False,
        bypass_prefix_cache: bool = False,
        cache_salt: str = "",
        priority: int = 0,
        metadata: Sequence[tuple[str, str]] = (),
        timeout: float | None = None,
        on_progress: Callable | None = None,
    ) -> PrefillStream:
        """Runs one prompt; returns once the server has accepted it.

        With prompt_logprobs, result.prompt_logprobs[i] is the natural log-probability of tokens[i + 1]
        and result.best_logprobs[i] that of the likeliest token there: equal where the prompt goes on
        as greedy decoding would have. On a GPU they come from logits rounded to bf16, so that several
        tokens may count as the likeliest. The result, and with it the first token, comes after that
        pass, which takes result.logprobs_us. numpy.array(result.prompt_logprobs) copies them at once.

        If the server has a prefix cache, a prompt that begins as an earlier one did computes the rest
        alone; result.cached_tokens counts what was cached. Prompts share prefixes with those of an
        equal cache_salt alone. With bypass_prefix_cache the cache is neither asked nor filled.

        priority, -7 to 7: requests of higher classes go first, as far as the server's operator lets
        you (PrefillStream.priority). metadata goes with the call; servers that tell tenants apart look
        there: ("authorization", "Bearer TOKEN"), or ("x-tenant", "search") where they trust you.

        on_progress(Progress) is called after each layer and while the request waits, from within
        the iteration. Raises grpc.RpcError with the server's status, which PrefillService in
        prefill.proto lists, and TransferError when the server breaks its promise; both here and
        while iterating.
        """
        request = wire.PrefillRequest(
            request_id=request_id,
            model_fingerprint=model_fingerprint,
            token_ids=tokens,
            layout=layout.to_wire(),
            attention=attention.to_wire(),
            sampling=sampling.to_wire(),
            num_lanes=1,
            layer_stats=layer_stats,
            prompt_logprobs=prompt_logprobs,
            prefix_cache=wire.PrefixCacheOptions(bypass=bypass_prefix_cache, salt=cache_salt),
            priority=priority,
        )
        call = self._stub.Prefill(request, timeout=timeout, metadata=tuple(metadata))
        first = next(call, None)
        if first is None or first.WhichOneof("event") != "accepted":
            call.cancel()
            raise TransferError(grpc.StatusCode.DATA_LOSS, "the stream does not begin with Accepted")
        try:
            check_layout(first.accepted.layout, request.layout, len(tokens), model_fingerprint)
        except TransferError:
            call.cancel()
            raise
        return PrefillStream(call, first.accepted, prompt_logprobs, on_progress)


@dataclass(frozen=True)
class Token:
    """A generated token. top_logprobs: (token id, natural log-probability), most likely first."""

    id: int
    index: int
    logprob: float
    top_logprobs: list[tuple[int, float]] = field(default_factory=list)


class GenerateStream(_Stream):
    """Iterates over Token as they are generated; result is the GenerateResult message after the last."""

    def __init__(self, call, on_progress: Callable | None):
        super().__init__(call)
        self.result = None
        self._on_progress = on_progress
        self._tokens = self._receive()

    def __iter__(self) -> Iterator[Token]:
        return self._tokens

    def __next__(self) -> Token:
        return next(self._tokens)

    def _receive(self) -> Iterator[Token]:
        for event in self._call:
            kind = event.WhichOneof("event")
            if kind == "token":
                token = event.token.token
                top = [(t.token_id, t.logprob) for t in token.top_logprobs]
                yield Token(token.token_id, event.token.index, token.logprob, top)
            elif kind == "progress" and self._on_progress:
                self._on_progress(event.progress)
            elif kind == "result":
                self.result = event.result
        if self.result is None:
            raise TransferError(grpc.StatusCode.DATA_LOSS, "the stream ended without a result")


class DecodeClient(_Client):
    """The client of a decode worker, which has the prompt prefilled by a prefilld and generates."""

    _service = "DecodeService"

    def generate(
        self,
        tokens: Sequence[int],
        max_new_tokens: int,
        *,
        attention: Attention = Attention(),
        sampling: Sampling = Sampling(),
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        request_id: str = "",
        priority: int = 0,
        timeout: float | None = None,
        on_progress: Callable | None = None,
    ) -> GenerateStream:
        """Starts one generation. on_progress(PrefillProgress) is called while the prompt is prefilled.

        priority is that of the prefill, as in PrefillClient.prefill.

        Iterating raises grpc.RpcError: RESOURCE_EXHAUSTED when the worker lacks KV blocks,
        otherwise what prefilld answered (see PrefillService in prefill.proto).
        """
        request = wire.GenerateRequest(
            request_id=request_id,
            token_ids=tokens,
            max_new_tokens=max_new_tokens,
            sampling=sampling.to_wire(),
            attention=attention.to_wire(),
            stop_token_ids=stop_token_ids,
            ignore_eos=ignore_eos,
            priority=priority,
        )
        return GenerateStream(self._stub.Generate(request, timeout=timeout), on_progress)
