#!/usr/bin/env python3
"""Tests which prefilld the gateway chooses. Exits with 77 (skipped, for CTest) without the client's packages."""

import asyncio
import logging
import sys
import time
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "client" / "python"))
try:
    import grpc
    from prefilld import prefix_keys, wire
    from prefilld.errors import PrefilldError
    from prefilld.gateway import peers
    from prefilld.gateway.peers import DecodeGroup, DecodeWorker, Prefilld, PrefillGroup, blocks_in_cache
    from prefilld.gateway.routing import PrefixMemory, Route, Router
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)

logging.disable()
BLOCK = 128


def leading(memory, keys):
    """Returns how many blocks at the beginning of a prompt are remembered."""
    return next((i for i, key in enumerate(keys) if key not in memory), len(keys))


def prompt(*parts, tail=10):
    """Returns the length and the keys of a prompt made of blocks, one for each number, and a few tokens behind them."""
    tokens = [part for part in parts for _ in range(BLOCK)] + [7] * tail
    return len(tokens), prefix_keys(tokens, "model")


class Routing(unittest.TestCase):
    def setUp(self):
        self.routes = [Route(f"server-{i}:1") for i in range(3)]
        for route in self.routes:
            route.is_up = True
            route.memory.resize(100)
        self.router = Router(self.routes)

    def send(self, *parts, left_out=()):
        """Sends a prompt as the gateway does. Returns the number of its server, and the tokens cached there."""
        length, keys = prompt(*parts)
        choice = self.router.choose(length, keys, left_out)
        choice.route.note_sent(length - choice.cached_tokens)
        choice.route.memory.remember(keys)
        return self.routes.index(choice.route), choice.cached_tokens

    def poll(self, *queues, requests=0):
        for route, queued in zip(self.routes, queues, strict=True):
            route.note_load(route.begin_poll(), queued, requests)

    def test_prompts_without_a_common_beginning_take_turns(self):
        servers = [self.send(100 + i)[0] for i in range(6)]
        self.assertEqual(sorted(servers), [0, 0, 1, 1, 2, 2])

    def test_a_conversation_stays_where_its_beginning_is(self):
        first, cached = self.send(1, 2, 3)
        self.assertEqual(cached, 0)
        self.poll(0, 0, 0)
        for cached_blocks in (3, 4, 4, 4):
            self.assertEqual(self.send(1, 2, 3, 4), (first, cached_blocks * BLOCK))
            self.poll(0, 0, 0)

    def test_it_goes_elsewhere_once_the_queue_is_longer_than_what_the_cache_saves(self):
        first, _ = self.send(1, 2, 3)
        queues = [0, 0, 0]
        queues[first] = 3 * BLOCK - 1
        self.poll(*queues)
        self.assertEqual(self.send(1, 2, 3)[0], first)
        queues[first] = 3 * BLOCK + 1
        self.poll(*queues)
        second, cached = self.send(1, 2, 3)
        self.assertNotEqual(second, first)
        self.assertEqual(cached, 0)
        queues[first] = 10_000
        self.poll(*queues)
        self.assertEqual(self.send(1, 2, 3), (second, 3 * BLOCK))  # where it is remembered, too

    def test_what_was_sent_since_the_last_answer_counts_as_queue(self):
        self.poll(0, 50, 300)
        self.assertEqual([self.send(200 + i)[0] for i in range(4)], [0, 1, 0, 1])  # 138 tokens each

    def test_an_answer_counts_what_was_sent_before_it_was_asked_for_but_not_after(self):
        route = self.routes[0]
        route.note_sent(1000)
        asked = route.begin_poll()
        route.note_sent(77)
        route.note_load(asked, 1000, 1)
        self.assertEqual((route.queue, route.requests), (1077, 2))

    def test_a_prompt_that_is_done_is_no_queue(self):
        numbers = [self.routes[0].note_sent(tokens) for tokens in (1000, 77)]
        self.routes[0].note_done(numbers[0])
        self.assertEqual((self.routes[0].queue, self.routes[0].requests), (77, 1))
        self.routes[0].note_done(numbers[0])  # it may be said twice, and after the server has said its queue
        self.poll(5, 0, 0)
        self.routes[0].note_done(numbers[1])
        self.assertEqual((self.routes[0].queue, self.routes[0].requests), (5, 0))

    def test_of_equal_queues_the_server_with_fewer_requests_is_taken(self):
        for route, running in zip(self.routes, (1, 0, 1), strict=True):
            route.note_load(route.begin_poll(), 0, running)
        self.assertEqual(self.send(1)[0], 1)

    def test_servers_that_are_down_or_left_out_are_not_taken(self):
        first, _ = self.send(1, 2)
        self.routes[first].is_up = False
        second, cached = self.send(1, 2)
        self.assertNotEqual(second, first)
        self.assertEqual(cached, 0)
        third, _ = self.send(1, 2, left_out=[self.routes[second]])
        self.assertEqual({first, second, third}, {0, 1, 2})
        self.routes[third].is_up = self.routes[second].is_up = False
        self.assertIsNone(self.router.choose(*prompt(1, 2)))

    def test_a_prompt_of_unknown_tokens_goes_to_the_shortest_queue(self):
        self.poll(5, 4, 6)
        self.assertEqual(self.router.choose(0, []).route, self.routes[1])

    def test_what_a_server_tells_of_its_cache_counts_too(self):
        length, keys = prompt(1, 2, 3)
        self.routes[1].told = set(keys[:2])
        choice = self.router.choose(length, keys)
        self.assertEqual((choice.route, choice.cached_tokens), (self.routes[1], 2 * BLOCK))
        self.routes[1].memory.remember(keys[:1])
        self.routes[1].told = set(keys[1:])
        self.assertEqual(self.router.choose(length, keys).cached_tokens, 3 * BLOCK)

    def test_the_last_token_is_computed_even_if_all_is_cached(self):
        length, keys = prompt(1, 2, tail=0)
        self.routes[0].memory.remember(keys)
        self.assertEqual(self.router.choose(length, keys).cached_tokens, 2 * BLOCK - 1)


