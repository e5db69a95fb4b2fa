"""Tests the parts of the vLLM connector that need no vLLM, beside a prefilld that the test plays.

Exits with 77 (skipped, for CTest) without torch or the client's packages.
"""

import sys
import threading
import time
import types
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "client" / "python"), str(ROOT / "tests" / "python")]
try:
    import grpc
    import torch
    from played_server import LAYERS, PATIENCE, PlayedServer, cache_of, refusing, serving, silent
    from prefilld import wire
    from prefilld.vllm.config import ConnectorConfig, Load, Wish
    from prefilld.vllm.loader import CacheShape, Loader
    from prefilld.vllm.planner import LoadPlanner
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)

BLOCK = 32  # tokens of an engine's block


def request(prompt=100, params=None, request_id="r", **fields):
    made = dict(
        request_id=request_id, num_prompt_tokens=prompt, prompt_token_ids=list(range(prompt)), kv_transfer_params=params
    )
    return types.SimpleNamespace(**{**made, **fields})


class Configuration(unittest.TestCase):
    def test_all_mistakes_are_named_at_once(self):
        with self.assertRaises(ValueError) as caught:
            ConnectorConfig.read({"lanes": 17, "adress": "x", "timeout_s": 0, "retries": True, "tls_key": "key.pem"})
        for text in ("'adress' is unknown", "prefill_address", "lanes is 17, allowed: 1 to 16", "timeout_s is 0",
                     "retries is True", "tls_ca"):  # fmt: skip
            self.assertIn(text, str(caught.exception))

    def test_params_are_those_of_routers(self):
        config = ConnectorConfig(policy="share")
        params = {"do_remote_prefill": True, "do_remote_decode": False, "remote_engine_id": None,
                  "remote_block_ids": None, "remote_host": "10.0.0.1", "remote_port": "50051"}  # fmt: skip
        self.assertEqual(Wish.of(params, config), Wish("10.0.0.1:50051", True, {"policy": "share"}, 0))
        own = {"attention": {"policy": "dense", "gamma": 0.9}, "load_async": False, "priority": 2}
        wish = Wish.of({**params, "remote_host": "fd00::1", **own}, config)
        self.assertEqual(wish, Wish("[fd00::1]:50051", False, {"policy": "dense", "gamma": 0.9}, 2))

    def test_without_params_the_configured_server_prefills(self):
        fixed = ConnectorConfig(prefill_address="p:1", load_async=False)
        self.assertEqual(Wish.of(None, fixed), Wish(None, False, {}, 0))
        self.assertEqual(Wish.of({"do_remote_prefill": True}, fixed), Wish(None, False, {}, 0))
        self.assertIsNone(Wish.of({"do_remote_decode": True}, fixed))
        self.assertIsNone(Wish.of(None, ConnectorConfig()))

    def test_params_that_nobody_understands_are_refused(self):
        at = {"do_remote_prefill": True, "remote_host": "h", "remote_port": 1}
        for wrong in ({"remote_port": "x"}, {"remote_port": 65536}, {"remote_port": None}, {"remote_host": 7},
                      {"attention": "dense"}, {"priority": "high"}):  # fmt: skip
            with self.assertRaises(ValueError):
                Wish.of({**at, **wrong}, ConnectorConfig())
        with self.assertRaisesRegex(ValueError, "no prefill_address"):
            Wish.of({"do_remote_prefill": True}, ConnectorConfig())


