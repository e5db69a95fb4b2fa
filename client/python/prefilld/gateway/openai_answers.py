"""The forms of OpenAI's answers, events of a stream, and errors. Nothing here knows HTTP or a server."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from typing import Any

import grpc

from prefilld.errors import PrefilldError
from prefilld.gateway.openai_requests import BadRequest

_Code = grpc.StatusCode

# FinishReason of decode.proto; a model whose positions are used up has no more length to give.
_FINISH = {"stop": "stop", "length": "length", "positions": "length"}

# The code of HTTP for a status of a server behind the gateway. Statuses that name no fault of this request are faults
# of how the gateway was set up (502).
_HTTP = {
    _Code.INVALID_ARGUMENT: 400,
    _Code.RESOURCE_EXHAUSTED: 429,
    _Code.UNAVAILABLE: 503,
    _Code.ABORTED: 503,
    _Code.DEADLINE_EXCEEDED: 504,
}
_ERROR_TYPES = {400: "invalid_request_error", 404: "invalid_request_error", 405: "invalid_request_error",
                408: "invalid_request_error", 413: "invalid_request_error", 429: "rate_limit_error",
                503: "overloaded_error", 504: "timeout_error"}  # fmt: skip
# Names of the servers' fields with which their messages begin, and what a caller of the gateway calls them.
_FIELDS = {"token_ids": "prompt", "max_new_tokens": "max_tokens", "stop_token_ids": "stop_token_ids",
           "temperature": "temperature", "top_p": "top_p", "top_k": "top_k"}  # fmt: skip


def _writable(text: str) -> str:
    """Returns the text without halves of surrogate pairs, which a request can name and no answer can hold."""
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class Failure:
    """An answer that is an error. retry_after: whole seconds for the header Retry-After, or None."""

    status: int
    message: str
    field: str | None = None
    code: str | None = None
    retry_after: int | None = None

    def body(self) -> dict[str, Any]:
        kind = _ERROR_TYPES.get(self.status, "server_error")
        field = None if self.field is None else _writable(self.field)
        return {"error": {"message": _writable(self.message), "type": kind, "param": field, "code": self.code}}

    @classmethod
    def of(cls, error: BadRequest | PrefilldError) -> Failure:
        if isinstance(error, BadRequest):
            retry_after = 1 if error.status == 503 else None
            return cls(error.status, error.message, error.field, error.code, retry_after)
        status = _HTTP.get(error.code, 502)
        retry_after = math.ceil(max(1.0, error.retry_after or 1.0)) if status in (429, 503) else None
        name = re.match(r"\w+", error.details)
        field = _FIELDS.get(name.group()) if status == 400 and name else None
        return cls(status, f"{error.code.name}: {error.details}", field, error.code.name.lower(), retry_after)


@dataclass(frozen=True)
class Usage:
    """cached_tokens: of the prompt, from a server's prefix cache; None where no server said."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None

    def body(self) -> dict[str, Any]:
        usage: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }
        if self.cached_tokens is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens}
        return usage


def finish_reason(name: str) -> str:
    """Turns the name of a FinishReason into OpenAI's."""
    return _FINISH.get(name, "stop")


class Answer:
    """Makes the bodies and events of one answer."""

    def __init__(self, id: str, model: str, is_chat: bool, include_usage: bool = False):
        self._is_chat = is_chat
        self._include_usage = include_usage
        self._common = {"id": id, "created": int(time.time()), "model": model}

    def whole(self, text: str, finish: str, usage: Usage, **more: Any) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
        if self._is_chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {**self._common, "object": kind, "choices": [choice], "usage": usage.body(), **more}

    def first_event(self) -> dict[str, Any] | None:
        """Returns the event that says who speaks; completions have none."""
        return self._event({"role": "assistant", "content": ""}, None) if self._is_chat else None

    def text_event(self, text: str) -> dict[str, Any]:
        return self._event({"content": text} if self._is_chat else text, None)

    def last_events(self, finish: str, usage: Usage) -> list[dict[str, Any]]:
        events = [self._event({} if self._is_chat else "", finish)]
        if self._include_usage:
            events.append({**self._kind(), "choices": [], "usage": usage.body()})
        return events

    def _event(self, content: Any, finish: str | None) -> dict[str, Any]:
        choice = {"index": 0, "finish_reason": finish, "logprobs": None}
        choice["delta" if self._is_chat else "text"] = content
        event = {**self._kind(), "choices": [choice]}
        if self._include_usage:
            event["usage"] = None
        return event

    def _kind(self) -> dict[str, Any]:
        return {**self._common, "object": "chat.completion.chunk" if self._is_chat else "text_completion"}
