"""The connector's counts, as vLLM's log and its Prometheus endpoint show them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

# Name and help of the metric, by the loader's name of the count.
_COUNTERS = {
    "loads_ok": ("vllm:prefilld_loads", "Prompts whose KV was loaded from prefilld."),
    "loads_failed": ("vllm:prefilld_failed_loads", "Loads from prefilld that failed."),
    "loads_cancelled": ("vllm:prefilld_cancelled_loads", "Loads that ended because their request was gone."),
    "loaded_tokens": ("vllm:prefilld_loaded_tokens", "Prompt tokens whose KV came from prefilld."),
    "loaded_bytes": ("vllm:prefilld_loaded_bytes", "Bytes of KV that came from prefilld."),
    "load_seconds": ("vllm:prefilld_load_seconds", "Time of all loads, waiting and computing there included."),
}


@dataclass
class PrefilldStats(KVConnectorStats):
    """Sums by name, over all workers."""

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        return {name: round(value, 3) for name, value in self.data.items()}

    def is_empty(self) -> bool:
        return not self.data


class PrefilldPromMetrics(KVConnectorPromMetrics):
    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any):
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            key: {
                engine: counter.labels(*values)
                for counter in (self._counter_cls(name=name, documentation=text, labelnames=labelnames),)
                for engine, values in per_engine_labelvalues.items()
            }
            for key, (name, text) in _COUNTERS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for key, value in transfer_stats_data.items():
            if key in self._counters:
                self._counters[key][engine_idx].inc(value)
