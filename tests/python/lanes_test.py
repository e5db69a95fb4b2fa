"""Tests how many lanes the Python client asks for when nobody names a number.

Exits with 77 (skipped, for CTest) without the client's packages.
"""

import asyncio
import socket
import sys
import threading
import unittest
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "client" / "python"))
try:
    import grpc
    from played_server import LAYERS, TOKENS, PlayedServer, layout, silent, whole
    from prefilld import AsyncPrefillClient, Delivery, Layout, PrefillClient, PrefilldError, lanes, wire
    from prefilld.options import prefill_call
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)

BYTES_PER_TOKEN = 384  # of the played server's layout


class Rule(unittest.TestCase):
    def test_large_kv_gets_four_lanes(self):
        asked = [lanes.choose_lanes(size) for size in (0, (8 << 20) - 1, 8 << 20, 1 << 40)]
        self.assertEqual(asked, [1, 1, 4, 4])

    def test_kv_is_as_large_as_the_layout_says(self):
        self.assertEqual(lanes.kv_bytes_per_token(layout()), BYTES_PER_TOKEN)
        self.assertEqual(lanes.kv_bytes_per_token(layout(dtype=wire.enum_value("DType", "bf16"))), BYTES_PER_TOKEN // 2)
        fp8 = {"dtype": wire.enum_value("DType", "fp8_e4m3"), "scales": wire.enum_value("KvScales", "per_token")}
        self.assertEqual(lanes.kv_bytes_per_token(layout(**fp8)), BYTES_PER_TOKEN // 4 + 2 * 6 * 2 * 4)
        fp8["scales"] = wire.enum_value("KvScales", "per_block")
        self.assertEqual(lanes.kv_bytes_per_token(layout(**fp8)), BYTES_PER_TOKEN // 4 + 2 * 6 * 2 * 4 // 16)

    def test_the_rule_is_that_of_the_other_clients(self):
        header = (Path(__file__).resolve().parents[2] / "proto" / "wire" / "lane_count.h").read_text(encoding="utf-8")
        self.assertIn("kBytesForManyLanes = uint64_t{8} << 20;", header)
        self.assertIn("kManyLanes = 4;", header)

    def test_names_of_several_machines_are_known(self):
        with mock.patch("socket.getaddrinfo") as look_up:
            for address in ("127.0.0.1:1", "[::1]:1", "ipv4:127.0.0.1:1", "unix:/run/a.sock"):
                self.assertFalse(lanes.stands_for_several(address), address)
            self.assertTrue(lanes.stands_for_several("ipv4:127.0.0.1:1,127.0.0.1:2"))
            look_up.assert_not_called()
            v4, v6 = (socket.AF_INET, None), (socket.AF_INET6, None)
            for found, several in (([v4], False), ([v4, v6], False), ([v4, v4], True), ([v4, v6, v6], True)):
                look_up.return_value = found
                for form in ("prefill.example:50051", "dns:prefill.example:50051", "dns:///prefill.example:50051"):
                    self.assertEqual(lanes.stands_for_several(form), several)
                    self.assertEqual(look_up.call_args.args[0], "prefill.example")
            look_up.side_effect = socket.gaierror
            self.assertFalse(lanes.stands_for_several("prefill.example:50051"))


class Calls:
    """Tests of both clients. receive() makes calls one after the other with a client of its own, and says how each ended:
    the layers that came, or the code.
    """

    def setUp(self):
        patch = mock.patch("prefilld.lanes._BYTES_FOR_MANY", BYTES_PER_TOKEN * len(TOKENS))
        patch.start()
        self.addCleanup(patch.stop)

    def asked(self, script, *calls, kind=PlayedServer):
        def play(server, context):
            server.lanes = server.requests[-1].num_lanes
            yield from script(server, context)

        with kind(play) as server:
            ends = self.receive(server.address, calls)
            return [request.num_lanes for request in server.requests], ends

    def test_the_first_call_has_one_and_the_next_what_its_kv_pays_for(self):
        numbers, ends = self.asked(whole, {}, {}, {"lanes": 2}, {"lanes": "auto"})
        self.assertEqual(numbers, [1, 4, 2, 4])
        self.assertEqual(ends, [list(range(LAYERS))] * 4)

    def test_one_is_asked_for_where_more_are_refused_that_nobody_named(self):
        def limited(server, context):
            if server.lanes > 1:
                context.abort(grpc.StatusCode.PERMISSION_DENIED, "num_lanes")
            yield from whole(server, context)

        numbers, ends = self.asked(limited, {}, {}, {"lanes": 4}, {})
        self.assertEqual(numbers, [1, 4, 1, 4, 1])
        self.assertEqual(ends, [list(range(LAYERS))] * 2 + ["PERMISSION_DENIED", list(range(LAYERS))])


    def test_one_is_asked_for_once_lanes_ended_at_another_server(self):
        def waiting_for_lanes(server, context):
            if server.lanes == 1:
                yield from whole(server, context)
            else:
                yield server.accepted()
                yield from silent(server, context)

        numbers, ends = self.asked(waiting_for_lanes, {}, {}, {}, kind=LanesElsewhere)
        self.assertEqual(numbers, [1, 4, 1])
        self.assertEqual(ends, [list(range(LAYERS)), "NOT_FOUND", list(range(LAYERS))])


class LanesElsewhere(PlayedServer):
    """A server whose lanes come to another one."""

    def _attach(self, request, context):
        context.abort(grpc.StatusCode.NOT_FOUND, "request_id: no such running request with lanes")


class Blocking(Calls, unittest.TestCase):
    def receive(self, address, calls):
        ends = []
        with PrefillClient(address) as client:
            for arguments in calls:
                try:
                    with client.prefill(TOKENS, **arguments) as stream:
                        ends.append(sorted(blocks.layer for blocks in stream))
                except PrefilldError as error:
                    ends.append(error.code.name)
        return ends


class Asynchronous(Calls, unittest.TestCase):
    def receive(self, address, calls):
        async def receive():
            ends = []
            async with AsyncPrefillClient(address) as client:
                for arguments in calls:
                    try:
                        async with client.submit(TOKENS, **arguments) as stream:
                            ends.append(sorted([blocks.layer async for blocks in stream]))
                    except PrefilldError as error:
                        ends.append(error.code.name)
            return ends

        return asyncio.run(receive())

    def test_the_event_loop_waits_for_no_name_server(self):
        threads = []

        def look_up(address):
            threads.append(threading.current_thread())
            return False

        with mock.patch("prefilld.channels.stands_for_several", look_up):
            numbers, _ = self.asked(whole, {}, {})
        self.assertEqual(numbers, [1, 4])
        self.assertEqual(len(threads), 1)
        self.assertIsNot(threads[0], threading.main_thread())


class Choice(unittest.TestCase):
    """The server that is asked has a quarter of a MiB of KV for each token."""

    def chosen(self, several=False, **arguments):
        server = mock.Mock(kv_bytes_per_token=256 << 10)
        server.has_one_lane.return_value = several
        call = prefill_call(range(40), **arguments)
        lanes.LaneChoice(call).choose(server)
        return call.request.num_lanes

    def test_blocks_that_the_consumer_has_do_not_count(self):
        self.assertEqual(self.chosen(), 4)
        self.assertEqual(self.chosen(layout=Layout(first_block=1)), 1)

    def test_one_where_lanes_could_reach_different_servers(self):
        self.assertEqual(self.chosen(several=True), 1)

    def test_none_is_chosen_for_a_cache_that_goes_elsewhere(self):
        self.assertEqual(self.chosen(deliver_to=Delivery("127.0.0.1:1", "a")), 0)


if __name__ == "__main__":
    unittest.main()