class Memory(unittest.TestCase):
    def test_another_beginning_shares_nothing(self):
        memory = PrefixMemory(10)
        memory.remember(prompt(1, 2, 3)[1])
        self.assertEqual(leading(memory, prompt(1, 2, 9, 3)[1]), 2)
        self.assertEqual(leading(memory, prompt(9, 2, 3)[1]), 0)

    def test_it_is_bounded_and_forgets_what_was_not_sent_for_longest_from_its_end(self):
        memory = PrefixMemory(4)
        old, new = prompt(1, 2)[1], prompt(3, 4, 5)[1]
        memory.remember(old)
        memory.remember(new)
        self.assertEqual(len(memory), 4)
        self.assertEqual((leading(memory, old), leading(memory, new)), (1, 3))
        memory.remember(old)  # now the other one is older
        self.assertEqual((leading(memory, old), leading(memory, new)), (2, 2))
        memory.remember(prompt(*range(20, 30))[1])  # longer than the memory: its beginning counts
        self.assertEqual(leading(memory, prompt(*range(20, 30))[1]), 4)
        memory.resize(1)
        self.assertEqual(len(memory), 1)
        memory.clear()
        self.assertEqual(len(memory), 0)

    def test_a_server_without_a_prefix_cache_is_remembered_for_nothing(self):
        memory = PrefixMemory(0)
        memory.remember(prompt(1)[1])
        self.assertEqual(len(memory), 0)

    def test_the_capacity_is_that_of_the_servers_cache(self):
        shape = dict(num_layers=8, num_kv_heads=2, head_dim=64, native_dtype=wire.enum_value("DType", "fp32"))
        block = 2 * 8 * 2 * 64 * 128 * 4
        self.assertEqual(blocks_in_cache(wire.ServerInfo(**shape)), 0)
        cached = wire.ServerInfo(**shape, prefix_cache={"capacity_bytes": 10 * block + 1})
        self.assertEqual(blocks_in_cache(cached), 10)


