"""PrefilldConnector: how vLLM calls the planner and the loader."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

from prefilld.vllm.cache_order import interleaved_order, rows_of
from prefilld.vllm.config import ConnectorConfig, Load
from prefilld.vllm.loader import CacheShape, Loader
from prefilld.vllm.metrics import PrefilldPromMetrics, PrefilldStats
from prefilld.vllm.planner import LoadPlanner

logger = logging.getLogger("vllm.prefilld")

TRIED = ("0.32.0",)  # vLLM's connector interface is experimental: other versions may need another connector
_WIRE_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass
class LoadMetadata(KVConnectorMetadata):
    """From the scheduler to the workers, with each step."""

    loads: list[Load] = field(default_factory=list)
    ended: set[str] = field(default_factory=set)


class PrefilldConnector(KVConnectorBase_V1, SupportsHMA):
    """Takes the KV of prompts from prefilld servers. It is a consumer alone: nothing is sent or saved."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self._config = ConnectorConfig.read(dict(transfer.kv_connector_extra_config))
        if transfer.kv_role != "kv_consumer":
            raise ValueError(f"kv_role is {transfer.kv_role!r}; PrefilldConnector is a kv_consumer")
        _check_engine(vllm_config, kv_cache_config)
        version = vllm.__version__.split("+")[0]
        if version not in TRIED:
            logger.warning("prefilld: vLLM %s was never tried; tried: %s", version, ", ".join(TRIED))
        logger.info(
            "prefilld: vLLM %s, %s; %s loads from %s", version, role.name.lower(),
            "asynchronous" if self._config.load_async else "blocking",
            ", ".join((*self._config.addresses, *self._config.prefill_allow)) or "no server: none is allowed",
        )  # fmt: skip
        num_ranks = getattr(vllm_config.parallel_config, "tensor_parallel_size", 1)
        self._planner = LoadPlanner(self._config, num_ranks) if role == KVConnectorRole.SCHEDULER else None
        self._loader: Loader | None = None

    # The scheduler's side.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._planner.offer(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._planner.accept(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return LoadMetadata(*self._planner.take())

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        self._planner.end(request.request_id)
        return False, None

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids)

    # The workers' side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._loader = Loader(self._config, _shape_of(self._vllm_config, kv_caches))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        if self._loader is None or not isinstance(metadata, LoadMetadata):
            return
        self._loader.start(metadata.loads)
        self._loader.cancel(metadata.ended)

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        return

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, (self._loader.take_finished() or None) if self._loader else None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._loader.take_bad_blocks() if self._loader else set()

    def get_kv_connector_stats(self) -> PrefilldStats | None:
        counts = self._loader.take_counts() if self._loader else {}
        return PrefilldStats(counts) if counts else None

    def shutdown(self) -> None:
        if self._loader is not None:
            self._loader.close()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> PrefilldStats | None:
        return PrefilldStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any
    ) -> PrefilldPromMetrics:
        return PrefilldPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def _check_engine(vllm_config: Any, kv_cache_config: Any) -> None:
    """Raises ValueError with all that the connector cannot serve."""
    wrong = []
    parallel = vllm_config.parallel_config
    for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) != 1:
            wrong.append(f"{name} is {getattr(parallel, name)}; it must be 1")
    if vllm_config.model_config.dtype not in _WIRE_DTYPES:
        wrong.append(f"the model computes in {vllm_config.model_config.dtype}; it must be one of {list(_WIRE_DTYPES)}")
    if vllm_config.cache_config.cache_dtype not in ("auto", *(str(d).removeprefix("torch.") for d in _WIRE_DTYPES)):
        wrong.append(f"kv_cache_dtype is {vllm_config.cache_config.cache_dtype}; it must be the model's")
    if getattr(vllm_config, "speculative_config", None) is not None:
        wrong.append("there is a draft model, whose cache nobody fills")
    groups = getattr(kv_cache_config, "kv_cache_groups", None)
    if groups is not None and len(groups) != 1:
        wrong.append(f"the cache has {len(groups)} groups of layers; all layers must have full attention")
    if wrong:
        raise ValueError("PrefilldConnector: " + "; ".join(wrong))


def _shape_of(vllm_config: Any, kv_caches: dict[str, torch.Tensor]) -> CacheShape:
    names: dict[int, str] = {}
    for name in kv_caches:
        found = re.findall(r"\.(\d+)\.", name)
        if len(found) != 1 or int(found[0]) in names:
            raise ValueError(f"the number of the layer {name!r} is not in its name")
        names[int(found[0])] = name
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"the cache has the layers {sorted(names)}; all from 0 on were expected")
    layers = [vllm_config.compilation_config.static_forward_context[names[i]] for i in range(len(names))]
    caches = [kv_caches[names[i]] for i in range(len(names))]
    without = {type(layer.impl).__name__ for layer in layers if not hasattr(layer.impl, "do_kv_cache_update")}
    if without:
        raise ValueError(f"attention backend {', '.join(without)} has no do_kv_cache_update to write its cache with")
    device = caches[0].device

    # The backend writes its own cache: the order of the bytes behind the tensor's shape is its secret.
    def write(layer: int, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        module = layers[layer]
        module.impl.do_kv_cache_update(module, keys.to(device), values.to(device), caches[layer], slots)

    total_heads = vllm_config.model_config.get_total_num_kv_heads()
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    num_heads, head_dim = max(1, total_heads // ranks), vllm_config.model_config.get_head_size()
    block_tokens = vllm_config.cache_config.block_size
    orders = {
        interleaved_order(cache, block_tokens, num_heads, head_dim, partial(layer.impl.do_kv_cache_update, layer))
        for layer, cache in zip(layers, caches)
    }
    order = orders.pop() if len(orders) == 1 else None
    logger.info("prefilld: blocks of the cache are %s", f"copied as {order}" if order else "written by the backend")
    return CacheShape(
        rank=rank,
        num_ranks=ranks,
        num_layers=len(layers),
        first_head=rank * total_heads // ranks,  # a head that several ranks have comes to each
        num_heads=num_heads,
        head_dim=head_dim,
        block_tokens=block_tokens,
        dtype=_WIRE_DTYPES[vllm_config.model_config.dtype],
        device=device,
        write=write,
        order=order,
        memory=lambda layer: rows_of(caches[layer]),
    )
