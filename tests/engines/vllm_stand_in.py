"""The part of vLLM that the connector imports, for tests without it. Import this, install() it, then the connector."""

import dataclasses
import enum
import sys
import types


class KVConnectorBase_V1:
    """The part of vLLM's class that the connector uses."""

    def __init__(self, vllm_config, role, kv_cache_config):
        self._vllm_config, self._metadata = vllm_config, None

    def bind_connector_metadata(self, metadata):
        self._metadata = metadata

    def _get_connector_metadata(self):
        assert self._metadata is not None
        return self._metadata


class Role(enum.Enum):
    SCHEDULER = 0
    WORKER = 1


@dataclasses.dataclass
class Stats:
    data: dict = dataclasses.field(default_factory=dict)


class PromMetrics:
    def __init__(self, vllm_config, metric_types, labelnames, per_engine_labelvalues):
        self._counter_cls = metric_types["counter"]


def install() -> None:
    """Puts modules of vLLM's names in place, as far as the connector imports them."""
    connectors = "vllm.distributed.kv_transfer.kv_connector.v1"
    modules = {
        "vllm": dict(__version__="0.32.0+cpu"),
        "vllm.distributed.parallel_state": dict(
            get_tensor_model_parallel_rank=lambda: 0, get_tensor_model_parallel_world_size=lambda: 1
        ),
        f"{connectors}.base": dict(
            KVConnectorBase_V1=KVConnectorBase_V1, KVConnectorMetadata=type("KVConnectorMetadata", (), {}),
            KVConnectorRole=Role, SupportsHMA=type("SupportsHMA", (), {}),
        ),
        f"{connectors}.metrics": dict(KVConnectorStats=Stats, KVConnectorPromMetrics=PromMetrics),
    }  # fmt: skip
    for name, contents in modules.items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        vars(sys.modules[name]).update(contents)