class Models(unittest.TestCase):
    def test_a_server_of_another_model_is_left_out_until_it_is_alone(self):
        first, second = (Prefilld(None, f"server-{i}:1", 10) for i in range(2))
        group = PrefillGroup([first, second])
        first.info, second.info = wire.ServerInfo(model_fingerprint="a"), wire.ServerInfo(model_fingerprint="b")
        group.check_model(first)
        first._up()
        with self.assertRaises(PrefilldError) as caught:
            group.check_model(second)
        self.assertIn("model_fingerprint b, the others a", str(caught.exception))
        with self.assertRaises(PrefilldError) as caught:
            group.choose(1, [], left_out=[first])
        self.assertIn("server-1:1", str(caught.exception))
        first._down("gone")
        group.check_model(second)
        self.assertEqual(group.fingerprint, "b")


class PlayedClient:
    """A prefilld's answers to the gateway's questions: `serves` is what health says, or None if no answer comes."""

    def __init__(self):
        self.serves, self.asked, self.updates = True, 0, []

    async def is_serving(self, timeout):
        self.asked += 1
        if self.serves is None:
            raise unavailable()
        return self.serves

    def watch_prefix_cache(self, metadata):
        self.metadata = metadata
        return PlayedUpdates(self.updates)

    async def server_info(self, timeout):
        cache = {"capacity_bytes": 1 << 30}
        return wire.ServerInfo(num_layers=1, num_kv_heads=1, head_dim=64, queued_tokens=9, prefix_cache=cache)


class PlayedUpdates:
    """The updates of a prefix cache: those of a list, and then none until an exception is among them."""

    def __init__(self, updates):
        self.updates = updates

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def __aiter__(self):
        while True:
            while not self.updates:
                await asyncio.sleep(0.01)
            update = self.updates.pop(0)
            if isinstance(update, Exception):
                raise update
            yield update


def unavailable():
    return PrefilldError(grpc.StatusCode.UNAVAILABLE, "gone")


