"""The scheduler's side: which prompts are loaded, and from which token on. Nothing here needs vLLM."""

from __future__ import annotations

import hashlib
import itertools
import logging
import secrets
from typing import Any

from prefilld.vllm.config import ConnectorConfig, Load, SharedPrefill, Wish

logger = logging.getLogger("vllm.prefilld")


class LoadPlanner:
    """Called by vLLM's scheduler, in one thread. `request` is vLLM's Request throughout."""

    def __init__(self, config: ConnectorConfig, num_ranks: int = 1):
        """num_ranks: tensor-parallel workers, each of which gets every load."""
        self._config = config
        self._num_ranks = num_ranks
        self._turns = itertools.count()
        self._wishes: dict[str, Wish | None] = {}  # by request, from the first question to its end
        self._offered: dict[str, int] = {}  # the first token that vLLM lacks, by request
        self._loaded: set[str] = set()  # requests that have had their load
        self._loads: list[Load] = []
        self._ended: set[str] = set()

    def offer(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Answers how many tokens behind the computed ones can be loaded, and whether asynchronously.

        vLLM may ask several times, and asks again after a load that failed: the prompt is then left to it.
        """
        wish = self._wish_of(request)
        if wish is None or request.request_id in self._loaded:
            return 0, False
        # vLLM computes the last token of the prompt by itself, but after an asynchronous load only if it has all.
        count = request.num_prompt_tokens - num_computed_tokens - (0 if wish.load_async else 1)
        named = (request.kv_transfer_params or {}).get("do_remote_prefill")
        if count < (1 if named else self._config.min_prompt_tokens):
            return 0, False
        self._offered[request.request_id] = num_computed_tokens
        return count, wish.load_async

    def accept(self, request: Any, block_ids: list[int], num_tokens: int) -> None:
        """Takes vLLM's answer: blocks for the offered tokens, or 0 tokens."""
        first = self._offered.pop(request.request_id, None)
        if num_tokens == 0 or first is None:
            return
        wish = self._wishes[request.request_id]
        salt = getattr(request, "cache_salt", None)
        self._loads.append(
            Load(
                request_id=request.request_id,
                tokens=list(request.prompt_token_ids),
                block_ids=list(block_ids),
                first_token=first,
                end_token=first + num_tokens,
                is_async=wish.load_async,
                address=wish.address,
                attention=wish.attention,
                priority=wish.priority,
                # vLLM's salts may have any length and characters.
                cache_salt=hashlib.sha256(salt.encode()).hexdigest() if salt else "",
                shared=self._share(wish) if self._num_ranks > 1 else None,
            )
        )
        self._loaded.add(request.request_id)

    def _share(self, wish: Wish) -> SharedPrefill:
        # The ranks must meet at one server, also when they try again, so the order is chosen here.
        addresses = self._config.addresses if wish.address is None else (wish.address,)
        first = next(self._turns) % len(addresses)
        in_turn = addresses[first:] + addresses[:first]
        return SharedPrefill(in_turn, f"vllm-{secrets.token_hex(16)}", secrets.token_hex(32))

    def end(self, request_id: str) -> None:
        """Forgets a request that is done, aborted or failed. May be called twice."""
        if request_id in self._loaded:
            self._ended.add(request_id)
        self._loaded.discard(request_id)
        self._offered.pop(request_id, None)
        self._wishes.pop(request_id, None)

    def take(self) -> tuple[list[Load], set[str]]:
        """Returns the loads to start, and the requests whose loads, if they still run, must end."""
        loads, ended = self._loads, self._ended
        self._loads, self._ended = [], set()
        return [load for load in loads if load.request_id not in ended or load.is_async], ended

    def _wish_of(self, request: Any) -> Wish | None:
        if request.request_id not in self._wishes:
            try:
                wish = Wish.of(request.kv_transfer_params, self._config)
            except (ValueError, TypeError, AttributeError) as error:
                logger.warning("request %s is prefilled here: kv_transfer_params: %s", request.request_id, error)
                wish = None
            if wish is not None and (reason := _reason_against(request)):
                logger.warning("request %s is prefilled here: it has %s", request.request_id, reason)
                wish = None
            self._wishes[request.request_id] = wish
        return self._wishes[request.request_id]


def _reason_against(request: Any) -> str | None:
    """Returns what only vLLM can prefill, if the request has it."""
    if request.prompt_token_ids is None or getattr(request, "prompt_embeds", None) is not None:
        return "embeddings for a prompt"
    if getattr(request, "mm_features", None):
        return "parts that are no text"
    if getattr(request, "lora_request", None) is not None:
        return "a LoRA adapter"
    if getattr(request, "pooling_params", None) is not None:
        return "no tokens to generate"
    return None
