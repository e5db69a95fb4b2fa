"""Tests the Python client against real processes of this build.

    python3 tests/evaluation/python_client_test.py build/release/bin

Exits with 77 (skipped, for CTest) without the client's packages or the weights of model/tiny.
"""

import asyncio
import contextlib
import os
import socket
import sys
import time
import unittest
import unittest.mock
from concurrent import futures
from pathlib import Path

import contract
import live_processes

CLIENT = live_processes.ROOT / "client" / "python"
sys.path.insert(0, str(CLIENT))
SKIPPED = live_processes.reason_to_skip()
if SKIPPED:
    print(f"skipped: {SKIPPED}")
    sys.exit(77)

import asking  # noqa: E402
import grpc  # noqa: E402
import numpy as np  # noqa: E402
import prompts  # noqa: E402
import xxhash  # noqa: E402
from prefilld import (
    AsyncDecodeClient,
    AsyncPrefillClient,
    Attention,
    DecodeClient,
    Layout,
    PrefillClient,
    PrefilldError,
    Sampling,
    TransferError,
    prefix_keys,
    to_float32,
    wire,
)  # noqa: E402
from prefilld.transfer import TransferCheck  # noqa: E402

PROMPT = [256, *b"The old fisher carried a lantern to the harbour, and the harbour was quiet. " * 3]


class Options(unittest.TestCase):
    """Tests how options become messages. Their names are compared with attention.proto in contract_test.py."""

    def test_help_names_every_policy(self):
        for policy in contract.policies():
            self.assertIn(policy, Attention.__doc__)
            self.assertEqual(wire.enum_name("AttentionPolicy", Attention(policy=policy).to_wire().policy), policy)
        self.assertNotIn("{", Attention.__doc__)

    def test_every_argument_becomes_the_field_of_its_name(self):
        for name, kind in contract.thresholds().items():
            message = Attention(**{name: {float: 0.5, int: 7, bool: False}[kind]}).to_wire()
            self.assertEqual([field.name for field, _ in message.ListFields()], [name])
        self.assertEqual(Attention().to_wire().ByteSize(), 0)


class PrefixKeys(unittest.TestCase):
    def test_are_those_of_the_server(self):
        """tests/model/prefix_cache_test.cc expects the same."""
        tokens = [i * i * 1000 for i in range(256)]
        keys = prefix_keys(tokens + [1, 2], "0123456789abcdef0123456789abcdef", salt="tenant a")
        self.assertEqual(
            [key.hex() for key in keys],
            ["0f17f8fb269de7f310f1567d93bc19a5", "f620efe8c9a80cfbc67c9d24a2b2fb55"],
        )

    def test_name_whole_blocks_and_what_is_before_them(self):
        keys = prefix_keys([1] * 300, "model")
        self.assertEqual(len(keys), 2)
        self.assertNotEqual(keys[0], keys[1])
        self.assertEqual(prefix_keys([1] * 127, "model"), [])
        for other in (prefix_keys([1] * 300, "model", salt="a"), prefix_keys([1] * 300, "model", rope_tokens=300)):
            self.assertFalse(set(keys) & set(other))


