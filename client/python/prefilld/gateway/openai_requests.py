"""Reads requests to /v1/completions and /v1/chat/completions. Nothing here knows HTTP or a server.

A field that would change the answer and is not supported is refused by its name, unless it has the value that changes
nothing. A router's prefill call (kv_transfer_params.do_remote_decode) is read for its prompt alone: what else it says
is meant for the engine that decodes.
"""

from __future__ import annotations

import hashlib
import secrets
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prefilld.options import Sampling

MAX_STOPS, MAX_STOP_CHARACTERS, MAX_STOP_TOKENS = 16, 256, 64
_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's

# Fields of others with the values that change nothing; null never does.
_NEUTRAL: Mapping[str, tuple] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False,), "top_logprobs": (0,),
    "presence_penalty": (0,), "frequency_penalty": (0,), "repetition_penalty": (1,), "min_p": (0,), "min_tokens": (0,),
    "logit_bias": ({},), "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"),
    "function_call": ("none",), "parallel_tool_calls": (True, False), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "store": (False,), "skip_special_tokens": (True,), "add_generation_prompt": (True,),
    "continue_final_message": (False,), "kv_transfer_params": ({},),
}  # fmt: skip
# They say who asks, and nothing about the answer.
_IGNORED = {"user", "metadata", "safety_identifier", "prompt_cache_key"}
_READ = {
    "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stop_token_ids",
    "ignore_eos", "stream", "stream_options", "cache_salt",
}  # fmt: skip


class BadRequest(ValueError):
    """The request is refused. field: the one to blame. status: of HTTP. code: a word for programs, or None."""

    def __init__(self, message: str, field: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.message, self.field, self.status, self.code = message, field, status, code


@dataclass(frozen=True)
class Ask:
    """One request.

    prompt: a text, token ids, or a list of messages (is_chat). num_bytes: of the body.
    is_prefill_call: a router asks where the KV is to be had; its prompt is None if the gateway cannot read it.
    max_tokens: None: the gateway's default. template: variables of the chat template.
    """

    is_chat: bool
    prompt: str | array[int] | list[dict] | None
    is_prefill_call: bool = False
    num_bytes: int = 0
    model: str = ""
    max_tokens: int | None = None
    sampling: Sampling = Sampling()
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    stream: bool = False
    include_usage: bool = False
    cache_salt: str = ""
    template: dict[str, Any] = field(default_factory=dict)


def read_request(body: Any, is_chat: bool) -> Ask:
    """Raises BadRequest. body: what JSON made of the request's."""
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    fields = {name: value for name, value in body.items() if value is not None}
    is_prefill_call = _is_prefill_call(fields)
    try:
        prompt = _messages(fields) if is_chat else _prompt(fields)
    except BadRequest:
        if not is_prefill_call:
            raise
        prompt = None  # images, for example; the engine knows whether it can read them
    template = _template_variables(fields, is_prefill_call) if is_chat else {}
    salt = _text(fields, "cache_salt")
    common = dict(
        is_chat=is_chat,
        prompt=prompt,
        model=_text(fields, "model"),
        # Salts of engines may have any length and characters; the vLLM connector makes the same of them.
        cache_salt=hashlib.sha256(salt.encode()).hexdigest() if salt else "",
        template=template,
    )
    if is_prefill_call:
        return Ask(is_prefill_call=True, **common)
    _refuse_unsupported(fields, is_chat)
    stream = _flag(fields, "stream")
    return Ask(
        max_tokens=_max_tokens(fields, is_chat),
        sampling=_sampling(fields),
        stop=_stops(fields),
        stop_token_ids=_token_ids(fields.get("stop_token_ids", []), "stop_token_ids", MAX_STOP_TOKENS),
        ignore_eos=_flag(fields, "ignore_eos"),
        stream=stream,
        include_usage=_include_usage(fields, stream),
        **common,
    )


def _is_prefill_call(fields: dict[str, Any]) -> bool:
    params = fields.get("kv_transfer_params", {})
    if not isinstance(params, dict):
        raise BadRequest("kv_transfer_params must be an object", "kv_transfer_params")
    if params.get("do_remote_prefill"):
        raise BadRequest(
            "kv_transfer_params.do_remote_prefill is for the engine that decodes; this is the gateway before prefilld",
            "kv_transfer_params",
        )
    return params.get("do_remote_decode") is True


def _refuse_unsupported(fields: dict[str, Any], is_chat: bool) -> None:
    known = _READ | _IGNORED | ({"messages", "chat_template_kwargs"} if is_chat else {"prompt"})
    for name, value in fields.items():
        if name in known or any(_equal(value, neutral) for neutral in _NEUTRAL.get(name, ())):
            continue
        if name in _NEUTRAL:
            allowed = " or ".join(repr(v) for v in _NEUTRAL[name])
            raise BadRequest(f"{name} is supported only as {allowed}", name, code="unsupported_parameter")
        raise BadRequest(f"{name} is not supported", name, code="unsupported_parameter")


def _equal(value: Any, neutral: Any) -> bool:
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


def _prompt(fields: dict[str, Any]) -> str | array[int]:
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and prompt and all(isinstance(part, (str, list)) for part in prompt):
        if len(prompt) > 1:
            raise BadRequest(f"prompt is a list of {len(prompt)} prompts, allowed: 1", "prompt")
        prompt = prompt[0]
    if isinstance(prompt, str):
        if not prompt:
            raise BadRequest("prompt is empty", "prompt")
        return _encodable(prompt, "prompt")
    if isinstance(prompt, list) and prompt:
        return array("I", _token_ids(prompt, "prompt"))
    raise BadRequest("prompt must be a text or a list of token ids, and not empty", "prompt")


def _messages(fields: dict[str, Any]) -> list[dict]:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list of messages, and not empty", "messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadRequest(f"{where} must be an object with a role", where)
    # Other fields, such as name or tool_calls, go to the template as they are.
    return {**message, "content": _content(message.get("content"), f"{where}.content")}


def _content(content: Any, where: str) -> str | None:
    """A content is text, or a list of parts that are texts."""
    if content is None or isinstance(content, str):
        return None if content is None else _encodable(content, where)
    if not isinstance(content, list):
        raise BadRequest(f"{where} must be a text or a list of parts", where)
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise BadRequest(f"{where}[{i}] must be of type text; no other is supported", where)
        texts.append(_encodable(part["text"], where))
    return "".join(texts)


def _template_variables(fields: dict[str, Any], is_prefill_call: bool) -> dict[str, Any]:
    wished = fields.get("chat_template_kwargs", {})
    if not isinstance(wished, dict) or "messages" in wished:
        raise BadRequest("chat_template_kwargs must be an object, without messages", "chat_template_kwargs")
    variables = dict(wished)
    if is_prefill_call and isinstance(fields.get("tools"), list):  # the engine's template will show them
        variables["tools"] = fields["tools"]
    return variables


def _max_tokens(fields: dict[str, Any], is_chat: bool) -> int | None:
    name = "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"
    if name not in fields:
        return None if is_chat else _DEFAULT_COMPLETION_TOKENS
    return _whole(fields, name, 1, 2**31 - 1)


def _sampling(fields: dict[str, Any]) -> Sampling:
    return Sampling(
        temperature=_number(fields, "temperature", 1.0, 0.0, 100.0),
        top_k=max(0, _whole(fields, "top_k", -1, 2**31 - 1, 0)),  # -1 is another word for all
        top_p=_number(fields, "top_p", 1.0, 0.0, 1.0, without_low=True),
        # Without a seed no two answers shall be alike.
        seed=_whole(fields, "seed", -(2**63), 2**64 - 1) % 2**64 if "seed" in fields else secrets.randbits(64),
    )


def _stops(fields: dict[str, Any]) -> list[str]:
    stops = fields.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARACTERS for s in stops):
        raise BadRequest(f"stop must be texts of 1 to {MAX_STOP_CHARACTERS} characters", "stop")
    if len(stops) > MAX_STOPS:
        raise BadRequest(f"stop has {len(stops)} texts, allowed: {MAX_STOPS}", "stop")
    return stops


