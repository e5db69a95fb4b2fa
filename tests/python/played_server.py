"""A prefilld that a test plays: it answers with the events that the test wants."""

from __future__ import annotations

import queue
import threading
from concurrent import futures

import grpc
import numpy as np
import xxhash
from prefilld import wire

TOKENS = list(range(40))
LAYERS, BLOCKS = 6, 3
PATIENCE = 60  # seconds, on a machine that is busy with other things


def layout(**fields):
    made = dict(
        dtype=wire.enum_value("DType", "fp32"), order=wire.enum_value("KvOrder", "nhd"), block_tokens=16,
        num_layers=LAYERS, num_kv_heads=2, num_heads=2, head_dim=4, num_tokens=len(TOKENS), num_blocks=BLOCKS,
        keys_rotated=True,
    )  # fmt: skip
    return wire.KvLayout(**{**made, **fields})


def frame(layer, lane=0, sequence=0, checksum=None, **fields):
    values = np.arange(2 * BLOCKS * 16 * 2 * 4, dtype="<f4") + 1000 * layer
    made = dict(lane=lane, sequence=sequence, layer=layer, first_block=0, num_blocks=BLOCKS, payload=values.tobytes())
    made.update(fields)
    made["checksum"] = xxhash.xxh3_64_intdigest(made["payload"]) if checksum is None else checksum
    return wire.PrefillEvent(kv_frame=wire.KvFrame(**made))


class PlayedServer:
    """A prefilld that answers Prefill and AttachReceiver with the events that `script` yields, and each lane with its
    share of frames.
    """

    def __init__(self, script, lanes=1):
        self.script, self.lanes = script, lanes
        self.requests, self.peers, self.attached = [], set(), []
        self.resumed = 0  # streams
        self.cancelled: queue.Queue = queue.Queue()  # ids of requests
        self.ended = threading.Semaphore(0)  # a call that the client ended
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        handlers = {
            name: grpc.unary_stream_rpc_method_handler(
                handler, kind.FromString, lambda event: event.SerializeToString()
            )
            for name, handler, kind in (
                ("Prefill", self._prefill, wire.PrefillRequest),
                ("AttachReceiver", self._prefill, wire.AttachReceiverRequest),
                ("AttachLane", self._attach, wire.AttachLaneRequest),
            )
        }
        cancel = grpc.unary_unary_rpc_method_handler(
            self._cancel, wire.CancelRequest.FromString, lambda response: response.SerializeToString()
        )
        acknowledge = grpc.unary_unary_rpc_method_handler(
            lambda request, context: wire.AcknowledgeResponse(),
            wire.AcknowledgeRequest.FromString,
            lambda response: response.SerializeToString(),
        )
        resume = grpc.unary_stream_rpc_method_handler(
            self._resume, wire.ResumeRequest.FromString, lambda event: event.SerializeToString()
        )
        resumption = {"Cancel": cancel, "Acknowledge": acknowledge, "Resume": resume}
        self._server.add_generic_rpc_handlers((
            grpc.method_handlers_generic_handler("prefill.v1.PrefillService", handlers),
            grpc.method_handlers_generic_handler("prefill.v1.ResumptionService", resumption),
        ))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self):
        self._server.start()
        return self

    def __exit__(self, *_):
        self._server.stop(None)

    def accepted(self, **fields):
        made = wire.Accepted(
            request_id="a", layout=layout(**fields), num_lanes=self.lanes, lane_key="k", priority=2,
            receiver=getattr(self.requests[-1], "receiver", 0), receiver_key="secret",
        )  # fmt: skip
        return wire.PrefillEvent(accepted=made)

    def layers_of(self, lane):
        return range(lane, LAYERS, self.lanes)

    def frames(self, lane):
        for sequence, layer in enumerate(self.layers_of(lane)):
            yield frame(layer, lane, sequence)

    def result(self):
        counts = [len(self.layers_of(lane)) for lane in range(self.lanes)]
        return wire.PrefillEvent(result=wire.PrefillResult(num_tokens=len(TOKENS), frames_per_lane=counts))

    def _prefill(self, request, context):
        self.requests.append(request)
        self.peers.add(context.peer())
        context.add_callback(lambda: self.ended.release())
        yield from self.script(self, context)

    def _cancel(self, request, context):
        self.cancelled.put(request.request_id)
        return wire.CancelResponse()

    def _resume(self, request, context):
        self.resumed += 1
        yield from self.frames(request.lane)

    def _attach(self, request, context):
        self.peers.add(context.peer())
        self.attached.append((request.lane, request.lane_key, request.receiver))
        yield from self.frames(request.lane)


def accepting(server, context):
    """Accepts a request that can be resumed, and sends nothing."""
    accepted = server.accepted()
    accepted.accepted.resume_window_ms = 10_000
    yield accepted
    yield from silent(server, context)


def whole(server, context):
    yield server.accepted()
    yield wire.PrefillEvent(progress=wire.Progress(layers_computed=1))
    yield from server.frames(0)
    yield server.result()


def cache_of(num_tokens, num_heads=2):
    """Returns the KV that serving() sends: [LAYERS, 2, num_tokens, num_heads, 4], every value another."""
    return np.arange(LAYERS * 2 * num_tokens * num_heads * 4, dtype="<f4").reshape(LAYERS, 2, num_tokens, num_heads, 4)


# The axes of [2 (K, V), blocks, tokens, heads, head_dim] in each order.
_AXES = {"nhd": (0, 1, 2, 3, 4), "hnd": (0, 1, 3, 2, 4), "nh2d": (1, 2, 3, 0, 4), "hn2d": (1, 3, 2, 0, 4)}


def serving(server, context):
    """Sends cache_of() of the prompt in the layout that the request asks for, one frame a layer."""
    request = server.requests[-1]
    wished = request.layout
    num_tokens = request.num_tokens if isinstance(request, wire.AttachReceiverRequest) else len(request.token_ids)
    cache = cache_of(num_tokens)
    cache = cache[:, :, :, wished.first_head : wished.first_head + (wished.num_heads or cache.shape[3])]
    num_blocks = -(-num_tokens // wished.block_tokens)
    padded = np.zeros((*cache.shape[:2], num_blocks * wished.block_tokens, *cache.shape[3:]), cache.dtype)
    padded[:, :, :num_tokens] = cache
    yield server.accepted(
        block_tokens=wished.block_tokens, num_tokens=num_tokens, num_blocks=num_blocks, first_head=wished.first_head,
        num_heads=cache.shape[3], first_block=wished.first_block, order=wished.order,
    )  # fmt: skip
    for layer in range(LAYERS):
        count = num_blocks - wished.first_block
        tokens = padded[layer, :, wished.first_block * wished.block_tokens :]
        blocks = tokens.reshape(2, count, wished.block_tokens, *tokens.shape[2:])  # [2, blocks, tokens, heads, 4]
        payload = blocks.transpose(_AXES[wire.enum_name("KvOrder", wished.order)]).tobytes()
        yield frame(layer, 0, layer, first_block=wished.first_block, num_blocks=count, payload=payload)
    yield server.result()


def silent(server, context):
    done = threading.Event()
    context.add_callback(done.set)
    done.wait(PATIENCE)
    return iter(())


def refusing(code, details, status=None):
    def script(server, context):
        if status is not None:
            context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        context.abort(code, details)
        yield

    return script
