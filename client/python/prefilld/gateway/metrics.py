"""The page /metrics, for Prometheus. Belongs to one event loop."""

from __future__ import annotations

import prometheus_client

from prefilld.gateway.peers import DecodeGroup, PrefillGroup

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)


class Metrics:
    def __init__(self, prefills: PrefillGroup, workers: DecodeGroup):
        self._registry = prometheus_client.CollectorRegistry()
        self._prefills = prefills
        self._workers = workers
        self._requests = self._counter(
            "prefilld_gateway_requests_total",
            "Requests by route (completions, chat, prefill_call) and outcome: ok, cancelled (the client left), "
            "stream_failed, or the code of HTTP",
            "route", "outcome",
        )  # fmt: skip
        self._running = self._gauge("prefilld_gateway_running_requests", "Requests that are being answered")
        self._chosen = self._counter("prefilld_gateway_chosen_total", "Prompts by the prefilld chosen", "server")
        self._prompt_tokens = self._counter("prefilld_gateway_prompt_tokens_total", "Tokens of prompts", "server")
        self._prefix_tokens = self._counter(
            "prefilld_gateway_prefix_tokens_total",
            "Tokens of prompts that the chosen server should have in its prefix cache",
            "server",
        )
        self._prefix_hits = self._counter(
            "prefilld_gateway_prefix_hits_total", "Prompts sent where their beginning was sent before", "server"
        )
        self._unread = self._counter(
            "prefilld_gateway_unread_prompts_total", "Prefill calls whose prompt the gateway could not make tokens of"
        )
        self._first_token = prometheus_client.Histogram(
            "prefilld_gateway_first_token_seconds",
            "From the arrival of a request to its first token",
            registry=self._registry,
            buckets=_SECONDS,
        )
        self._up = self._gauge("prefilld_gateway_server_up", "1 if the server takes requests", "kind", "server")
        self._queue = self._gauge(
            "prefilld_gateway_queued_tokens", "Tokens that wait at a prefilld, as the gateway counts them", "server"
        )
        # Routers that choose among pods read these two; the names are in deploy/kubernetes/overlays/gateway.
        self._server_queued = self._gauge(
            "prefilld_gateway_server_queued_requests", "Requests that wait at a prefilld, as it said last", "server"
        )
        self._server_running = self._gauge(
            "prefilld_gateway_server_running_requests", "Requests that a prefilld computes, as it said last", "server"
        )
        self._told = self._gauge(
            "prefilld_gateway_told_blocks",
            "Blocks in a prefix cache, where the server tells",
            "server",
        )

    def _counter(self, name: str, text: str, *labels: str) -> prometheus_client.Counter:
        return prometheus_client.Counter(name, text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str, *labels: str) -> prometheus_client.Gauge:
        return prometheus_client.Gauge(name, text, labels, registry=self._registry)

    def request_began(self) -> None:
        self._running.inc()

    def request_ended(self, route: str, outcome: str) -> None:
        self._running.dec()
        self._requests.labels(route, outcome).inc()

    def count_choice(self, server: str, num_tokens: int, cached_tokens: int) -> None:
        self._chosen.labels(server).inc()
        self._prompt_tokens.labels(server).inc(num_tokens)
        self._prefix_tokens.labels(server).inc(cached_tokens)
        self._prefix_hits.labels(server).inc(cached_tokens > 0)

    def count_unread_prompt(self) -> None:
        self._unread.inc()

    def observe_first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def page(self) -> tuple[bytes, str]:
        """Returns the page and its content type."""
        for member in self._prefills.members:
            self._up.labels(member.kind, member.address).set(member.is_up)
            self._queue.labels(member.address).set(member.route.queue)
            if member.info is not None:
                self._server_queued.labels(member.address).set(member.info.queued_requests)
                self._server_running.labels(member.address).set(member.info.running_requests)
            self._told.labels(member.address).set(len(member.route.told))
        for member in self._workers.members:
            self._up.labels(member.kind, member.address).set(member.is_up)
        return prometheus_client.generate_latest(self._registry), prometheus_client.CONTENT_TYPE_LATEST
