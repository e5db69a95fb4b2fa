"""A PrefilldConnector that writes down how vLLM calls it, for vllm_connector_test.py to repeat without vLLM.

vllm_cases.py loads it in its case `record`. Each process appends lines of JSON to PREFILLD_RECORD.<role>.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from prefilld.vllm.connector import PrefilldConnector


def _request(request: Any) -> dict:
    return {
        "id": request.request_id,
        "prompt": request.num_prompt_tokens,
        "kv_transfer_params": request.kv_transfer_params,
        "status": request.status.name,
    }


class RecordingConnector(PrefilldConnector):
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any):
        self._record = open(f"{os.environ['PREFILLD_RECORD']}.{role.name.lower()}", "a", buffering=1)
        super().__init__(vllm_config, role, kv_cache_config)
        groups = [len(group.layer_names) for group in kv_cache_config.kv_cache_groups]
        self._write("__init__", role=role.name, groups=groups, block_size=vllm_config.cache_config.block_size,
                    dtype=str(vllm_config.model_config.dtype), cache_dtype=vllm_config.cache_config.cache_dtype)  # fmt: skip

    def _write(self, method: str, returned: Any = None, **arguments: Any) -> Any:
        line = {"at": time.monotonic(), "call": method, **arguments, "returned": returned}
        self._record.write(json.dumps(line, default=sorted) + "\n")
        return returned

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        made = super().get_num_new_matched_tokens(request, num_computed_tokens)
        self._write("get_num_new_matched_tokens", made, request=_request(request), computed=num_computed_tokens)
        return made

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        ids = [list(group) for group in blocks.get_block_ids()]
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        self._write("update_state_after_alloc", request=_request(request), blocks=ids, external=num_external_tokens)

    def build_connector_meta(self, scheduler_output):
        made = super().build_connector_meta(scheduler_output)
        self._write("build_connector_meta", [[load.request_id for load in made.loads], sorted(made.ended)])
        return made

    def request_finished_all_groups(self, request, block_ids):
        made = super().request_finished_all_groups(request, block_ids)
        ids = [list(group) for group in block_ids]
        self._write("request_finished_all_groups", made, request=_request(request), blocks=ids)
        return made

    def register_kv_caches(self, kv_caches):
        super().register_kv_caches(kv_caches)
        caches = {name: [list(t.shape), list(t.stride()), str(t.dtype)] for name, t in kv_caches.items()}
        modules = self._vllm_config.compilation_config.static_forward_context
        backends = sorted({type(modules[name].impl).__name__ for name in kv_caches})
        self._write("register_kv_caches", caches=caches, backends=backends)

    def start_load_kv(self, forward_context, **kwargs):
        metadata = self._get_connector_metadata()
        self._write("start_load_kv", loads=[load.request_id for load in metadata.loads], ended=metadata.ended)
        super().start_load_kv(forward_context, **kwargs)

    def get_finished(self, finished_req_ids):
        made = super().get_finished(finished_req_ids)
        self._write("get_finished", made[1], finished=finished_req_ids)
        return made

    def get_block_ids_with_load_errors(self):
        return self._write("get_block_ids_with_load_errors", super().get_block_ids_with_load_errors())

    def shutdown(self):
        self._write("shutdown")
        super().shutdown()
