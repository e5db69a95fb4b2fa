"""A KV connector of vLLM that takes the KV of prompts from prefilld servers.

vllm serve MODEL --kv-transfer-config '{"kv_connector": "PrefilldConnector", "kv_role": "kv_consumer",
    "kv_connector_module_path": "prefilld.vllm", "kv_load_failure_policy": "recompute",
    "kv_connector_extra_config": {"prefill_address": "prefill.example:50051"}}'
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefilld.vllm.connector import PrefilldConnector

__all__ = ["PrefilldConnector"]


def __getattr__(name: str):
    # The connector alone needs vLLM, and is imported when vLLM asks for it.
    if name == "PrefilldConnector":
        from prefilld.vllm.connector import PrefilldConnector

        return PrefilldConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