def _include_usage(fields: dict[str, Any], stream: bool) -> bool:
    options = fields.get("stream_options", {})
    if not isinstance(options, dict):
        raise BadRequest("stream_options must be an object", "stream_options")
    if options and not stream:
        raise BadRequest("stream_options needs stream", "stream_options")
    unknown = sorted(set(options) - {"include_usage", "include_obfuscation"})
    if unknown or options.get("include_obfuscation"):
        raise BadRequest(f"stream_options.{(unknown or ['include_obfuscation'])[0]} is not supported", "stream_options")
    return _flag(options, "include_usage", "stream_options.include_usage")


def _flag(fields: dict[str, Any], name: str, shown: str | None = None) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"{shown or name} must be true or false", shown or name)
    return bool(value)


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name, "")
    if not isinstance(value, str):
        raise BadRequest(f"{name} must be a text", name)
    return _encodable(value, name)


def _encodable(text: str, name: str) -> str:
    """JSON can write half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(f"{name} has half a surrogate pair at character {error.start}", name) from None
    return text


def _whole(fields: dict[str, Any], name: str, low: int, high: int, default: int = 0) -> int:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BadRequest(f"{name} must be a whole number from {low} to {high}", name)
    return value


def _number(
    fields: dict[str, Any], name: str, default: float, low: float, high: float, without_low: bool = False
) -> float:
    value = fields.get(name, default)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (without_low and value == low):  # NaN is in no range
        start = f"above {low:g}" if without_low else f"from {low:g}"
        raise BadRequest(f"{name} must be a number {start} to {high:g}", name)
    return float(value)


def _token_ids(value: Any, name: str, most: int | None = None) -> list[int]:
    if not isinstance(value, list):
        raise BadRequest(f"{name} must be a list of token ids", name)
    if most is not None and len(value) > most:
        raise BadRequest(f"{name} has {len(value)} token ids, allowed: {most}", name)
    for i, token in enumerate(value):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 2**32:
            raise BadRequest(f"{name}[{i}] is no token id", name)
    return value