class Watching(unittest.IsolatedAsyncioTestCase):
    async def watch(self, poll_seconds):
        peers.POLL_SECONDS, before = poll_seconds, peers.POLL_SECONDS
        self.addCleanup(setattr, peers, "POLL_SECONDS", before)
        self.client = PlayedClient()
        self.server = Prefilld(self.client, "server:1", 10)
        self.group = PrefillGroup([self.server])
        watch = asyncio.ensure_future(self.server.watch())
        self.addCleanup(watch.cancel)
        await self.until(True)
        self.send()

    def send(self):
        self.server.route.note_sent(5)
        self.server.route.memory.remember(prompt(1, 2)[1])

    async def until(self, is_up):
        async with asyncio.timeout(30):
            while (self.server.is_up, self.server.route.is_up) != (is_up, is_up):
                await asyncio.sleep(0.01)

    async def test_a_server_is_up_while_it_answers_that_it_serves(self):
        await self.watch(poll_seconds=0.05)
        for serves in (False, None):
            self.client.serves = serves
            await self.until(False)
            self.assertEqual(len(self.server.route.memory), 0)  # its cache may be gone with it
            self.client.serves = True
            await self.until(True)
            self.send()

    async def test_a_server_that_failed_a_call_is_asked_soon_and_later_each_time(self):
        await self.watch(poll_seconds=1000)
        self.assertEqual(self.server.route.queue, 9 + 5)
        waits = []
        for call in range(6):
            self.server.note_failure(unavailable())
            self.server.note_failure(unavailable())  # of another call, at the same moment
            self.assertFalse(self.server.is_up or self.server.route.is_up)
            failed = time.monotonic()
            await self.until(True)
            waits.append(time.monotonic() - failed)
            self.assertEqual((self.client.asked, self.server.route.queue), (2 + call, 9))
        self.assertEqual(len(self.server.route.memory), 2)  # it was not away
        for wait, least in zip(waits, (0.02, 0.04, 0.08, 0.16, 0.32, 0.64), strict=True):
            self.assertGreater(wait, 0.9 * least)
        self.server.note_success()
        self.server.note_failure(unavailable())
        failed = time.monotonic()
        await self.until(True)
        self.assertLess(time.monotonic() - failed, waits[-1])

    async def test_a_prompt_waits_a_little_for_a_server(self):
        await self.watch(poll_seconds=0.05)
        self.server.note_failure(unavailable())
        await self.group.wait_for_one([])
        self.assertTrue(self.server.is_up)
        self.client.serves = None
        await self.until(False)
        peers.PATIENCE_SECONDS, before = 0.05, peers.PATIENCE_SECONDS
        self.addCleanup(setattr, peers, "PATIENCE_SECONDS", before)
        await self.group.wait_for_one([])  # not for ever
        self.assertFalse(self.server.is_up)

    async def test_it_follows_what_the_servers_cache_holds(self):
        await self.watch(poll_seconds=1000)
        peers.FOLLOW_SECONDS, before = 0.01, peers.FOLLOW_SECONDS
        self.addCleanup(setattr, peers, "FOLLOW_SECONDS", before)
        follow = asyncio.ensure_future(self.server.follow_cache())
        self.addCleanup(follow.cancel)

        async def told(count):
            async with asyncio.timeout(30):
                while len(self.server.route.told) != count:
                    await asyncio.sleep(0.01)

        keys = prompt(1, 2, 3)[1]
        self.client.updates.append(wire.PrefixCacheUpdate(changes=[{"stored": {"key": key}} for key in keys]))
        await told(3)
        self.assertEqual(self.server.route.cached_blocks(keys), 3)
        self.assertEqual(self.client.metadata, ())
        self.client.updates.append(wire.PrefixCacheUpdate(changes=[{"removed": keys[1]}]))
        await told(2)
        self.assertEqual(self.server.route.cached_blocks(keys), 1)  # though the second one was sent there
        self.client.updates.append(unavailable())
        await told(0)
        logging.disable(logging.NOTSET)
        self.addCleanup(logging.disable)
        with self.assertLogs("prefilld.gateway", "ERROR"):
            self.client.updates.append(wire.PrefixCacheUpdate(changes=[{"stored": {"key": keys[0]}}]))
            await told(1)
            self.client.updates.append(ValueError("nobody expected it"))
            await told(0)
        self.client.updates.append(wire.PrefixCacheUpdate(changes=[{"stored": {"key": keys[0]}}]))
        await told(1)

    async def test_a_refused_request_is_no_failure_of_the_server(self):
        await self.watch(poll_seconds=1000)
        self.server.note_failure(PrefilldError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full"))
        self.assertTrue(self.server.is_up)


class Workers(unittest.TestCase):
    def test_the_worker_with_the_fewest_requests_is_next(self):
        workers = [DecodeWorker(None, f"worker-{i}:1") for i in range(3)]
        group = DecodeGroup(workers)
        for worker in workers:
            worker._up()
        chosen = []
        for _ in range(6):
            chosen.append(group.choose())
            chosen[-1].running += 1
        self.assertEqual([worker.running for worker in workers], [2, 2, 2])
        workers[1].running = 0
        self.assertIs(group.choose(), workers[1])
        self.assertIsNot(group.choose([workers[1]]), workers[1])
        for worker in workers:
            worker._down("gone")
        with self.assertRaises(PrefilldError):
            group.choose()


if __name__ == "__main__":
    unittest.main()
