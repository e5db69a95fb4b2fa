"""Tests that a trace goes through a decode worker, prefilld and a push, and that spans can be made of the logs.

    python3 tests/python/tracing_test.py build/release/bin

Exits with 77 (skipped, for CTest) without the client's packages.
"""

import json
import sys
import time
import unittest
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "client" / "python"), str(ROOT / "tests" / "evaluation")]
import live_processes  # noqa: E402

if live_processes.reason_to_skip():
    print(f"skipped: {live_processes.reason_to_skip()}")
    sys.exit(77)

import grpc  # noqa: E402
import trace_spans  # noqa: E402
from prefilld import Attention, DecodeClient, Delivery, Layout, PrefillClient, PrefilldError, wire  # noqa: E402

TEXT = "The old fisher carried a lantern to the harbour, and the harbour was quiet. "
PROMPT = [256, *TEXT.encode() * 10]
CALLER = "00f067aa0ba902b7"  # the span of whoever calls
PATIENCE = 60  # seconds, on a machine that is busy with other things
# A span of another process may end a moment after its parent: a server hears of the end of a call after its caller.
LATE_NS = 1_000_000_000
# Starts are of the wall clock, ends of the monotonic one.
SKEW_NS = 5_000_000


class Tracing(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.programs = cls.enterClassContext(live_processes.Programs())
        flags = ("--metrics_listen=127.0.0.1:0", "--log_format=json")
        cls.server = cls.programs.start(
            BIN_DIR / "prefilld", live_processes.MODEL, *flags, "--deliver_to_allow=127.0.0.1:*",
            "--prefix_cache_bytes=16777216", "--cache_watchers=all",
        )  # fmt: skip
        cls.worker = cls.programs.start(
            BIN_DIR / "prefilld-decode-worker", live_processes.MODEL, *flags, f"--prefill_address={cls.server}"
        )
        cls.prefill = cls.enterClassContext(PrefillClient(cls.server))
        cls.decode = cls.enterClassContext(DecodeClient(cls.worker))

    def spans(self, trace: str, count: int) -> list[dict]:
        """Waits until the logs have so many spans of a trace, stages aside, and returns all of it."""
        deadline = time.monotonic() + PATIENCE
        while True:
            logs = {"prefilld": self.programs.log(self.server), "worker": self.programs.log(self.worker)}
            resources = [trace_spans.export(name, log.splitlines()) for name, log in logs.items()]
            spans = [span for one in resources for span in one["scopeSpans"][0]["spans"] if span["traceId"] == trace]
            if sum(span["kind"] != trace_spans.INTERNAL for span in spans) >= count:
                return spans
            self.assertLess(time.monotonic(), deadline, f"{len(spans)} spans came")
            time.sleep(0.1)

    def check_well_formed(self, spans: list[dict]) -> dict[str, dict]:
        """Checks ids, parents and times. Returns the spans by their names."""
        by_id = {span["spanId"]: span for span in spans}
        self.assertEqual(len(by_id), len(spans), "ids are unique")
        for span in spans:
            self.assertRegex(span["traceId"], "^[0-9a-f]{32}$")
            self.assertRegex(span["spanId"], "^[0-9a-f]{16}$")
            start, end = int(span["startTimeUnixNano"]), int(span["endTimeUnixNano"])
            self.assertLess(start, end, span["name"])
            self.assertLess(abs(end / 1e9 - time.time()), 600)
            if span["parentSpanId"] == CALLER:
                continue
            parent = by_id[span["parentSpanId"]]
            inner = span["kind"] == trace_spans.INTERNAL
            begin, finish = int(parent["startTimeUnixNano"]), int(parent["endTimeUnixNano"])
            self.assertGreaterEqual(start, begin - (0 if inner else SKEW_NS), f"{span['name']} in {parent['name']}")
            self.assertLessEqual(end, finish + (0 if inner else LATE_NS), f"{span['name']} in {parent['name']}")
        return {span["name"]: span for span in spans}

    def test_a_pulled_cache(self):
        trace = "11" * 16
        stream = self.decode.generate(
            PROMPT, 6, ignore_eos=True,
            metadata=[("traceparent", f"00-{trace}-{CALLER}-01"), ("tracestate", "vendor=value")],
        )  # fmt: skip
        self.assertEqual(len(list(stream)), 6)
        named = self.check_well_formed(self.spans(trace, 2))
        self.assertEqual(
            set(named),
            {"generate", "generate prefill", "generate decode"}
            | {"request", "request queue", "request compute", "request send"},
        )
        self.assertEqual(named["generate"]["parentSpanId"], CALLER)
        self.assertEqual(named["request"]["parentSpanId"], named["generate"]["spanId"])

    def test_a_pushed_cache(self):
        trace = "22" * 16
        metadata = [("traceparent", f"00-{trace}-{CALLER}-01")]
        generation = self.decode.generate(PROMPT, 6, ignore_eos=True, pushed_transfer_id="t", metadata=metadata)
        layout = Layout.from_wire(generation.wait_started().kv_layout)
        list(self.prefill.prefill(PROMPT, layout=layout, deliver_to=Delivery(self.worker, "t"), metadata=metadata))
        self.assertEqual(len(list(generation)), 6)
        named = self.check_well_formed(self.spans(trace, 4))
        self.assertEqual(named["request"]["parentSpanId"], CALLER)
        self.assertEqual(named["push"]["parentSpanId"], named["request"]["spanId"])
        self.assertEqual(named["receive"]["parentSpanId"], named["push"]["spanId"])
        self.assertEqual(named["generate"]["parentSpanId"], CALLER)
        attributes = {entry["key"]: entry["value"] for entry in named["request"]["attributes"]}
        self.assertIn("grpc-python", attributes["user_agent"]["stringValue"])
        self.assertEqual(attributes["tokens"], {"intValue": str(len(PROMPT))})

    def test_lanes_are_parts_of_their_request_if_its_caller_records_the_trace(self):
        for trace, flags, lanes in (("33" * 16, "01", 2), ("44" * 16, "00", 0)):
            metadata = [("traceparent", f"00-{trace}-{CALLER}-{flags}")]
            list(self.prefill.prefill(PROMPT, lanes=3, metadata=metadata))
            spans = self.spans(trace, 1 + lanes)
            request = self.check_well_formed(spans)["request"]
            found = [span for span in spans if span["name"] == "lane"]
            self.assertEqual(len(found), lanes)
            for lane in found:
                self.assertEqual(lane["parentSpanId"], request["spanId"])

    def test_a_stream_in_place_of_a_broken_one_is_a_part_of_its_request(self):
        trace = "55" * 16
        stream = self.prefill.submit(
            PROMPT, resumable=True, metadata=[("traceparent", f"00-{trace}-{CALLER}-01")], attention=Attention("dense")
        )
        stream.wait_accepted()
        stream._lane0.cancel()  # as a broken connection does
        stream.read_all()
        stream.close()
        named = self.check_well_formed(self.spans(trace, 2))
        self.assertEqual(named["lane"]["parentSpanId"], named["request"]["spanId"])
        resumed = [line for line in self.log_lines() if line["event"] == "stream_resumed"]
        self.assertEqual(resumed[-1]["trace_id"], trace)

    def test_whoever_follows_the_cache_has_a_span_from_beginning_to_end(self):
        trace = "66" * 16
        with self.prefill.watch_prefix_cache(metadata=[("traceparent", f"00-{trace}-{CALLER}-01")]) as updates:
            next(updates)
            time.sleep(0.05)
        named = self.check_well_formed(self.spans(trace, 1))
        self.assertEqual(named["cache_watch"]["parentSpanId"], CALLER)
        watch = named["cache_watch"]
        self.assertGreater(int(watch["endTimeUnixNano"]) - int(watch["startTimeUnixNano"]), 50_000_000)

    def test_refusals_have_a_span_that_ends_with_them(self):
        trace = "77" * 16
        metadata = [("traceparent", f"00-{trace}-{CALLER}-01")]
        with self.assertRaises(PrefilldError):
            list(self.prefill.prefill([10**6], metadata=metadata))
        stub = self.prefill._servers.only().resumption()
        with self.assertRaises(grpc.RpcError):
            list(stub.Resume(wire.ResumeRequest(request_id="nobody"), metadata=metadata))
        named = self.check_well_formed(self.spans(trace, 2))
        self.assertEqual(set(named), {"request", "refused"})
        (line,) = [line for line in self.log_lines() if line["event"] == "refused" and line["trace_id"] == trace]
        self.assertEqual((line["method"], line["id"], line["cause"]), ("Resume", "nobody", "over"))

    def test_a_context_that_is_not_valid_is_counted_and_starts_a_new_trace(self):
        before = self.programs.metric(self.server, "prefilld_trace_contexts_ignored_total")
        at_worker = self.programs.metric(self.worker, "prefilld_decode_trace_contexts_ignored_total")
        hostile = [("traceparent", "00-" + "0" * 32 + f"-{CALLER}-01"), ("tracestate", 'a="\\x1b[31m')]
        list(self.prefill.prefill(PROMPT, request_id="hostile", metadata=hostile))
        list(self.decode.generate(PROMPT, 2, metadata=hostile))
        self.assertEqual(self.programs.metric(self.server, "prefilld_trace_contexts_ignored_total"), before + 1)
        self.assertEqual(
            self.programs.metric(self.worker, "prefilld_decode_trace_contexts_ignored_total"), at_worker + 1
        )
        deadline = time.monotonic() + PATIENCE
        while not (lines := [line for line in self.log_lines() if line.get("id") == "hostile"]):
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.1)
        self.assertRegex(lines[0]["trace_id"], "^[0-9a-f]*[1-9a-f][0-9a-f]*$")
        self.assertNotIn("parent_span_id", lines[0])

    def log_lines(self) -> list[dict]:
        return [json.loads(line) for line in self.programs.log(self.server).splitlines() if line.startswith("{")]

    def test_no_line_holds_a_prompt(self):
        list(self.prefill.prefill(PROMPT, request_id="quiet"))
        deadline = time.monotonic() + PATIENCE
        while not any(line.get("id") == "quiet" for line in self.log_lines()):
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.1)
        for log in (self.programs.log(self.server), self.programs.log(self.worker)):
            self.assertNotIn(", ".join(map(str, PROMPT[5:10])), log)
            self.assertNotIn(",".join(map(str, PROMPT[5:10])), log)
            self.assertNotIn("fisher", log)

    def test_no_page_of_metrics_holds_a_prompt(self):
        pages = []
        with self.prefill.prefill(PROMPT, request_id="unseen", layout=Layout(block_tokens=64)) as stream:
            for _ in stream:  # it is under way
                pages.append(self.page_of(self.server))
        list(self.decode.generate(PROMPT, max_new_tokens=2))
        deadline = time.monotonic() + PATIENCE
        while "prefilld_prompt_tokens_count 0" in (last := self.page_of(self.server)):
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.1)
        for page in (*pages, last, self.page_of(self.worker)):
            self.assertIn("process_resident_memory_bytes", page)
            for told in ("fisher", "unseen", *(separator.join(map(str, PROMPT[5:10])) for separator in (",", ", ", " "))):
                self.assertNotIn(told, page)

    def page_of(self, address: str) -> str:
        with urllib.request.urlopen(f"http://{self.programs.metrics_address(address)}/metrics", timeout=30) as page:
            return page.read().decode()


if __name__ == "__main__":
    BIN_DIR = Path(sys.argv.pop(1)).resolve()
    unittest.main(verbosity=2)
