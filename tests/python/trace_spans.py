"""Makes spans, in the form of OTLP's JSON, of the log lines of prefilld and its decode worker.

    python3 tests/python/trace_spans.py prefilld=prefilld.log decode-worker=worker.log

Each argument is the name of a service and its log (--log_format=json). A line with a span_id is a span; its stages become
spans below it. A collector that reads logs does the same.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable

INTERNAL, SERVER, CLIENT = 1, 2, 3  # SpanKind
OK, ERROR = 1, 2  # StatusCode

# Each event has a kind, and stages that follow each other from its start, with the field of their milliseconds.
EVENTS = {
    "request": (SERVER, (("queue", "queue_ms"), ("compute", "compute_ms"), ("send", "tail_ms"))),
    "receiver": (SERVER, ()),
    "lane": (SERVER, ()),
    "cache_watch": (SERVER, ()),
    "refused": (SERVER, ()),
    "push": (CLIENT, ()),
    "generate": (SERVER, (("prefill", "prefill_ms"), ("decode", "decode_ms"))),
    "receive": (SERVER, ()),
    "receive_refused": (SERVER, ()),
}
# These fields make the span itself; all others are its attributes.
OWN_FIELDS = ("time", "level", "event", "trace_id", "span_id", "parent_span_id", "start_unix_ns", "total_ms")


def spans_of_line(line: dict) -> list[dict]:
    """Returns the span of a line and those of its stages; none if the line is not of a span."""
    if line.get("event") not in EVENTS or "span_id" not in line:
        return []
    kind, stages = EVENTS[line["event"]]
    start = line["start_unix_ns"]
    total = _nanoseconds(line.get("total_ms", 0))
    failed = line.get("outcome", "ok") != "ok" or line.get("status", "OK") != "OK"
    attributes = {key: value for key, value in line.items() if key not in OWN_FIELDS}
    spans = [_span(line, line["span_id"], line.get("parent_span_id", ""), line["event"], kind, start, start + total)]
    spans[0]["attributes"] = [{"key": key, "value": _value(value)} for key, value in attributes.items()]
    spans[0]["status"] = {"code": ERROR, "message": line.get("status", "")} if failed else {"code": OK}
    at = start
    for name, field in stages:
        if field not in line:
            break
        end = min(at + _nanoseconds(line[field]), start + total)  # both were rounded
        span_id = hashlib.sha256(f"{line['span_id']} {name}".encode()).hexdigest()[:16]
        spans.append(_span(line, span_id, line["span_id"], f"{line['event']} {name}", INTERNAL, at, end))
        at = end
    return spans


def _nanoseconds(milliseconds: float) -> int:
    return round(milliseconds * 1e6)


def _span(line: dict, span_id: str, parent: str, name: str, kind: int, start: int, end: int) -> dict:
    return {
        "traceId": line["trace_id"], "spanId": span_id, "parentSpanId": parent, "name": name, "kind": kind,
        "startTimeUnixNano": str(start), "endTimeUnixNano": str(end),
    }  # fmt: skip


def _value(value) -> dict:
    if isinstance(value, float):
        return {"doubleValue": value}
    return {"intValue": str(value)} if isinstance(value, int) else {"stringValue": value}


def export(service: str, lines: Iterable[str]) -> dict:
    """Returns one of resourceSpans: the spans of a service's log."""
    spans = [span for line in lines if line.startswith("{") for span in spans_of_line(json.loads(line))]
    attributes = [{"key": "service.name", "value": {"stringValue": service}}]
    return {"resource": {"attributes": attributes}, "scopeSpans": [{"spans": spans}]}


def main() -> None:
    logs = (argument.split("=", 1) for argument in sys.argv[1:])
    resources = []
    for service, path in logs:
        with open(path) as log:
            resources.append(export(service, log))
    print(json.dumps({"resourceSpans": resources}, indent=1))


if __name__ == "__main__":
    main()
