"""The rows and panels of the dashboard: what they show, in which unit, and by which queries.

$instance is the variable that chooses servers, and $__rate_interval is Grafana's: four scrapes at least.
"""

from __future__ import annotations

from dataclasses import dataclass

RATE = "[$__rate_interval]"
# Other programs have metrics of these names too, and the variable may choose all instances.
OURS = 'job=~"prefilld|prefilld-decode-worker"'
SERVERS = 'job="prefilld"'


@dataclass(frozen=True)
class Query:
    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """kind: lines, stacked or number. unit: one of Grafana's. top: the end of the axis; None: open."""

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: str = "lines"
    width: int = 8
    top: float | None = None


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


def of(metric: str, labels: str = "") -> str:
    """Returns the selector of a metric of the servers that the dashboard shows."""
    more = f",{labels}" if labels else ""
    return f'{metric}{{instance=~"$instance"{more}}}'


def rate(metric: str, by: str = "", labels: str = "") -> str:
    """Returns what a counter of these servers gains in a second, in sum or by a label."""
    return f"sum{f' by ({by})' if by else ''} (rate({of(metric, labels)}{RATE}))"


def mean(histogram: str, by: str = "") -> str:
    return f"{rate(histogram + '_sum', by)} / {rate(histogram + '_count', by)}"


def quantile(q: float, histogram: str, by: str) -> str:
    return f"histogram_quantile({q}, {rate(histogram + '_bucket', 'le, ' + by)})"


TTFT = "prefilld_time_to_first_token_seconds"
FAILED = 'outcome=~"stalled|too_slow|lanes_missing|receiver_failed|damaged|not_resumed|internal|device_failed"'

NOW = Row(
    "Now",
    (
        Panel("Ready", "Servers that accept requests.", "none",
              (Query(f"sum({of('prefilld_ready')})", "ready"),), "number", 4),
        Panel("Requests per second", "Requests that ended, however they did.", "reqps",
              (Query(rate("prefilld_requests_total"), "requests"),), "number", 4),
        Panel("First token, p99", "Of all lengths and policies.", "s",
              (Query(f"histogram_quantile(0.99, {rate(TTFT + '_bucket', 'le')})", "p99"),), "number", 4),
        Panel("Failing", "Share of the requests that end by a fault of consumers, streams or the device.", "percentunit",
              (Query(f"{rate('prefilld_requests_total', labels=FAILED)} / {rate('prefilld_requests_total')}", "failing"),),
              "number", 4),
        Panel("Queue", "Time that the waiting tokens take at the speed of the last five minutes; the longest queue.", "s",
              (Query(f"max({of('prefilld_queued_tokens')} / clamp_min(rate({of('prefilld_prompt_tokens_sum')}[5m]), 1))", "queue"),),
              "number", 4),
        # Without the label, `or` would drop the second certificate of a process that has both.
        Panel("Next certificate to expire", "Servers' certificates, and those that are shown to them. Only where TLS is on.", "s",
              (Query(f"min({of('prefilld_certificate_expiry_timestamp_seconds')} or"
                     f" label_replace({of('prefilld_client_certificate_expiry_timestamp_seconds')},"
                     ' "certificate", "client", "", "")) - time()', "left"),), "number", 4),
    ),
)  # fmt: skip

FIRST_TOKEN = Row(
    "Time to the first token",
    (
        Panel("First token by length, p99", "Nine and ninety of a hundred requests had their first token by then.", "s",
              (Query(quantile(0.99, TTFT, "length"), "{{length}}"),)),
        Panel("First token by length and policy, p50", "The median.", "s",
              (Query(quantile(0.5, TTFT, "length, policy"), "{{policy}} {{length}}"),)),
        Panel("Stages of a request, mean", "Queue and computation make the first token; the rest of the request is its streams.", "s",
              (Query(mean("prefilld_queue_time_seconds"), "queue"),
               Query(mean("prefilld_compute_time_seconds"), "computation"),
               Query(mean("prefilld_request_time_seconds"), "whole request"))),
    ),
)  # fmt: skip

QUEUE = Row(
    "Queue",
    (
        Panel("Queue in tokens", "Prompts beyond the limit are refused.", "short",
              (Query(f"sum({of('prefilld_queued_tokens')})", "waiting"),
               Query(f"sum({of('prefilld_queued_tokens_limit')})", "limit"))),
        Panel("Requests", "Live requests also wait for their consumers.", "none",
              (Query(f"sum({of('prefilld_queued_requests')})", "waiting"),
               Query(f"sum({of('prefilld_running_requests')})", "computing"),
               Query(f"sum({of('prefilld_live_requests')})", "live"))),
        Panel("Prompt tokens per second", "Tokens of prompts whose requests ended, and the speed of the latest one alone.", "short",
              (Query(rate("prefilld_prompt_tokens_sum"), "served"),
               Query(f"max({of('prefilld_prompt_tokens_per_second')})", "latest prompt"))),
    ),
)  # fmt: skip

