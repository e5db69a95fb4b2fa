"""Repeats, without vLLM, the calls that a real vLLM made to the connector, beside a prefilld of this build.

    python3 tests/engines/vllm_recorded_test.py build/release/bin

recorded_calls.jsonl has the calls in their order, with shapes, block numbers and answers (vllm_end_to_end.py --record).
The connector must give the same answers, and the KV must come into the blocks that vLLM named. Exits with 77 (skipped,
for CTest) without torch or the client's packages.
"""

import json
import pickle
import re
import sys
import tempfile
import time
import types
import unittest
import unittest.mock as mock
from collections import Counter, deque
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "client" / "python"), str(ROOT / "tests" / "evaluation")]
import live_processes  # noqa: E402
import vllm_stand_in  # noqa: E402
from faulty_proxy import FaultyProxy  # noqa: E402
from vllm_stand_in import Role  # noqa: E402

try:
    import torch
    from prefilld import Attention, Layout, PrefillClient, to_torch
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)
if live_processes.reason_to_skip():
    print(f"skipped: {live_processes.reason_to_skip()}")
    sys.exit(77)

CALLS = [json.loads(line) for line in (HERE / "recorded_calls.jsonl").read_text().splitlines()]
PATIENCE = 60

vllm_stand_in.install()
from prefilld.vllm import PrefilldConnector  # noqa: E402
from prefilld.vllm.metrics import PrefilldPromMetrics, PrefilldStats  # noqa: E402


def calls(name):
    return [call for call in CALLS if call["call"] == name]


def vllm_config(**extra):
    made, caches = calls("__init__")[0], calls("register_kv_caches")[0]["caches"]
    (shape, _, _) = next(iter(caches.values()))

    def update(layer, keys, values, cache, slots):
        blocks, positions = slots // made["block_size"], slots % made["block_size"]
        cache[blocks, :, positions] = torch.cat([keys, values], -1)

    layers = {name: types.SimpleNamespace(impl=types.SimpleNamespace(do_kv_cache_update=update)) for name in caches}
    of = types.SimpleNamespace
    return of(
        kv_transfer_config=of(
            kv_role="kv_consumer",
            kv_connector_extra_config={"retries": 0, "policy": "dense", "prefill_allow": ["127.0.0.1:*"], **extra},
        ),
        parallel_config=of(pipeline_parallel_size=1),
        model_config=of(
            dtype=getattr(torch, made["dtype"].removeprefix("torch.")),
            get_total_num_kv_heads=lambda: shape[1],
            get_head_size=lambda: shape[3] // 2,
        ),
        cache_config=of(cache_dtype=made["cache_dtype"], block_size=made["block_size"]),
        compilation_config=of(static_forward_context=layers),
        speculative_config=None,
    )


def connector(role, config=None, groups=1):
    cache_config = types.SimpleNamespace(kv_cache_groups=[None] * groups)
    return PrefilldConnector(config or vllm_config(), role, cache_config)


