"""Tests the loader of the vLLM connector, which needs no vLLM, beside a prefilld that the test plays.

Exits with 77 (skipped, for CTest) without torch or the client's packages.
"""

import sys
import threading
import time
import unittest
import unittest.mock
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "client" / "python"), str(ROOT / "tests" / "python")]
try:
    import grpc
    import torch
    from played_server import LAYERS, PATIENCE, PlayedServer, cache_of, refusing, serving, silent
    from prefilld import wire
    from prefilld.vllm.config import ConnectorConfig, Load, SharedPrefill
    from prefilld.vllm.connections import Connections
    from prefilld.vllm.loader import CacheShape, Loader
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)

BLOCK = 32  # tokens of an engine's block


class Cache:
    """An engine's cache: num_blocks blocks of BLOCK tokens, by slot. Slots that nobody wrote are -1."""

    def __init__(self, num_heads=2, num_layers=LAYERS, blocks=16):
        self.kv = torch.full((num_layers, 2, blocks * BLOCK, num_heads, 4), -1.0)

    def write(self, layer, keys, values, slots):
        self.kv[layer, 0, slots] = keys
        self.kv[layer, 1, slots] = values

    def shape(self, first_head=0, **fields):
        made = dict(
            num_layers=self.kv.shape[0], first_head=first_head, num_heads=self.kv.shape[3], head_dim=4,
            block_tokens=BLOCK, dtype="fp32", device=torch.device("cpu"), write=self.write,
        )  # fmt: skip
        return CacheShape(**{**made, **fields})


def without_resume_key(request):
    """Returns the request but for its secret, which is another one with each call."""
    made = type(request)()
    made.CopyFrom(request)
    made.ClearField("resume_key")
    return made