class Planning(unittest.TestCase):
    AT = {"do_remote_prefill": True, "remote_host": "h", "remote_port": 1}

    def test_all_that_is_not_cached_is_loaded(self):
        planner = LoadPlanner(ConnectorConfig(prefill_address="p:1", min_prompt_tokens=20))
        asked = request()
        self.assertEqual(planner.offer(asked, 64), (36, True))
        self.assertEqual(planner.offer(asked, 32), (68, True))  # vLLM may ask again
        planner.accept(asked, [5, 6, 7, 8], 68)
        (load,), _ = planner.take()
        self.assertEqual((load.first_token, load.end_token, load.blocks_to_fill(BLOCK)), (32, 100, [6, 7, 8]))
        self.assertEqual(planner.take(), ([], set()))

    def test_a_blocking_load_leaves_the_last_token(self):
        planner = LoadPlanner(ConnectorConfig())
        asked = request(params={**self.AT, "load_async": False})
        self.assertEqual(planner.offer(asked, 0), (99, False))
        planner.accept(asked, [1, 2, 3, 4], 99)
        (load,), _ = planner.take()
        self.assertEqual((load.end_token, load.is_async), (99, False))
        self.assertEqual(planner.offer(request(1, {**self.AT, "load_async": False}, "s"), 0), (0, False))

    def test_short_prompts_stay_unless_a_router_says_otherwise(self):
        planner = LoadPlanner(ConnectorConfig(prefill_address="p:1", min_prompt_tokens=50))
        self.assertEqual(planner.offer(request(), 64), (0, False))
        self.assertEqual(planner.offer(request(), 32), (68, True))
        self.assertEqual(planner.offer(request(params=self.AT, request_id="s"), 64), (36, True))

    def test_a_prompt_is_loaded_once(self):
        planner = LoadPlanner(ConnectorConfig())
        asked = request(params=self.AT)
        planner.offer(asked, 0)
        planner.accept(asked, [1, 2, 3, 4], 100)
        planner.accept(asked, [1, 2, 3, 4], 0)  # vLLM's second call, when the load is done
        self.assertEqual(planner.offer(asked, 0), (0, False))  # after a failure
        self.assertEqual(len(planner.take()[0]), 1)

    def test_nothing_is_loaded_unless_vllm_has_room(self):
        planner = LoadPlanner(ConnectorConfig())
        asked = request(params=self.AT)
        planner.offer(asked, 0)
        planner.accept(asked, [1, 2, 3, 4], 0)
        self.assertEqual(planner.take(), ([], set()))
        self.assertEqual(planner.offer(asked, 0), (100, True))

    def test_an_end_is_told_once_and_only_of_loads(self):
        planner = LoadPlanner(ConnectorConfig())
        for request_id in ("loaded", "not"):
            asked = request(params=self.AT, request_id=request_id)
            planner.offer(asked, 0)
            planner.accept(asked, [1, 2, 3, 4], 100 if request_id == "loaded" else 0)
            planner.end(request_id)
            planner.end(request_id)
        loads, ended = planner.take()
        # A load that vLLM waits for is started and ended, so that its blocks come free.
        self.assertEqual(([load.request_id for load in loads], ended), (["loaded"], {"loaded"}))
        self.assertFalse(planner._wishes or planner._offered or planner._loaded)

    def test_only_vllm_can_prefill_some_requests(self):
        planner = LoadPlanner(ConnectorConfig())
        for i, fields in enumerate(({"lora_request": object()}, {"mm_features": [1]}, {"prompt_token_ids": None},
                                    {"pooling_params": 1}, {"kv_transfer_params": {**self.AT, "remote_port": -1}})):  # fmt: skip
            with self.assertLogs("vllm.prefilld", "WARNING"):
                self.assertEqual(planner.offer(request(**{"params": self.AT, **fields}, request_id=str(i)), 0), (0, False))

    def test_prompts_of_different_salts_share_nothing(self):
        planner = LoadPlanner(ConnectorConfig())
        salts = []
        for salt in (None, "a", "b\n" * 100):
            asked = request(params=self.AT, request_id=str(salt), cache_salt=salt)
            planner.offer(asked, 0)
            planner.accept(asked, [1, 2, 3, 4], 100)
            salts.append(planner.take()[0][0].cache_salt)
        self.assertEqual((salts[0], len(set(salts)), len(salts[2])), ("", 3, 64))


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