ATTENTION = Row(
    "Attention",
    (
        Panel("Density, mean", "Computed share of the causal attention blocks; 1 is dense.", "percentunit",
              (Query(mean("prefilld_attention_density"), "density"),), top=1),
        Panel("Heads per second", "Query heads by what was done for them, layer by layer.", "short",
              (Query(rate("prefilld_heads_total", "kind"), "{{kind}}"),), "stacked"),
        Panel("Policies", "Requests that began to compute, and those for which another policy ran than was asked for.", "reqps",
              (Query(rate("prefilld_policy_requests_total", "policy"), "{{policy}}"),
               Query(rate("prefilld_policy_fallbacks_total"), "fallbacks"))),
        Panel("Cost of patterns", "Share of the computation that went to estimating and building patterns.", "percentunit",
              (Query(f"{rate('prefilld_pattern_time_seconds_sum')} / {rate('prefilld_compute_time_seconds_sum')}", "patterns"),)),
        Panel("Recall", "Share of the true attention mass that sparse heads kept, of audited requests (--recall_audit_fraction).",
              "percentunit",
              (Query(mean("prefilld_attention_recall", "kind"), "{{kind}}, mean"),
               Query(f"min by (kind) ({of('prefilld_attention_recall_lowest')})", "{{kind}}, worst head of the latest")), top=1),
        Panel("Rise of perplexity over dense", "The cluster file's promise, and the measurements that it was made from.", "percentunit",
              (Query(f"max by (kind) ({of('prefilld_calibrated_perplexity_rise')})", "{{kind}}"),)),
    ),
)  # fmt: skip

KV = Row(
    "KV cache on its way",
    (
        Panel("KV throughput", "Payload handed to the transport, and what the decode workers verified and stored.", "Bps",
              (Query(rate("prefilld_kv_bytes_total"), "sent"),
               Query(f"sum (rate(prefilld_decode_kv_received_bytes_total{RATE}))", "received by decode workers"))),
        Panel("Stalls", "Share of the time of layers that went to waiting for consumers.", "percentunit",
              (Query(f"{rate('prefilld_stall_seconds_total')} / ({rate('prefilld_stall_seconds_total')}"
                     f" + {rate('prefilld_step_time_seconds_sum')})", "stalled"),), top=1),
        Panel("Transfers of decode workers", "By gRPC status.", "reqps",
              (Query(f"sum by (status) (rate(prefilld_decode_kv_transfers_total{RATE})) > 0", "{{status}}"),)),
        Panel("KV by transport", "Payload over gRPC, and in the memory of consumers on the server's host.", "Bps",
              (Query(rate("prefilld_kv_transport_bytes_total", "transport"), "{{transport}}"),), "stacked"),
        Panel("Memory of consumers", "Mapped for their KV; it counts as theirs (--shared_memory_bytes).", "bytes",
              (Query(f"sum({of('prefilld_shared_memory_bytes')})", "mapped"),
               Query(f"sum({of('prefilld_shared_memory_limit_bytes')})", "limit"))),
        Panel("Consumers that came for shared memory", "All but attached and attached_again get their KV over gRPC.", "cps",
              (Query(rate("prefilld_shared_memory_connections_total", "result"), "{{result}}"),), "stacked"),
    ),
)  # fmt: skip

RESUMPTION = Row(
    "Resumption and refusals",
    (
        Panel("Consumers away", "Requests whose connection broke and whose consumer may come back (--resume_window_s).", "none",
              (Query(f"sum({of('prefilld_waiting_for_consumer')})", "away"),)),
        Panel("Staging memory of those away", "At most half of the staging memory waits for them.", "bytes",
              (Query(f"sum({of('prefilld_waiting_for_consumer_bytes')})", "away"),
               Query(f"sum({of('prefilld_staging_capacity_bytes')}) / 2", "limit"))),
        Panel("Frames retained", "Frames of resumable requests that wait to be sent or acknowledged.", "none",
              (Query(f"sum({of('prefilld_kv_frames_retained')})", "frames"),)),
        Panel("Streams resumed", "Streams attached in place of broken ones, and requests that were not kept or not come back for.",
              "cps",
              (Query(rate("prefilld_resumed_streams_total"), "resumed"),
               Query(rate("prefilld_resume_refused_total"), "not kept"),
               Query(rate("prefilld_requests_total", labels='outcome="not_resumed"'), "ended"))),
        Panel("Frames sent again", "Because a stream was resumed, or because they arrived damaged.", "cps",
              (Query(rate("prefilld_kv_frames_resent_total", "cause"), "{{cause}}"),)),
        Panel("Refusals by cause", "Calls that were refused; causes without any are left out.", "reqps",
              (Query(f"{rate('prefilld_refusals_total', 'cause')} > 0", "{{cause}}"),), "stacked"),
        Panel("Open streams", "Calls that are not over, and the most that one connection has.", "none",
              (Query(f"sum({of('prefilld_open_streams')})", "all"),
               Query(f"max({of('prefilld_open_streams_of_one_connection')})", "of one connection"))),
    ),
)  # fmt: skip