class Frames(unittest.TestCase):
    """Tests TransferCheck on frames made here: 2 layers, 3 blocks of 16 tokens, 2 heads of 4."""

    def setUp(self):
        self.layout = wire.KvLayout(
            dtype=wire.enum_value("DType", "fp32"), order=wire.enum_value("KvOrder", "nhd"), block_tokens=16,
            num_layers=2, num_kv_heads=2, num_heads=2, head_dim=4, num_tokens=40, num_blocks=3, keys_rotated=True,
        )  # fmt: skip
        self.check = TransferCheck(self.layout)
        self.payload = np.arange(2 * 3 * 16 * 2 * 4, dtype="<f4").tobytes()

    def frame(self, **fields):
        made = dict(layer=0, first_block=0, num_blocks=3, sequence=0, payload=self.payload)
        made.update(fields)
        made.setdefault("checksum", xxhash.xxh3_64_intdigest(made["payload"]))
        return wire.KvFrame(**made)

    def refused(self, text, **fields):
        with self.assertRaisesRegex(TransferError, text) as caught:
            self.check.take(self.frame(**fields))
        self.assertEqual(caught.exception.code, grpc.StatusCode.DATA_LOSS)

    def test_keys_come_before_values(self):
        blocks = self.check.take(self.frame())
        self.assertEqual(blocks.keys.shape, (3, 16, 2, 4))
        self.assertEqual((blocks.keys.flat[0], blocks.values.flat[0]), (0, 384))

    def test_damage_is_seen(self):
        self.refused("checksum", payload=b"\1" + self.payload[1:], checksum=xxhash.xxh3_64_intdigest(self.payload))

    def test_frames_are_numbered_without_gaps(self):
        self.refused("frame 0 was due", sequence=1)

    def test_a_place_outside_the_layout_is_refused(self):
        self.refused("outside", layer=2)
        self.refused("outside", first_block=1)

    def test_a_short_payload_is_refused(self):
        self.refused("payload", payload=self.payload[:-4])

    def test_a_block_comes_once(self):
        self.check.take(self.frame())
        self.refused("before", sequence=1)

    def test_a_missing_layer_is_seen_at_the_end(self):
        self.check.take(self.frame())
        with self.assertRaisesRegex(TransferError, "3 blocks were never sent"):
            self.check.finish(wire.PrefillResult(frames_per_lane=[1]))
        self.check.take(self.frame(layer=1, sequence=1))
        self.check.finish(wire.PrefillResult(frames_per_lane=[2]))

    def test_a_frame_lost_at_the_end_is_seen(self):
        with self.assertRaisesRegex(TransferError, "0 frames arrived of 1 sent"):
            self.check.finish(wire.PrefillResult(frames_per_lane=[1]))


    def test_a_prompt_left_ungraded_is_seen(self):
        own, short = {"prompt_logprobs": [-1.0] * 39}, {"best_logprobs": [-1.0] * 38}
        for given in ({}, own, {**own, **short}):
            check = TransferCheck(self.layout, prompt_logprobs=True)
            check.take(self.frame())
            check.take(self.frame(layer=1, sequence=1))
            with self.assertRaisesRegex(TransferError, "39 are due"):
                check.finish(wire.PrefillResult(frames_per_lane=[2], **given))


class Grading(unittest.TestCase):
    """Tests what evaluate.py makes of a graded prompt of 20 tokens with answers at 5 to 8 and 12 to 13."""

    PROMPT = prompts.Prompt("interleaved", 20, 0, [256] * 20, spans=((5, 8), (12, 13)), text_bytes=19)

    def right(self, *unlikely):
        own = [-1.0 - (token in unlikely) for token in range(1, 20)]
        result = wire.PrefillResult(prompt_logprobs=own, best_logprobs=[-1.0] * 19)
        return asking.grade_within(self.PROMPT, result)["right"]

    def test_an_answer_is_right_when_all_its_tokens_are_likeliest(self):
        self.assertEqual(self.right(), 2)
        self.assertEqual(self.right(4, 8, 11, 13), 2)  # beside the answers
        for token in (5, 6, 7, 12):
            self.assertEqual(self.right(token), 1, token)
        self.assertEqual(self.right(5, 6, 12), 0)

    def test_every_token_of_a_text_but_the_first_counts_in_one_part(self):
        result = wire.PrefillResult(prompt_logprobs=[-float(token) for token in range(1, 20)])
        made = asking.grade_text(self.PROMPT, result)
        self.assertEqual((sum(made["part_tokens"]), sum(made["nats"])), (19, 190))
        self.assertEqual((len(made["nats"]), made["nats"][0], made["bytes"]), (8, 1 + 2 + 3, 19))