class Loading(unittest.TestCase):
    def loader(self, cache, first_head=0, shape=None, **config):
        made = Loader(ConnectorConfig(**{"retries": 0, **config}), shape or cache.shape(first_head))
        self.addCleanup(made.close)
        return made

    def load(self, address, first=0, end=100, is_async=True, request_id="r", **fields):
        return Load(request_id, list(range(100)), [9, 3, 12, 5], first, end, is_async, address, **fields)

    def finished(self, loader, request_id="r"):
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if done := loader.take_finished():
                self.assertEqual(done, {request_id})
                return
            time.sleep(0.01)
        self.fail("the load did not finish")

    def check(self, cache, first, end, heads=slice(None)):
        slots = [[9, 3, 12, 5][t // BLOCK] * BLOCK + t % BLOCK for t in range(first, end)]
        expected = torch.from_numpy(cache_of(100).copy())[:, :, first:end, heads]
        self.assertTrue(torch.equal(cache.kv[:, :, slots], expected))
        cache.kv[:, :, slots] = -1
        self.assertTrue((cache.kv == -1).all(), "a slot was written that nobody asked for")

    def test_tokens_come_to_their_slots_and_nowhere_else(self):
        for first, end, is_async in ((0, 100, True), (64, 100, True), (32, 99, False)):
            cache = Cache()
            with PlayedServer(serving) as server:
                loader = self.loader(cache)
                loader.start([self.load(server.address, first, end, is_async)])
                if is_async:
                    self.finished(loader)
                self.assertEqual(server.requests[0].layout.first_block, first // BLOCK)
                self.assertEqual(server.requests[0].layout.block_tokens, BLOCK)
            self.check(cache, first, end)
            self.assertEqual((loader.take_finished(), loader.take_bad_blocks()), (set(), set()))
            counts = loader.take_counts()
            self.assertEqual((counts["loads_ok"], counts["loaded_tokens"]), (1, end - first))
            self.assertEqual(loader.take_counts(), {})

    def test_blocks_are_copied_where_the_cache_has_an_order_of_the_wire(self):
        # A block of 32 tokens is one of the wire, one of 48 tokens has three, and of 48 in hn2d none is a piece.
        for order, block, copied in (("nh2d", 32, True), ("hn2d", 32, True), ("nh2d", 48, True), ("hn2d", 48, False)):
            axes = (16, block, 2, 2, 4) if order == "nh2d" else (16, 2, block, 2, 4)
            memory = torch.full((LAYERS, *axes), -1.0)
            by_token = memory if order == "nh2d" else memory.transpose(2, 3)  # [layers, blocks, tokens, heads, 2, 4]
            written = []

            def write(layer, keys, values, slots, by_token=by_token, written=written, block=block):
                written.append(len(slots))
                by_token[layer, slots // block, slots % block, :, 0] = keys
                by_token[layer, slots // block, slots % block, :, 1] = values

            for first in (0, 96):
                memory.fill_(-1)
                shape = Cache().shape(
                    block_tokens=block, order=order, write=write,
                    memory=lambda layer, memory=memory: memory[layer].view(16, -1),
                )  # fmt: skip
                self.assertEqual(shape.takes_blocks(), copied)
                with PlayedServer(serving) as server:
                    loader = self.loader(None, shape=shape)
                    loader.start([self.load(server.address, first)])
                    self.finished(loader)
                self.assertEqual(loader.take_counts().get("loads_ok"), 1)
                slots = torch.tensor([[9, 3, 12, 5][t // block] * block + t % block for t in range(first, 100)])
                found = by_token[:, slots // block, slots % block].permute(0, 3, 1, 2, 4)
                self.assertTrue(torch.equal(found, torch.from_numpy(cache_of(100).copy())[:, :, first:]))
                self.assertEqual(bool(written), not copied)
                # Behind the prompt a whole block of the wire is filled up with zeros.
                by_token[:, slots // block, slots % block] = -1
                self.assertTrue(torch.isin(memory, torch.tensor([-1.0, 0.0])).all())
                self.assertEqual(int((memory == 0).sum()), (28 if block == 32 else 12) * LAYERS * 16 if copied else 0)

    def test_a_block_that_is_loaded_in_part_is_written_by_the_backend(self):
        memory, written = torch.full((LAYERS, 16, BLOCK, 2, 2, 4), -1.0), []
        shape = Cache().shape(
            order="nh2d", memory=lambda layer: memory[layer].view(16, -1),
            write=lambda layer, keys, values, slots: written.append((layer, slots.tolist())),
        )  # fmt: skip
        with PlayedServer(serving) as server:
            loader = self.loader(None, shape=shape)
            loader.start([self.load(server.address, first=40)])
            self.finished(loader)
        slots = [[9, 3, 12, 5][t // BLOCK] * BLOCK + t % BLOCK for t in range(40, 100)]
        self.assertEqual(written, [(layer, slots) for layer in range(LAYERS)])
        self.assertTrue((memory == -1).all())

    @unittest.skipUnless(torch.cuda.is_available(), "no GPU")
    def test_tokens_come_to_their_slots_on_a_gpu(self):
        """The cache has the order of FlashAttention's in vLLM, [block][token][head][K and V], written by its own loop."""
        cache = Cache()
        memory = torch.full((LAYERS, 16, BLOCK, 2, 8), -1.0, device="cuda")

        def write(layer, keys, values, slots):
            self.assertNotEqual(torch.cuda.current_stream(), torch.cuda.default_stream())
            keys_cache, values_cache = memory[layer].view(-1, 2, 8).split(4, -1)
            keys_cache[slots], values_cache[slots] = keys.to("cuda"), values.to("cuda")

        for first in (0, 64):
            with PlayedServer(serving) as server:
                loader = self.loader(cache, shape=cache.shape(device=memory.device, write=write))
                memory.fill_(-1)  # on the engine's stream: what the load writes must come after it
                loader.start([self.load(server.address, first)])
                self.finished(loader)
            cache.kv = torch.stack(memory.view(LAYERS, -1, 2, 8).cpu().split(4, -1), 1).contiguous()
            self.check(cache, first, 100)
            self.assertEqual(loader.take_bad_blocks(), set())

    def test_a_rank_has_its_own_heads(self):
        for rank in (0, 1):
            cache = Cache(num_heads=1)
            with PlayedServer(serving) as server:
                loader = self.loader(cache, first_head=rank)
                loader.start([self.load(server.address)])
                self.finished(loader)
            self.check(cache, 0, 100, slice(rank, rank + 1))

    def test_ranks_share_one_computation(self):
        with PlayedServer(serving) as server:
            shared = SharedPrefill((server.address, "127.0.0.1:1"), "id", "k" * 64)
            load = self.load("127.0.0.1:1", shared=shared)
            for rank in (0, 1):
                cache = Cache(num_heads=1)
                loader = self.loader(cache, shape=cache.shape(rank, rank=rank, num_ranks=2), lanes=1)
                loader.start([load])
                self.finished(loader)
                self.check(cache, 0, 100, slice(rank, rank + 1))
            first, second = server.requests
        self.assertEqual((first.request_id, first.num_receivers, first.receiver_key), (shared.request_id, 2, shared.key))
        self.assertIsInstance(second, wire.AttachReceiverRequest)
        self.assertEqual((second.request_id, second.receiver_key), (shared.request_id, shared.key))
        self.assertEqual((second.receiver, second.num_tokens), (1, 100))
        self.assertIsNone(self.load(server.address).shared)

    def share(self, script, rank, works, retries=1, others=()):
        """Runs one rank's share of a load. Returns the requests at the server."""
        cache = Cache(num_heads=1)
        with PlayedServer(script) as server:
            loader = self.loader(cache, shape=cache.shape(rank, rank=rank, num_ranks=2), retries=retries)
            shared = SharedPrefill((server.address, *others), "id", "k" * 64)
            loader.start([self.load(server.address, shared=shared)])
            self.finished(loader)
        self.assertEqual(loader.take_bad_blocks(), set() if works else {9, 3, 12, 5})
        if works:
            self.check(cache, 0, 100, slice(rank, rank + 1))
        return server.requests

    def test_a_shared_prefill_that_was_refused_is_asked_for_once_more_and_not_by_each_rank(self):
        for code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED,
                     grpc.StatusCode.ALREADY_EXISTS):  # fmt: skip

            def once(server, context, code=code):
                if len(server.requests) == 1:
                    context.abort(code, "not now")
                yield from serving(server, context)

            for rank, kind in ((0, wire.PrefillRequest), (1, wire.AttachReceiverRequest)):
                with self.subTest(code=code, rank=rank):
                    requests = self.share(once, rank, works=True)
                    self.assertEqual([type(request) for request in requests], [kind] * 2)
                    self.assertEqual(*map(without_resume_key, requests))
                    if rank == 0:
                        self.assertEqual((requests[1].request_id, requests[1].num_receivers), ("id", 2))

    def test_a_rank_that_never_found_the_shared_prefill_does_not_ask_for_itself(self):
        nothing = refusing(grpc.StatusCode.NOT_FOUND, "no such request came within 10s")
        patience = unittest.mock.patch("prefilld.vllm.loader._LONGEST_PAUSE_SECONDS", 0.0)
        with patience, self.assertLogs("vllm.prefilld", "WARNING"):
            requests = self.share(nothing, 1, works=False, retries=2)
        self.assertEqual([type(request) for request in requests], [wire.AttachReceiverRequest] * 3)

    def test_a_rank_waits_for_one_that_was_told_to_come_back_later(self):
        def late(server, context):
            if len(server.requests) < 4:
                context.abort(grpc.StatusCode.NOT_FOUND, "no such request came within 10s")
            yield from serving(server, context)

        requests = self.share(late, 1, works=True, retries=1)
        self.assertEqual([type(request) for request in requests], [wire.AttachReceiverRequest] * 4)

    def test_a_rank_that_is_still_known_after_a_break_for_all_attaches_again(self):
        def broken(server, context):
            if len(server.requests) == 2:
                context.abort(grpc.StatusCode.ALREADY_EXISTS, "the receiver has attached")
            for i, event in enumerate(serving(server, context)):
                if i == 2 and len(server.requests) == 1:
                    context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
                yield event

        requests = self.share(broken, 1, works=True, retries=1)
        self.assertEqual([type(request) for request in requests], [wire.AttachReceiverRequest] * 3)

    def test_a_rank_that_lost_its_stream_alone_asks_for_itself(self):
        for code, times in ((grpc.StatusCode.NOT_FOUND, 1), (grpc.StatusCode.ALREADY_EXISTS, 2)):

            def cut(server, context, code=code, times=times):
                if 2 <= len(server.requests) < 2 + times:
                    context.abort(code, "the others go on")
                for i, event in enumerate(serving(server, context)):
                    if i == 2 and len(server.requests) == 1:
                        context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
                    yield event

            attached, *again, own = map(without_resume_key, self.share(cut, 1, works=True))
            self.assertEqual(again, [attached] * times)
            self.assertEqual((type(own), own.num_receivers), (wire.PrefillRequest, 1))
            self.assertNotEqual(own.request_id, attached.request_id)

    def test_a_rank_at_a_server_without_further_receivers_asks_for_itself(self):
        def old(server, context):
            if isinstance(server.requests[-1], wire.AttachReceiverRequest):
                context.abort(grpc.StatusCode.UNIMPLEMENTED, "unknown")
            yield from serving(server, context)

        attached, own = self.share(old, 1, works=True, retries=0)
        self.assertEqual(own.num_receivers, 1)
        self.assertNotEqual(own.request_id, attached.request_id)

    def test_all_ranks_go_on_to_the_same_server_when_one_is_away(self):
        for rank in (0, 1):
            cache = Cache(num_heads=1)
            with PlayedServer(serving) as server:
                loader = self.loader(cache, shape=cache.shape(rank, rank=rank, num_ranks=2), retries=1)
                shared = SharedPrefill(("127.0.0.1:1", server.address), "id", "k" * 64)
                loader.start([self.load(None, shared=shared)])
                self.finished(loader)
                self.assertEqual([request.request_id for request in server.requests], ["id"])
            self.check(cache, 0, 100, slice(rank, rank + 1))

    def test_clients_that_nobody_uses_are_bounded(self):
        connections = Connections(None, kept=2)
        self.addCleanup(connections.close)
        with connections.client(("in use:1",)) as busy:
            idle = []
            for i in range(20):
                with connections.client((f"host-{i}:1",)) as client:
                    idle.append(client)
            self.assertEqual(len(connections._clients), 3)
            with connections.client(("host-18:1",)) as client:
                self.assertIs(client, idle[18])  # it was kept
            with connections.client(("host-3:1",)) as client:
                self.assertIsNot(client, idle[3])
            with connections.client(("host-18:1",)) as client:
                self.assertIs(client, idle[18])  # asked for after host-19
            with connections.client(("in use:1",)) as client:
                self.assertIs(client, busy)
        self.assertEqual(len(connections._clients), 2)

    def test_a_client_is_not_closed_while_a_load_uses_it(self):
        with PlayedServer(serving) as server:
            connections = Connections(None, kept=0)
            with connections.client((server.address,)) as client:
                with connections.client((server.address,)):
                    pass
                with client.prefill(list(range(100))) as stream:
                    self.assertEqual(len(list(stream)), LAYERS)
            self.assertEqual(len(connections._clients), 0)
            with self.assertRaises(ValueError):  # gRPC's, of a closed channel
                client.prefill(list(range(100)))

    def test_loads_are_resumable_unless_the_operator_says_otherwise(self):
        for config, is_resumable in (({}, True), ({"resumable": True}, True), ({"resumable": False}, False)):
            for rank in (0, 1):
                cache = Cache(num_heads=1)
                with self.subTest(config, rank=rank), PlayedServer(serving) as server:
                    loader = self.loader(cache, shape=cache.shape(rank, rank=rank, num_ranks=2), **config)
                    loader.start([self.load(server.address, shared=SharedPrefill((server.address,), "id", "k" * 64))])
                    self.finished(loader)
                    self.assertEqual(bool(server.requests[0].resume_key), is_resumable)
                    self.assertEqual(loader.take_bad_blocks(), set())  # of a server that grants no resumption, too

    def test_options_go_with_the_request(self):
        with PlayedServer(serving) as server:
            loader = self.loader(Cache(), prefill_address=server.address, model_fingerprint="f", metadata={"x-tenant": "a"})
            load = self.load(None, attention={"policy": "share", "gamma": 0.5}, priority=-2, cache_salt="s")
            loader.start([load])
            self.finished(loader)
            (sent,) = server.requests
        self.assertEqual((sent.model_fingerprint, sent.priority, sent.prefix_cache.salt), ("f", -2, "s"))
        self.assertEqual(sent.attention.policy, wire.enum_value("AttentionPolicy", "share"))
        self.assertEqual(loader.take_counts().get("loads_failed"), 1)  # the played server has another fingerprint

    def test_a_failed_load_is_told_by_its_blocks(self):
        def midway(server, context):
            for _, event in zip(range(3), serving(server, context)):
                yield event
            context.abort(grpc.StatusCode.UNAVAILABLE, "device lost")

        wrong_model = dict(num_layers=LAYERS + 1)
        for script, shape, text in (
            (refusing(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full"), {}, "queue is full.*ask again"),
            (midway, {}, "device lost"),
            (serving, wrong_model, f"num_layers of the server's model is {LAYERS}, of vLLM's {LAYERS + 1}"),
        ):
            for is_async in (True, False):
                cache = Cache()
                with PlayedServer(script) as server, self.assertLogs("vllm.prefilld", "WARNING") as logs:
                    loader = self.loader(cache, shape=cache.shape(**shape))
                    loader.start([self.load(server.address, 40, 100 if is_async else 99, is_async)])
                    if is_async:
                        self.finished(loader)
                    self.assertEqual(loader.take_bad_blocks(), {3, 12, 5})
                    self.assertEqual(loader.take_counts()["loads_failed"], 1)
                self.assertRegex(logs.output[0], text)

    def test_a_mistake_in_the_options_fails_the_load_alone(self):
        loader = self.loader(Cache())
        with self.assertLogs("vllm.prefilld", "WARNING") as logs:
            loader.start([self.load("127.0.0.1:1", attention={"gama": 1})])
            self.finished(loader)
        self.assertEqual(loader.take_bad_blocks(), {9, 3, 12, 5})
        self.assertIn("gama", logs.output[0])

    def test_a_failure_that_may_pass_is_tried_again(self):
        def once(server, context):
            if len(server.requests) == 1:
                context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
            yield from serving(server, context)

        for is_async, works in ((True, True), (False, False)):
            cache = Cache()
            with PlayedServer(once) as server:
                loader = self.loader(cache, retries=1)
                loader.start([self.load(server.address, is_async=is_async)])
                if is_async:
                    self.finished(loader)
            self.assertEqual(loader.take_bad_blocks(), set() if works else {9, 3, 12, 5})
            if works:
                self.check(cache, 0, 100)
        with PlayedServer(refusing(grpc.StatusCode.INVALID_ARGUMENT, "no")) as server:
            loader = self.loader(Cache(), retries=5)
            loader.start([self.load(server.address)])
            self.finished(loader)
            self.assertEqual(len(server.requests), 1)

    def test_an_aborted_request_ends_its_load(self):
        with PlayedServer(silent) as server:
            loader = self.loader(Cache(), max_loads=1)
            loader.start([self.load(server.address), self.load(server.address, request_id="waits for a thread")])
            while not server.requests:
                time.sleep(0.01)
            loader.cancel(["waits for a thread", "unknown"])
            loader.cancel(["r"])
            self.assertTrue(server.ended.acquire(timeout=PATIENCE))
            done, deadline = set(), time.monotonic() + PATIENCE
            while len(done) < 2 and time.monotonic() < deadline:
                done |= loader.take_finished()
                time.sleep(0.01)
            self.assertEqual(done, {"r", "waits for a thread"})
            self.assertEqual(len(server.requests), 1)
        self.assertEqual((loader.take_bad_blocks(), loader.take_counts()["loads_cancelled"]), (set(), 2))

    def test_a_timeout_ends_a_load(self):
        with PlayedServer(silent) as server:
            loader = self.loader(Cache(), timeout_s=0.5)
            loader.start([self.load(server.address, is_async=False)])
            self.assertEqual(loader.take_bad_blocks(), {9, 3, 12, 5})

    def test_closing_waits_for_no_load(self):
        with PlayedServer(silent) as server:
            loader = self.loader(Cache())
            loader.start([self.load(server.address)])
            while not server.requests:
                time.sleep(0.01)
            closing = threading.Thread(target=loader.close)
            closing.start()
            closing.join(PATIENCE)
            self.assertFalse(closing.is_alive())

    def test_blocks_that_prefilld_has_not_are_refused(self):
        for tokens, unit in ((16, 16), (48, 16), (544, 32), (1024, 128)):
            self.assertEqual(Cache().shape(block_tokens=tokens).wire_block_tokens(), unit)
        with self.assertRaisesRegex(ValueError, "block_size is 8"):
            Cache().shape(block_tokens=8).wire_block_tokens()


if __name__ == "__main__":
    unittest.main()