class Recorded(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        programs = cls.enterClassContext(live_processes.Programs())
        cls.server = programs.start(BIN_DIR / "prefilld", live_processes.MODEL, "--metrics_listen=")

    def request(self, call):
        recorded = call["request"]
        params = dict(recorded["kv_transfer_params"] or {})
        if params.get("remote_port", 1) != 1:  # nothing listens at port 1
            params["remote_port"] = int(self.server.split(":")[1])
        tokens = [(i * i + recorded["prompt"]) % 256 for i in range(recorded["prompt"])]
        return types.SimpleNamespace(
            request_id=recorded["id"], num_prompt_tokens=len(tokens), prompt_token_ids=tokens,
            kv_transfer_params=params or None,
        )  # fmt: skip

    def test_the_connector_answers_vllm_as_it_did(self):
        scheduler, worker = connector(Role.SCHEDULER), connector(Role.WORKER)
        self.addCleanup(worker.shutdown)
        metadata, bad, recorded_bad, finished = deque(), Counter(), Counter(), []
        loaded = {}
        for call in CALLS:
            name, returned = call["call"], call["returned"]
            if name == "get_num_new_matched_tokens":
                made = scheduler.get_num_new_matched_tokens(self.request(call), call["computed"])
                self.assertEqual(list(made), returned, call)
            elif name == "update_state_after_alloc":
                blocks = types.SimpleNamespace(get_block_ids=lambda call=call: tuple(call["blocks"]))
                request = self.request(call)
                scheduler.update_state_after_alloc(request, blocks, call["external"])
                if call["external"]:
                    loaded[request.request_id] = (request, call["blocks"][0], call["external"])
            elif name == "build_connector_meta":
                made = scheduler.build_connector_meta(None)
                self.assertEqual([[load.request_id for load in made.loads], sorted(made.ended)], returned)
                metadata.append(pickle.loads(pickle.dumps(made)))  # workers are processes of their own
            elif name == "request_finished_all_groups":
                self.assertEqual(list(scheduler.request_finished_all_groups(self.request(call), call["blocks"])), returned)
                if self.is_good(load := loaded.get(call["request"]["id"])):  # its blocks are free from now on
                    self.compare(*load)
            elif name == "register_kv_caches":
                self.caches = {n: torch.full(shape, -1.0) for n, (shape, _, _) in call["caches"].items()}
                worker.register_kv_caches(self.caches)
            elif name == "start_load_kv":
                worker.bind_connector_metadata(metadata.popleft())
                self.assertEqual([load.request_id for load in worker._metadata.loads], call["loads"])
                worker.start_load_kv(None)
            elif name == "get_finished" and returned:
                deadline, done = time.monotonic() + PATIENCE, set()
                while done != set(returned) and time.monotonic() < deadline:
                    done |= worker.get_finished(set())[1] or set()
                    time.sleep(0.01)
                self.assertEqual(done, set(returned))
                finished += returned
            elif name == "get_block_ids_with_load_errors":
                recorded_bad.update(returned)
                bad.update(worker.get_block_ids_with_load_errors())
        self.assertEqual(bad, recorded_bad)
        self.assertTrue(recorded_bad and finished, "the record has a load that failed, and asynchronous ones")
        counts = worker.get_kv_connector_stats().data
        self.assertEqual(counts["loads_ok"] + counts["loads_failed"], len(loaded))
        self.assertEqual(counts["loads_ok"], sum(map(self.is_good, loaded.values())))

    def is_good(self, load):
        return load is not None and load[0].kv_transfer_params["remote_port"] != 1

    def compare(self, request, blocks, external):
        """The cache has the tokens that vLLM asked for, at their places."""
        tokens, size = request.prompt_token_ids, vllm_config().cache_config.block_size
        with PrefillClient(self.server) as client:
            with client.prefill(tokens, layout=Layout(128, dtype="fp32"), attention=Attention("dense")) as stream:
                whole = to_torch(stream.read_all())
        by_token = whole.flatten(2, 3)[:, :, : len(tokens)]  # [layers, 2, tokens, heads, head_dim]
        end = len(tokens) if request.kv_transfer_params.get("load_async", True) else len(tokens) - 1
        for layer, name in enumerate(sorted(self.caches, key=lambda n: int(re.search(r"\d+", n)[0]))):
            cache = self.caches[name][blocks]  # [blocks, heads, block_tokens, K and V]
            rows = cache.transpose(1, 2).flatten(0, 1)
            keys, values = rows.split(rows.shape[-1] // 2, -1)
            for kind, found in enumerate((keys, values)):
                wanted = by_token[layer, kind, end - external : end]
                torch.testing.assert_close(found[end - external : end], wanted, rtol=0, atol=0)
            self.assertEqual(size * len(blocks), len(rows))


class Ranks(unittest.TestCase):
    """The ranks of one engine, each with its share of the two KV heads, and their scheduler."""

    BLOCKS = [6, 2, 5, 1, 7, 3]

    def worker(self, config, rank, num_ranks):
        """Returns the connector of a rank, and its caches."""
        made = connector(Role.WORKER, config)
        self.addCleanup(made.shutdown)
        caches = {}
        for name, (shape, _, _) in calls("register_kv_caches")[0]["caches"].items():
            caches[name] = torch.full((8, 2 // num_ranks, *shape[2:]), -1.0)
        state = "prefilld.vllm.connector.get_tensor_model_parallel_"
        with mock.patch(f"{state}rank", lambda: rank), mock.patch(f"{state}world_size", lambda: num_ranks):
            made.register_kv_caches(caches)
        return made, caches

    def load(self, config, tokens, num_ranks=2):
        """Plans the load of a prompt as one engine, and runs it in all ranks. Returns their caches."""
        config.parallel_config.tensor_parallel_size = num_ranks
        scheduler = connector(Role.SCHEDULER, config)
        request = types.SimpleNamespace(
            request_id="tp", num_prompt_tokens=len(tokens), prompt_token_ids=tokens, kv_transfer_params=None
        )
        self.assertEqual(scheduler.get_num_new_matched_tokens(request, 0), (len(tokens), True))
        blocks = types.SimpleNamespace(get_block_ids=lambda: (self.BLOCKS,))
        scheduler.update_state_after_alloc(request, blocks, len(tokens))
        metadata = pickle.loads(pickle.dumps(scheduler.build_connector_meta(None)))
        ranks = [self.worker(config, rank, num_ranks) for rank in range(num_ranks)]
        for made, _ in reversed(ranks):  # rank 1 calls before rank 0
            made.bind_connector_metadata(metadata)
            made.start_load_kv(None)
        for made, _ in ranks:
            deadline, done = time.monotonic() + PATIENCE, set()
            while not done and time.monotonic() < deadline:
                done = made.get_finished(set())[1] or set()
                time.sleep(0.01)
            self.assertEqual((done, made.get_block_ids_with_load_errors()), ({"tp"}, set()))
        return [caches for _, caches in ranks]

    def compare(self, server, tokens, ranks):
        """Each rank's cache has what the server says of its heads."""
        with PrefillClient(server) as client:
            with client.prefill(tokens, layout=Layout(128, dtype="fp32"), attention=Attention("dense")) as stream:
                by_token = to_torch(stream.read_all()).flatten(2, 3)[:, :, : len(tokens)]
        heads = 2 // len(ranks)
        for rank, caches in enumerate(ranks):
            for layer, name in enumerate(sorted(caches, key=lambda n: int(re.search(r"\d+", n)[0]))):
                rows = caches[name][self.BLOCKS].transpose(1, 2).flatten(0, 1)[: len(tokens)]
                for kind, found in enumerate(rows.split(rows.shape[-1] // 2, -1)):
                    wanted = by_token[layer, kind, :, rank * heads : (rank + 1) * heads]
                    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


class TensorParallel(Ranks):
    def test_the_ranks_have_a_prompt_computed_once(self):
        programs = self.enterContext(live_processes.Programs())
        server = programs.start(BIN_DIR / "prefilld", live_processes.MODEL, "--metrics_listen=127.0.0.1:0")
        tokens = [(i * i + 5) % 256 for i in range(700)]
        ranks = self.load(vllm_config(prefill_address=[server], min_prompt_tokens=1), tokens)
        self.assertEqual(programs.metric(server, "prefilld_steps_total"), 8)
        self.assertEqual(programs.metric(server, "prefilld_prompt_tokens_count"), 1)
        self.assertEqual(programs.metric(server, 'prefilld_receivers_total{outcome="ok"}'), 1)
        self.compare(server, tokens, ranks)

    def test_the_ranks_have_a_prompt_computed_once_after_a_refusal(self):
        """The tenant has 1,000 tokens, and 100 more each second. Another prompt has just taken them."""
        programs = self.enterContext(live_processes.Programs())
        folder = Path(self.enterContext(tempfile.TemporaryDirectory(prefix="prefilld-ranks-")))
        allowance = {"name": "engine", "tokens_per_second": 100}
        (folder / "tenants.json").write_text(json.dumps({"tenants": [allowance, {"name": "default"}]}))
        flags = ("--metrics_listen=127.0.0.1:0", "--tenant_from=metadata", f"--tenants={folder / 'tenants.json'}")
        server = programs.start(BIN_DIR / "prefilld", live_processes.MODEL, *flags)
        tokens = [(i * i + 5) % 256 for i in range(300)]
        made = dict(metadata={"x-tenant": "engine"}, retries=2)
        config = vllm_config(prefill_address=[server], min_prompt_tokens=1, **made)
        with PrefillClient(server) as client, self.assertLogs("vllm.prefilld", "INFO") as logs:
            with client.prefill([7] * 1000, metadata=[("x-tenant", "engine")]) as other:
                ranks = self.load(config, tokens)
                other.read_all()
        again = [line for line in logs.output if "is tried again" in line]
        self.assertTrue(any("RESOURCE_EXHAUSTED" in line for line in again), logs.output)
        self.assertEqual(programs.metric(server, "prefilld_prompt_tokens_count"), 2)
        self.assertEqual(programs.metric(server, 'prefilld_receivers_total{outcome="ok"}'), 1)
        self.compare(server, tokens, ranks)


class BrokenConnections(Ranks):
    CUTS = 3

    def test_a_load_goes_on_where_it_stopped_and_nothing_is_computed_again(self):
        tokens = [(i * i + 5) % 256 for i in range(700)]
        for num_ranks in (1, 2):
            with self.subTest(num_ranks=num_ranks):
                programs = self.enterContext(live_processes.Programs())
                server = programs.start(BIN_DIR / "prefilld", live_processes.MODEL, "--metrics_listen=127.0.0.1:0")
                # 6.3 MB of KV in frames of 0.8 MB, or 0.4 MB of one head: each connection brings one or more.
                proxy = self.enterContext(FaultyProxy(server, 1_000_000, faults=self.CUTS))
                config = vllm_config(prefill_address=[f"127.0.0.1:{proxy.port}"], min_prompt_tokens=1)
                self.assertEqual(config.kv_transfer_config.kv_connector_extra_config["retries"], 0)
                ranks = self.load(config, tokens, num_ranks)
                self.assertGreater(proxy.connections, self.CUTS)
                self.assertEqual(programs.metric(server, "prefilld_steps_total"), 8)
                self.assertEqual(programs.metric(server, "prefilld_prompt_tokens_count"), 1)
                self.assertGreaterEqual(programs.metric(server, "prefilld_resumed_streams_total"), self.CUTS)
                self.compare(server, tokens, ranks)


class Start(unittest.TestCase):
    def test_an_engine_that_cannot_be_served_is_refused(self):
        config = vllm_config()
        config.parallel_config.pipeline_parallel_size = 2
        config.cache_config.cache_dtype = "fp8"
        config.model_config.dtype = torch.float64
        config.speculative_config = object()
        with self.assertRaises(ValueError) as caught:
            connector(Role.WORKER, config, groups=2)
        for text in ("pipeline_parallel_size is 2", "kv_cache_dtype is fp8", "float64", "draft model", "2 groups"):
            self.assertIn(text, str(caught.exception))
        with self.assertRaisesRegex(ValueError, "'adress' is unknown"):
            connector(Role.SCHEDULER, vllm_config(adress="x"))
        config = vllm_config()
        config.kv_transfer_config.kv_role = "kv_both"
        with self.assertRaisesRegex(ValueError, "kv_both"):
            connector(Role.SCHEDULER, config)

    def test_the_version_is_named_and_one_that_was_never_tried_is_warned_of(self):
        with self.assertLogs("vllm.prefilld", "INFO") as logs:
            connector(Role.SCHEDULER)
        self.assertIn("vLLM 0.32.0, scheduler; asynchronous loads", logs.output[0])
        sys.modules["vllm"].__version__ = "0.99.0"
        self.addCleanup(setattr, sys.modules["vllm"], "__version__", "0.32.0+cpu")
        with self.assertLogs("vllm.prefilld", "WARNING") as logs:
            connector(Role.SCHEDULER)
        self.assertIn("vLLM 0.99.0 was never tried; tried: 0.32.0", logs.output[0])

    def test_caches_that_nobody_can_fill_are_refused(self):
        caches = calls("register_kv_caches")[0]["caches"]
        tensors = {n: torch.zeros(1) for n in caches}
        for text, change, made in (
            ("expected", lambda c: None, {n.replace(".0.", ".9."): t for n, t in tensors.items()}),
            ("not in its name", lambda c: None, {"attention": torch.zeros(1)}),
            ("no do_kv_cache_update", lambda c: [delattr(m.impl, "do_kv_cache_update") for m in c.values()], tensors),
        ):
            config = vllm_config()
            change(config.compilation_config.static_forward_context)
            with self.assertRaisesRegex(ValueError, text):
                connector(Role.WORKER, config).register_kv_caches(made)


class Metrics(unittest.TestCase):
    def test_counts_of_all_ranks_are_summed_and_shown(self):
        stats = PrefilldStats({"loads_ok": 1, "load_seconds": 0.25}).aggregate(PrefilldStats({"loads_ok": 2, "loads_failed": 1}))
        self.assertEqual(stats.reduce(), {"loads_ok": 3, "load_seconds": 0.25, "loads_failed": 1})
        self.assertEqual((stats.is_empty(), PrefilldStats().is_empty()), (False, True))
        seen = Counter()

        class Metric:
            def __init__(self, name, documentation, labelnames):
                self.name = name

            def labels(self, *values):
                return types.SimpleNamespace(inc=lambda value: seen.update({(self.name, values): value}))

        shown = PrefilldPromMetrics(None, {"counter": Metric}, ["engine"], {0: ["0"]})
        shown.observe({**stats.data, "a count of a later version": 1})
        self.assertEqual(seen["vllm:prefilld_loads", ("0",)], 3)
        self.assertEqual(len(seen), 3)


if __name__ == "__main__":
    BIN_DIR = Path(sys.argv.pop(1)).resolve()
    unittest.main()
