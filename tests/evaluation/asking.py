"""Asks one prompt under one setting, and makes a record of what came back.

A question at the end goes to the decode worker, which generates the answer from the transferred cache. Everything else
is graded inside the prompt, which prefilld does alone: no cache is sent.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

import prompts
import scoring
import settings
from prefilld import Attention, DecodeClient, Layout, PrefillClient, PrefilldError
from prefilld.wire import enum_name

HEAD_COUNTS = ("dense_heads", "pivot_heads", "shared_heads", "scored_heads", "vertical_slash_heads", "baseline_heads")
RETRIES = 8  # in a row, of one prompt, when the server is full or restarting
BLOCK_TOKENS = 16


@dataclass(frozen=True)
class Asking:
    server: str  # host:port of prefilld
    worker: str  # host:port of the decode worker
    timeout: float  # seconds for one prompt, waiting included
    audit_every: int  # recall is measured on every Nth prompt; 0: on none
    audit_rows: int


class Asker:
    """Asks one prompt after the other. Not thread-safe. Raises PrefilldError when the server or the worker refuses."""

    def __init__(self, asking: Asking, codec):
        self._asking, self._codec = asking, codec
        self._server, self._worker = PrefillClient(asking.server), DecodeClient(asking.worker)

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_) -> None:
        self._server.close()
        self._worker.close()

    def ask(self, prompt: prompts.Prompt, setting: settings.Setting) -> dict:
        for attempt in range(RETRIES + 1):
            try:
                return self._ask_once(prompt, setting)
            except PrefilldError as error:
                passing = error.code.name in ("RESOURCE_EXHAUSTED", "UNAVAILABLE")
                if not passing or attempt == RETRIES:
                    raise
                time.sleep(error.retry_after or 0.5 * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _ask_once(self, prompt: prompts.Prompt, setting: settings.Setting) -> dict:
        audited = self._asking.audit_every and prompt.index % self._asking.audit_every == 0
        attention = Attention(**setting.fields(), recall_audit_rows=self._asking.audit_rows if audited else 0)
        if prompts.group(prompt.task) == "end":
            return self._generate(prompt, setting, attention)
        no_cache = Layout(BLOCK_TOKENS, first_block=-(-len(prompt.tokens) // BLOCK_TOKENS))
        with self._server.prefill(
            prompt.tokens,
            layout=no_cache,
            attention=attention,
            prompt_logprobs=True,
            timeout=self._asking.timeout,
        ) as stream:
            for _ in stream:
                pass
            result = stream.result
        graded = grade_text(prompt, result) if prompt.task == prompts.TEXT else grade_within(prompt, result)
        return {**_common(prompt, setting, result), **graded}

    def _generate(self, prompt: prompts.Prompt, setting: settings.Setting, attention: Attention) -> dict:
        with self._worker.generate(
            prompt.tokens, prompt.max_new_tokens, attention=attention, timeout=self._asking.timeout
        ) as stream:
            generated = self._codec.decode([token.id for token in stream])
            result = stream.result
        return {
            **_common(prompt, setting, result.prefill),
            "ttft_us": result.ttft_us,
            "right": int(scoring.is_right(prompt.answer, generated)),
            "answer": prompt.answer.decode(errors="replace"),
            "generated": generated.decode(errors="replace"),
        }


def _common(prompt: prompts.Prompt, setting: settings.Setting, result) -> dict:
    total = result.total
    kinds = {name: getattr(total, name) for name in HEAD_COUNTS}
    return {
        "setting": setting.name,
        "task": prompt.task,
        "length": prompt.length,
        "index": prompt.index,
        "depth": prompt.depth,
        "tokens": len(prompt.tokens),
        "policy": enum_name("AttentionPolicy", result.policy),
        "density": total.density,
        "heads": sum(kinds.values()),
        **kinds,
        "compute_us": result.compute_us,
        "queue_us": result.queue_us,
        "attention_us": total.attention_us,
        "pattern_us": total.pattern_us,
        **({"recall": _recall(total.recall)} if total.HasField("recall") else {}),
    }


def _recall(audit) -> dict[str, list[float]]:
    """Returns the recall of every sparse head, by kind."""
    kinds = {kind: getattr(audit, kind).heads for kind in scoring.SPARSE_KINDS}
    return {kind: [round(value, 4) for value in heads] for kind, heads in kinds.items() if heads}


def grade_within(prompt: prompts.Prompt, result) -> dict:
    own, best = result.prompt_logprobs, result.best_logprobs  # entry i is of token i + 1
    right = [own[begin - 1 : end - 1] == best[begin - 1 : end - 1] for begin, end in prompt.spans]
    return {"asked_at": prompt.asked_at, "right": sum(right), "asked": len(right)}


def grade_text(prompt: prompts.Prompt, result) -> dict:
    parts = np.array_split(np.array(result.prompt_logprobs, np.float64), scoring.TEXT_PARTS)
    return {
        "nats": [round(-float(part.sum()), 4) for part in parts],
        "part_tokens": [len(part) for part in parts],
        "bytes": prompt.text_bytes,
    }