MEMORY = Row(
    "Memory",
    (
        Panel("Memory", "Device memory is allocated at the start; on a CPU it is a part of the process's.", "bytes",
              (Query(f"sum({of('prefilld_device_memory_bytes')})", "device"),
               Query(f"sum({of('process_resident_memory_bytes', SERVERS)})", "process"))),
        Panel("KV in staging", "KV that waits for its consumer, in host memory.", "bytes",
              (Query(f"sum({of('prefilld_staged_bytes')})", "staged"),
               Query(f"sum({of('prefilld_staging_capacity_bytes')})", "capacity"))),
        Panel("Resident tokens", "Tokens of the prompts under way.", "short",
              (Query(f"sum({of('prefilld_resident_tokens')})", "under way"),
               Query(f"sum({of('prefilld_resident_tokens_limit')})", "limit"))),
    ),
)  # fmt: skip

ERRORS = Row(
    "Errors",
    (
        Panel("Requests that did not end well", "By outcome; server/outcome.h lists them.", "reqps",
              (Query(rate("prefilld_requests_total", "outcome", 'outcome!="ok"') + " > 0", "{{outcome}}"),)),
        Panel("Faults", "Device errors, connections not accepted, refused or given up, requests too late, log lines lost.", "cps",
              (Query(rate("prefilld_device_errors_total"), "device errors"),
               Query(rate("prefilld_accept_errors_total"), "not accepted"),
               Query(rate("prefilld_connections_refused_total"), "refused"),
               Query(rate("prefilld_connections_gone_total"), "peer vanished"),
               Query(rate("prefilld_requests_late_total"), "request too late"),
               Query(rate("prefilld_log_lines_dropped_total"), "log lines lost"))),
        Panel("Health", "1 is well. A server that drains is not ready.", "none",
              (Query(f"min({of('prefilld_ready')})", "ready"),
               Query(f"min({of('prefilld_progressing')})", "progressing"),
               Query(f"min({of('prefilld_reachable')})", "reachable")), top=1),
        Panel("Connections and descriptors", "Shares of the limits.", "percentunit",
              (Query(f"max({of('prefilld_connections')} / {of('prefilld_connections_limit')})", "connections"),
               Query(f"max({of('process_open_fds', OURS)} / {of('process_max_fds', OURS)})", "descriptors"))),
        Panel("Drain", "Time since a drain began, and the time after which it cuts off what is left.", "s",
              (Query(f"max({of('prefilld_drain_seconds')})", "drain"),
               Query(f"max({of('prefilld_drain_timeout_seconds')})", "--drain_timeout_s"))),
        Panel("Blocks of decode workers", "KV blocks of their pools.", "none",
              (Query("sum(prefilld_decode_kv_blocks - prefilld_decode_kv_free_blocks)", "in use"),
               Query("sum(prefilld_decode_kv_blocks)", "all"))),
    ),
)  # fmt: skip

PREFIX_CACHE = Row(
    "Prefix cache",
    (
        Panel("Hits", "Shares of the prompts of which a beginning was found, and of the tokens that were loaded.", "percentunit",
              (Query(f"{rate('prefilld_prefix_cache_hits_total')} / {rate('prefilld_prefix_cache_lookups_total')}", "prompts"),
               Query(f"{rate('prefilld_prefix_cache_hit_tokens_total')} / {rate('prefilld_prompt_tokens_sum')}", "tokens")),
              top=1),
        Panel("Blocks per second", "Blocks of 128 tokens that were stored, made room, or found none.", "cps",
              (Query(rate("prefilld_prefix_cache_stored_blocks_total"), "stored"),
               Query(rate("prefilld_prefix_cache_evicted_blocks_total"), "made room"),
               Query(rate("prefilld_prefix_cache_skipped_blocks_total"), "found no room"))),
        Panel("Cached KV", "Host memory of the prefix cache.", "bytes",
              (Query(f"sum({of('prefilld_prefix_cache_bytes')})", "in use"),
               Query(f"sum({of('prefilld_prefix_cache_capacity_bytes')})", "capacity"))),
    ),
)  # fmt: skip

TENANTS = Row(
    "Tenants",
    (
        Panel("Device time", "Seconds of the device per second.", "percentunit",
              (Query(rate("prefilld_tenant_device_seconds_total", "tenant"), "{{tenant}}"),), "stacked"),
        Panel("Waiting requests", "Requests that wait to compute.", "none",
              (Query(f"sum by (tenant) ({of('prefilld_tenant_queued_requests')})", "{{tenant}}"),)),
        Panel("Refused requests", "No room, a limit reached or a deadline out of reach.", "reqps",
              (Query(rate("prefilld_tenant_refused_total", "tenant"), "{{tenant}}"),)),
    ),
)  # fmt: skip

ROWS = (NOW, FIRST_TOKEN, QUEUE, ATTENTION, KV, RESUMPTION, MEMORY, ERRORS, PREFIX_CACHE, TENANTS)