class Reconnecting(unittest.TestCase):
    """gRPC's own channel waits for up to two minutes before it looks a name up again that nobody has."""

    def opened_channels(self, library):
        real, opened = library.insecure_channel, []
        patch = unittest.mock.patch.object(library, "insecure_channel", lambda *a: opened.append(a) or real(*a))
        self.enterContext(patch)
        return opened

    def test_a_name_that_nobody_has_is_looked_up_again_by_a_new_channel(self):
        opened = self.opened_channels(grpc)
        with PrefillClient("nobody.invalid:50051") as client:
            for pause, channels in ((0, 1), (0, 1), (2.1, 2), (0, 2)):
                time.sleep(pause)
                with self.assertRaises(PrefilldError) as raised:
                    client.server_info() if channels == 1 else client.prefill(PROMPT)
                self.assertIs(raised.exception.code, grpc.StatusCode.UNAVAILABLE)
                self.assertEqual(len(opened), channels)

    def test_a_name_that_nobody_has_is_looked_up_again_by_a_new_channel_of_asyncio(self):
        opened = self.opened_channels(grpc.aio)

        async def ask():
            async with AsyncDecodeClient("nobody.invalid:50052") as client:
                for pause, channels in ((0, 1), (2.1, 2)):
                    await asyncio.sleep(pause)
                    with self.assertRaises(PrefilldError):
                        async with client.generate(PROMPT, 1) as stream:
                            await anext(aiter(stream))
                    self.assertEqual(len(opened), channels)

        asyncio.run(ask())

    def test_a_server_that_was_away_is_found_soon_after_its_return(self):
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = "127.0.0.1:%d" % free.getsockname()[1]

        def answer(client):
            with self.assertRaises(PrefilldError) as raised:
                client.server_info(timeout=1)
            return raised.exception.code

        with PrefillClient(address) as client:
            # gRPC's own pauses would have grown to 6 seconds or more by the end.
            back = time.monotonic() + 13
            while time.monotonic() < back:
                self.assertNotEqual(answer(client), grpc.StatusCode.UNIMPLEMENTED)
                time.sleep(0.1)
            server = grpc.server(futures.ThreadPoolExecutor(1))  # of no service
            server.add_insecure_port(address)
            server.start()
            self.addCleanup(server.stop, None)
            while answer(client) != grpc.StatusCode.UNIMPLEMENTED:
                self.assertLess(time.monotonic(), back + 4)
                time.sleep(0.1)


