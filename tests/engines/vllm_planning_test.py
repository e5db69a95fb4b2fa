"""Tests what the vLLM connector loads, and its configuration: the parts that need neither vLLM nor a server.

Exits with 77 (skipped, for CTest) without the client's packages.
"""

import sys
import types
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "client" / "python"))
try:
    from prefilld.vllm.addresses import Address, AddressPattern
    from prefilld.vllm.config import ConnectorConfig, Wish
    from prefilld.vllm.planner import LoadPlanner
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)

BLOCK = 32  # tokens of an engine's block
ANY = ["h:*", "*.*.*.*:*", "[*:*:*:*:*:*:*:*]:*"]


def request(prompt=100, params=None, request_id="r", **fields):
    made = dict(
        request_id=request_id, num_prompt_tokens=prompt, prompt_token_ids=list(range(prompt)), kv_transfer_params=params
    )
    return types.SimpleNamespace(**{**made, **fields})


class Configuration(unittest.TestCase):
    def test_all_mistakes_are_named_at_once(self):
        with self.assertRaises(ValueError) as caught:
            ConnectorConfig.read({"lanes": 17, "adress": "x", "timeout_s": 0, "retries": True, "tls_key": "key.pem"})
        for text in ("'adress' is unknown", "prefill_address", "lanes is 17, allowed: whole numbers from 1 to 16", "timeout_s is 0",
                     "retries is True", "tls_ca"):  # fmt: skip
            self.assertIn(text, str(caught.exception))

    def test_every_field_is_checked(self):
        for name, wrong in (
            ("prefill_address", ["", [], "nowhere", "a:0", "a:65536", "a b:1", ["a:1", 5], 7, {"a": 1}, ["a:1"] * 65]),
            ("prefill_allow", ["a:1", ["nowhere"], ["*.*:1"], ["10.0.*:1"], [5], ["a:1"] * 65, None]),
            ("min_prompt_tokens", [0, 1.5, "8", True, None, 2**31 + 1]),
            ("load_async", ["false", 1, None]),
            ("resumable", ["false", 1, None]),
            ("policy", ["sparse", 7, ["dense"]]),
            ("lanes", [0, 17, 2.0, True]),
            ("max_loads", [0, 1025, 1.5]),
            ("timeout_s", [0, -1, 86_401, float("nan"), float("inf"), "600", True]),
            ("retries", [-1, 1.5, 101, True]),
            ("model_fingerprint", [5, None, "f" * 129]),
            ("metadata", [[], "a=b", {"A": "b"}, {"a": 5}, {"a": "\n"}, {"grpc-x": "b"}, {"a-bin": "b"}, {"a": "b" * 8193}]),
            ("tls_ca", ["", 5, ["ca.pem"]]),
        ):  # fmt: skip
            for value in wrong:
                with self.subTest(name, value=value), self.assertRaises(ValueError) as caught:
                    ConnectorConfig.read({name: value})
                self.assertIn(f"config: {name}", str(caught.exception))
        for right in (
            {"prefill_address": "unix:/run/prefilld.sock"}, {"prefill_address": ["a:1", "[::1]:2"]}, {"timeout_s": 1},
            {"metadata": {"authorization": "Bearer x"}}, {"prefill_allow": ANY}, {"policy": "dense"}, {},
        ):  # fmt: skip
            self.assertEqual(vars(ConnectorConfig(**right)), vars(ConnectorConfig.read(right)))
        self.assertNotIn("secret", self.message({"metadata": ["secret"]}) + self.message({"metadata": {"a": "secret\n"}}))

    def message(self, extra):
        with self.assertRaises(ValueError) as caught:
            ConnectorConfig.read(extra)
        return str(caught.exception)

    def test_params_are_those_of_routers(self):
        config = ConnectorConfig(policy="share", prefill_allow=ANY)
        params = {"do_remote_prefill": True, "do_remote_decode": False, "remote_engine_id": None,
                  "remote_block_ids": None, "remote_host": "10.0.0.1", "remote_port": "50051"}  # fmt: skip
        self.assertEqual(Wish.of(params, config), Wish("10.0.0.1:50051", True, {"policy": "share"}, 0))
        own = {"attention": {"policy": "dense", "gamma": 0.9}, "load_async": False, "priority": 2}
        wish = Wish.of({**params, "remote_host": "fd00::1", **own}, config)
        self.assertEqual(wish, Wish("[fd00::1]:50051", False, {"policy": "dense", "gamma": 0.9}, 2))

    def test_params_may_name_no_server_but_the_allowed(self):
        def address(config, host, port=50051):
            return Wish.of({"do_remote_prefill": True, "remote_host": host, "remote_port": port}, config).address

        fixed = ConnectorConfig(prefill_address=["Prefill.example:50051", "[fd00::7]:50051"])
        self.assertEqual(address(fixed, "prefill.example"), "prefill.example:50051")
        self.assertEqual(address(fixed, "fd00:0::7"), "[fd00::7]:50051")
        allowing = ConnectorConfig(prefill_allow=["10.2.*.*:50051", "*.prefill:*"])
        self.assertEqual(address(allowing, "10.2.3.4"), "10.2.3.4:50051")
        self.assertEqual(address(allowing, "a.prefill", 7), "a.prefill:7")
        for config, host, port in (
            (fixed, "prefill.example", 50052), (fixed, "prefill.example.evil.example", 50051), (fixed, "10.2.3.4", 50051),
            (allowing, "10.3.3.4", 50051), (allowing, "10.2.3.4", 50052), (allowing, "10.2.evil.example", 50051),
            (allowing, "a.b.prefill", 7), (ConnectorConfig(), "127.0.0.1", 50051),
        ):  # fmt: skip
            with self.assertRaisesRegex(ValueError, f"{host}:{port} is not among the allowed servers"):
                address(config, host, port)
        for host in ("unix:/run/a", "ipv4:10.2.3.4", "dns://10.2.3.4/a", "10.2.3.4,evil.example", "a.prefill/", "[10.2.3.4]",
                     "a\n.prefill", "fe80::1%eth0"):  # fmt: skip
            with self.assertRaises(ValueError):
                address(ConnectorConfig(prefill_allow=[*ANY, *allowing.prefill_allow]), host)

    def test_patterns_are_those_of_the_server(self):
        for pattern, admitted, refused in (
            ("10.2.*.*:50052", ["10.2.3.4:50052"], ["10.2.3.4:50053", "10.3.3.4:50052", "10.2.a.b:50052"]),
            ("127.0.0.1:*", ["127.0.0.1:7000"], ["127.0.0.2:7000", "localhost:7000", "[::ffff:127.0.0.1]:7000"]),
            ("[fd00:1::*]:7", ["[fd00:1::12]:7", "[FD00:0001:0:0:0:0:0:12]:7"], ["[fd00:2::12]:7", "[fd00:1::1:12]:7"]),
            ("[fd00:1:*:*:*:*:*:*]:*", ["[fd00:1::12]:7"], ["[fd00::12]:7", "0.0.0.1:7"]),
            ("*.pods:50052", ["a.pods:50052", "A.PODS.:50052"], ["a.b.pods:50052", "a.pods.evil:50052", "10.0.0.1:50052"]),
        ):  # fmt: skip
            for addresses, admits in ((admitted, True), (refused, False)):
                for text in addresses:
                    try:
                        self.assertEqual(AddressPattern(pattern).admits(Address.parse(text)), admits, (pattern, text))
                    except ValueError:
                        self.assertFalse(admits, (pattern, text))
        for wrong in ("10.2.*:1", "10.2.3*.4:1", "*.*:1", "a.b*:1", "[fd00::*::1]:1", "[fd00:*]:1", "a:*1", "a", "",
                      "unix:run", "unix:/run/a.sock", "unix:/run/*.sock"):
            with self.assertRaises(ValueError, msg=wrong):
                AddressPattern(wrong)

    def test_without_params_the_configured_server_prefills(self):
        fixed = ConnectorConfig(prefill_address="p:1", load_async=False)
        self.assertEqual(Wish.of(None, fixed), Wish(None, False, {}, 0))
        self.assertEqual(Wish.of({"do_remote_prefill": True}, fixed), Wish(None, False, {}, 0))
        self.assertIsNone(Wish.of({"do_remote_decode": True}, fixed))
        self.assertIsNone(Wish.of(None, ConnectorConfig()))

    def test_params_that_nobody_understands_are_refused(self):
        at = {"do_remote_prefill": True, "remote_host": "h", "remote_port": 1}
        open_to_all = ConnectorConfig(prefill_allow=ANY)
        self.assertEqual(Wish.of(at, open_to_all).address, "h:1")
        for wrong in ({"remote_port": "x"}, {"remote_port": 65536}, {"remote_port": None}, {"remote_host": 7},
                      {"remote_port": "\u0663"}, {"attention": "dense"}, {"priority": "high"}, {"priority": True}, {"priority": 8}, {"priority": -8},
                      {"load_async": "false"}):  # fmt: skip
            with self.assertRaises(ValueError):
                Wish.of({**at, **wrong}, open_to_all)
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
        planner = LoadPlanner(ConnectorConfig(prefill_allow=ANY))
        asked = request(params={**self.AT, "load_async": False})
        self.assertEqual(planner.offer(asked, 0), (99, False))
        planner.accept(asked, [1, 2, 3, 4], 99)
        (load,), _ = planner.take()
        self.assertEqual((load.end_token, load.is_async), (99, False))
        self.assertEqual(planner.offer(request(1, {**self.AT, "load_async": False}, "s"), 0), (0, False))

    def test_short_prompts_stay_unless_a_router_says_otherwise(self):
        planner = LoadPlanner(ConnectorConfig(prefill_address="p:1", prefill_allow=ANY, min_prompt_tokens=50))
        self.assertEqual(planner.offer(request(), 64), (0, False))
        self.assertEqual(planner.offer(request(), 32), (68, True))
        self.assertEqual(planner.offer(request(params=self.AT, request_id="s"), 64), (36, True))

    def test_a_prompt_is_loaded_once(self):
        planner = LoadPlanner(ConnectorConfig(prefill_allow=ANY))
        asked = request(params=self.AT)
        planner.offer(asked, 0)
        planner.accept(asked, [1, 2, 3, 4], 100)
        planner.accept(asked, [1, 2, 3, 4], 0)  # vLLM's second call, when the load is done
        self.assertEqual(planner.offer(asked, 0), (0, False))  # after a failure
        self.assertEqual(len(planner.take()[0]), 1)

    def test_nothing_is_loaded_unless_vllm_has_room(self):
        planner = LoadPlanner(ConnectorConfig(prefill_allow=ANY))
        asked = request(params=self.AT)
        planner.offer(asked, 0)
        planner.accept(asked, [1, 2, 3, 4], 0)
        self.assertEqual(planner.take(), ([], set()))
        self.assertEqual(planner.offer(asked, 0), (100, True))

    def test_an_end_is_told_once_and_only_of_loads(self):
        planner = LoadPlanner(ConnectorConfig(prefill_allow=ANY))
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
        planner = LoadPlanner(ConnectorConfig(prefill_allow=ANY))
        for i, fields in enumerate(({"lora_request": object()}, {"mm_features": [1]}, {"prompt_token_ids": None},
                                    {"pooling_params": 1}, {"kv_transfer_params": {**self.AT, "remote_port": -1}},
                                    {"kv_transfer_params": {**self.AT, "remote_host": "evil.example"}})):  # fmt: skip
            with self.assertLogs("vllm.prefilld", "WARNING"):
                self.assertEqual(planner.offer(request(**{"params": self.AT, **fields}, request_id=str(i)), 0), (0, False))

    def test_prompts_of_different_salts_share_nothing(self):
        planner = LoadPlanner(ConnectorConfig(prefill_allow=ANY))
        salts = []
        for salt in (None, "a", "b\n" * 100):
            asked = request(params=self.AT, request_id=str(salt), cache_salt=salt)
            planner.offer(asked, 0)
            planner.accept(asked, [1, 2, 3, 4], 100)
            salts.append(planner.take()[0][0].cache_salt)
        self.assertEqual((salts[0], len(set(salts)), len(salts[2])), ("", 3, 64))

    def test_servers_take_the_shared_loads_in_turn(self):
        planner = LoadPlanner(ConnectorConfig(prefill_address=["a:1", "b:1"], min_prompt_tokens=1), num_ranks=4)
        for name in "rst":
            asked = request(request_id=name)
            planner.offer(asked, 0)
            planner.accept(asked, [1, 2, 3, 4], 100)
        loads, _ = planner.take()
        turns = [("a:1", "b:1"), ("b:1", "a:1"), ("a:1", "b:1")]
        self.assertEqual([load.shared.addresses for load in loads], turns)
        self.assertEqual(loads[0].shared.at_next_address().addresses, turns[1])
        self.assertEqual(len({load.shared.key for load in loads} | {load.shared.request_id for load in loads}), 6)

    def test_one_rank_shares_with_nobody(self):
        planner = LoadPlanner(ConnectorConfig(prefill_address="a:1", min_prompt_tokens=1))
        asked = request()
        planner.offer(asked, 0)
        planner.accept(asked, [1, 2, 3, 4], 100)
        self.assertIsNone(planner.take()[0][0].shared)


if __name__ == "__main__":
    unittest.main()
