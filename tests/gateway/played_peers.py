"""Prefilld and decode workers that a test plays, in its event loop, as far as the gateway calls them.

A prompt's first token is its number. It chooses the answer, which is text_of(number), and what fails: `faults` has the
name of a fault for a number. The faults stand at the methods that play them.
"""

from __future__ import annotations

import asyncio
from collections import Counter

import grpc
import grpc.aio
from played_server import layout
from prefilld import wire

FINGERPRINT = "played"
BLOCK_TOKENS = 16


def text_of(number: int) -> str:
    return f"answer {number} größer."


class PlayedPeers:
    """All servers of one test. running: calls that have not ended."""

    def __init__(self):
        self.faults: dict[int, str] = {}
        self.running = Counter()
        self.prefills: list = []  # the requests, and the metadata that came with each
        self._tries = Counter()
        self._pushed: dict[str, asyncio.Event] = {}
        self._servers: list[grpc.aio.Server] = []

    async def start(self, service: str) -> str:
        """Starts one more server, and returns its address."""
        server = grpc.aio.server()
        port = server.add_insecure_port("127.0.0.1:0")
        address = f"127.0.0.1:{port}"
        health = grpc.unary_unary_rpc_method_handler(self._health)  # bytes in, bytes out
        server.add_generic_rpc_handlers((
            grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": health}),
            grpc.method_handlers_generic_handler(f"prefill.v1.{service}", self._handlers(service, address)),
        ))  # fmt: skip
        await server.start()
        self._servers.append(server)
        return address

    async def stop(self) -> None:
        for server in self._servers:
            await server.stop(None)

    def _handlers(self, service: str, address: str) -> dict:
        def stream(method, request):
            async def counted(asked, context):
                self.running[method.__name__] += 1
                try:
                    async for event in method(asked, context, address):
                        yield event
                finally:
                    self.running[method.__name__] -= 1

            return grpc.unary_stream_rpc_method_handler(counted, request.FromString, lambda e: e.SerializeToString())

        if service == "DecodeService":
            return {"Generate": stream(self._generate, wire.GenerateRequest)}
        info = grpc.unary_unary_rpc_method_handler(
            self._info, wire.GetServerInfoRequest.FromString, lambda e: e.SerializeToString()
        )
        return {"Prefill": stream(self._prefill, wire.PrefillRequest), "GetServerInfo": info}

    async def _health(self, request, context) -> bytes:
        return b"\x08\x01"  # SERVING

    async def _info(self, request, context):
        return wire.ServerInfo(
            model_fingerprint=FINGERPRINT, eos_token_ids=[257], max_prompt_tokens=1000, num_layers=1, num_kv_heads=1,
            head_dim=1, prefix_cache={"capacity_bytes": 1 << 20},
        )  # fmt: skip

    def _fault(self, number: int, where: str) -> str:
        """Returns the fault that a call is to have. One whose name ends in "once" hits the first try alone."""
        fault = self.faults.get(number, "")
        if not fault.startswith(where):
            return ""
        self._tries[number] += 1
        return fault if self._tries[number] == 1 or not fault.endswith("once") else ""

    async def _prefill(self, request, context, address):
        self.prefills.append((request, dict(context.invocation_metadata())))
        fault = self._fault(request.token_ids[0], "prefilld")
        if fault.startswith("prefilld is full"):
            await refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", retry_after=7)
        if fault == "prefilld goes away once":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is draining")
        if fault.startswith("prefilld is silent"):
            await asyncio.sleep(3600)
        tokens = len(request.token_ids)
        shape = layout(num_tokens=tokens, num_blocks=-(-tokens // BLOCK_TOKENS), block_tokens=BLOCK_TOKENS,
                       model_fingerprint=FINGERPRINT)  # fmt: skip
        yield wire.PrefillEvent(accepted=wire.Accepted(request_id="a", layout=shape, num_lanes=1))
        if fault == "prefilld breaks off once":
            await context.abort(grpc.StatusCode.ABORTED, "the transfer broke")
        if fault == "prefilld fails inside":
            await context.abort(grpc.StatusCode.INTERNAL, "a kernel failed")
        self._pushed[request.deliver_to.transfer_id].set()
        yield wire.PrefillEvent(result=wire.PrefillResult(num_tokens=tokens, cached_tokens=5))

    async def _generate(self, request, context, address):
        number, name = request.token_ids[0], request.pushed_transfer_id
        fault = self._fault(number, "worker")
        if fault == "worker is full once":
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no blocks are free")
        if fault == "worker refuses the request":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "max_new_tokens is 99, allowed: 1 to 9")
        self._pushed[name] = asyncio.Event()
        try:
            shape = wire.KvLayoutRequest(
                order=wire.enum_value("KvOrder", "nhd"), dtype=wire.enum_value("DType", "fp32"),
                block_tokens=BLOCK_TOKENS,
            )  # fmt: skip
            yield wire.GenerateEvent(started={"kv_layout": shape, "model_fingerprint": FINGERPRINT})
            await self._pushed[name].wait()
        finally:
            del self._pushed[name]
        if fault == "worker goes away before a token once":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        answer = [*text_of(number).encode(), 257]
        if number == 0:  # an answer without an end
            answer = (65 for _ in range(request.max_new_tokens))
        index = -1
        for index, token in enumerate(answer):
            if fault == "worker goes away midway" and index == 4:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
            yield wire.GenerateEvent(token={"token": {"token_id": token}, "index": index})
        result = {"num_tokens": index + 1, "finish_reason": 1, "prefill": {"cached_tokens": 5}}
        yield wire.GenerateEvent(result=result)


async def refuse(context, code: grpc.StatusCode, details: str, retry_after: int) -> None:
    """Ends a call as prefilld does, with the time after which to come back."""
    status = wire.RpcStatus(code=code.value[0], message=details)
    status.details.add().Pack(wire.RetryInfo(retry_delay={"seconds": retry_after}))
    await context.abort(code, details, (("grpc-status-details-bin", status.SerializeToString()),))