class Live(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.processes = cls.enterClassContext(live_processes.LiveProcesses(BIN_DIR))
        cls.server = cls.enterClassContext(PrefillClient(cls.processes.server))
        cls.worker = cls.enterClassContext(DecodeClient(cls.processes.worker))

    def cache(self, **layout):
        with self.server.prefill(PROMPT, layout=Layout(**layout), attention=Attention("dense")) as stream:
            return to_float32(stream.read_all()), stream

    def by_token(self, cache, stream):
        """Converts any layout to [layers, 2, tokens, heads, head_dim]."""
        if wire.enum_name("KvOrder", stream.layout.order) == "hnd":
            cache = cache.swapaxes(3, 4)
        return cache.reshape(*cache.shape[:2], -1, *cache.shape[-2:])[:, :, : len(PROMPT)]

    def test_server_says_what_it_runs(self):
        info = self.server.server_info()
        self.assertEqual(info.model_name, "tiny")
        self.assertIn(wire.enum_value("AttentionPolicy", "share"), info.allowed_policies)

    def test_proxy_variables_are_only_for_those_who_want_them(self):
        with unittest.mock.patch.dict(os.environ, http_proxy="http://127.0.0.1:9"):  # nothing listens there
            with PrefillClient(self.processes.server) as client:
                self.assertEqual(client.server_info().model_name, "tiny")
            with PrefillClient(self.processes.server, use_proxy=True) as client:
                with self.assertRaises(PrefilldError) as raised:
                    client.server_info()
                self.assertEqual(raised.exception.code, grpc.StatusCode.UNAVAILABLE)

    def test_one_of_several_servers_may_be_away(self):
        with PrefillClient(f"ipv4:127.0.0.1:1,{self.processes.server}") as client:
            for _ in range(4):
                self.assertEqual(client.server_info().model_name, "tiny")

    def test_a_priority_is_lowered_to_what_the_operator_allows(self):
        for asked, given in ((3, 0), (-2, -2)):
            with self.server.prefill(PROMPT, priority=asked, metadata=[("x-tenant", "search")]) as stream:
                self.assertEqual(stream.priority, given)
        with self.assertRaises(PrefilldError) as raised:
            self.server.prefill(PROMPT, priority=8)
        self.assertEqual(raised.exception.code, grpc.StatusCode.INVALID_ARGUMENT)

    def test_layers_come_in_order_and_whole(self):
        with self.server.prefill(PROMPT) as stream:
            layers = [blocks.layer for blocks in stream]
        self.assertEqual(layers, sorted(layers))
        self.assertEqual(set(layers), set(range(stream.layout.num_layers)))
        self.assertEqual(stream.result.num_tokens, len(PROMPT))

    def test_layouts_hold_the_same_cache(self):
        plain = self.by_token(*self.cache(dtype="fp32"))
        self.assertGreater(np.abs(plain).max(), 0.1)
        for block_tokens, order in ((64, "hnd"), (128, "nhd"), (32, "hnd")):
            other = self.by_token(*self.cache(block_tokens=block_tokens, order=order, dtype="fp32"))
            np.testing.assert_array_equal(plain, other)

    def test_narrow_types_are_near_the_wide_one(self):
        exact = self.by_token(*self.cache(dtype="fp32"))
        for dtype, tolerance in (("bf16", 2**-8), ("fp16", 2**-11)):
            rounded = self.by_token(*self.cache(dtype=dtype))
            np.testing.assert_allclose(rounded, exact, rtol=tolerance, atol=1e-4)

    def test_lanes_and_asyncio_bring_the_same_cache(self):
        async def read(lanes):
            async with AsyncPrefillClient(self.processes.server) as client:
                async with client.submit(PROMPT, attention=Attention("dense"), lanes=lanes) as stream:
                    return await stream.read_all(), stream.result.first_token.token_id

        with self.server.prefill(PROMPT, attention=Attention("dense")) as stream:
            cache = stream.read_all()
        with self.server.prefill(PROMPT, attention=Attention("dense"), lanes=4) as laned:
            np.testing.assert_array_equal(laned.read_all(), cache)
        self.assertEqual(len(laned.result.frames_per_lane), 4)
        for lanes in (1, 3):
            other, first_token = asyncio.run(read(lanes))
            np.testing.assert_array_equal(other, cache)
            self.assertEqual(first_token, stream.result.first_token.token_id)

    def test_asyncio_generates_the_same_tokens(self):
        async def read():
            async with AsyncDecodeClient(self.processes.worker) as client:
                async with client.generate(PROMPT, 4, ignore_eos=True) as stream:
                    return [token.id async for token in stream], stream.result.num_tokens

        with self.worker.generate(PROMPT, 4, ignore_eos=True) as stream:
            self.assertEqual(asyncio.run(read()), ([token.id for token in stream], 4))

    def test_a_range_of_heads_and_blocks_is_that_part(self):
        whole, _ = self.cache(dtype="fp32")
        part, stream = self.cache(dtype="fp32", first_head=1, num_heads=1, first_block=3)
        np.testing.assert_array_equal(part, whole[:, :, 3:, :, 1:2])
        self.assertEqual(stream.layout.first_block, 3)

    def test_positions_past_the_prompt_are_zero(self):
        cache, _ = self.cache()
        self.assertTrue((cache[:, :, -1, len(PROMPT) % 16 :] == 0).all())

    def test_both_ways_give_the_same_first_token(self):
        with self.server.prefill(PROMPT, sampling=Sampling(top_logprobs=5)) as stream:
            stream.read_all()
        first = stream.result.first_token
        with self.worker.generate(PROMPT, 4, sampling=Sampling(top_logprobs=5)) as generation:
            tokens = list(generation)
        self.assertEqual(tokens[0].id, first.token_id)
        self.assertEqual([t.index for t in tokens], list(range(len(tokens))))
        self.assertEqual(tokens[0].top_logprobs[0], (first.token_id, tokens[0].logprob))
        self.assertEqual(generation.result.num_tokens, len(tokens))

    def test_recall_is_measured_when_asked_for(self):
        prompt = [1 + i * i % 251 for i in range(1500)]
        info = self.server.server_info()
        for policy, kind in (("vertical_slash", "vertical_slash"), ("baseline_random", "baseline")):
            with self.server.prefill(prompt, attention=Attention(policy, recall_audit_rows=4)) as stream:
                stream.read_all()
            audit = stream.result.total.recall
            heads = getattr(audit, kind).heads
            # In the last layer one query is computed, exactly.
            self.assertEqual(len(heads), (info.num_layers - 1) * info.num_heads)
            self.assertTrue(0 < min(heads) <= getattr(audit, kind).mean <= 1)
            self.assertEqual(len(audit.shared.heads), 0)
        with self.server.prefill(prompt, attention=Attention("vertical_slash")) as stream:
            stream.read_all()
        self.assertFalse(stream.result.total.HasField("recall"))

    def test_a_prompt_is_graded_as_greedy_decoding_goes_on(self):
        with self.worker.generate(PROMPT, 12, attention=Attention("dense"), ignore_eos=True) as generation:
            generated = [token for token in generation]
        tokens = [*PROMPT, *(t.id for t in generated), (generated[0].id + 1) % 256]
        no_cache = Layout(first_block=-(-len(tokens) // 16))
        with self.server.prefill(
            tokens, layout=no_cache, attention=Attention("dense"), prompt_logprobs=True
        ) as stream:
            self.assertEqual(list(stream), [])
        own, best = (np.array(getattr(stream.result, n)) for n in ("prompt_logprobs", "best_logprobs"))
        self.assertEqual((own.shape, best.shape), ((len(tokens) - 1,), (len(tokens) - 1,)))
        likeliest = own == best
        self.assertTrue(likeliest[len(PROMPT) - 1 : -1].all())
        self.assertFalse(likeliest[: len(PROMPT) - 1].all())
        np.testing.assert_allclose(own[len(PROMPT) - 1 : -1], [t.logprob for t in generated], atol=0.05)
        self.assertTrue((best >= own).all() and (best <= 0).all())

    def test_a_stop_token_ends_generation(self):
        with self.worker.generate(PROMPT, 8, ignore_eos=True) as generation:
            first = next(generation)
        with self.worker.generate(PROMPT, 8, stop_token_ids=[first.id]) as generation:
            self.assertEqual([t.id for t in generation], [first.id])
        self.assertEqual(wire.enum_name("FinishReason", generation.result.finish_reason), "stop")

    def test_progress_is_told(self):
        seen = []
        with self.server.prefill(PROMPT, on_progress=lambda p: seen.append(p.layers_computed)) as stream:
            stream.read_all()
        self.assertEqual(seen[-1], stream.layout.num_layers)

    def test_refusals_carry_the_servers_reason(self):
        for tokens, options in (([], {}), ([999_999], {}), (PROMPT, {"attention": Attention("share", gamma=7)})):
            with self.assertRaises(PrefilldError) as caught:
                self.server.prefill(tokens, **options)
            self.assertEqual(caught.exception.code, grpc.StatusCode.INVALID_ARGUMENT)
        with self.assertRaises(PrefilldError) as caught:
            list(self.worker.generate([999_999], 1))
        self.assertIn("999999", caught.exception.details)

    def test_unknown_names_fail_before_the_call(self):
        for options in (
            {"attention": Attention("spare")},
            {"layout": Layout(order="hdn")},
            {"layout": Layout(dtype="f4")},
        ):
            with self.assertRaisesRegex(ValueError, "one of"):
                self.server.prefill(PROMPT, **options)

    def test_another_model_is_refused(self):
        with self.assertRaises(PrefilldError) as caught:
            self.server.prefill(PROMPT, model_fingerprint="0" * 32)
        self.assertEqual(caught.exception.code, grpc.StatusCode.FAILED_PRECONDITION)

    def test_leaving_a_stream_stops_the_server(self):
        with contextlib.closing(self.server.prefill(PROMPT * 16)) as stream:
            self.assertTrue(stream.request_id)
        deadline = time.monotonic() + 60
        while self.server.server_info().running_requests and time.monotonic() < deadline:
            time.sleep(0.02)
        self.assertEqual(self.server.server_info().running_requests, 0)


if __name__ == "__main__":
    BIN_DIR = Path(sys.argv.pop(1)).resolve()
    unittest.main()
