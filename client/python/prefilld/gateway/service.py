"""Requests that have been read: a prefill call is told a prefilld, any other is answered. Nothing here knows HTTP."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prefilld import wire
from prefilld.gateway.answer_text import AnswerText
from prefilld.gateway.bodies import SideThreads
from prefilld.gateway.generation import Generation, Prompt, Upstream
from prefilld.gateway.metrics import Metrics
from prefilld.gateway.openai_answers import Answer, Usage, finish_reason
from prefilld.gateway.openai_requests import Ask, BadRequest
from prefilld.gateway.prompts import ChatRefused, ModelPrompts
from prefilld.prefixes import prefix_keys


@dataclass(frozen=True)
class Pointer:
    """The answer to a prefill call. remember() is called once it has been given."""

    body: dict[str, Any]
    remember: Callable[[], None]


class Service:
    def __init__(
        self,
        prompts: ModelPrompts,
        upstream: Upstream,
        metrics: Metrics,
        threads: SideThreads,
        model: str,
        default_max_tokens: int,
        tenant: str,
    ):
        """model: the name that clients know. default_max_tokens: of chats that do not say how long they may be.

        tenant: what prefilld takes the callers for; "" where it tells no tenants apart.
        """
        self._prompts = prompts
        self._upstream = upstream
        self._metrics = metrics
        self._threads = threads
        self.model = model
        self._default_max_tokens = default_max_tokens
        self._tenant = tenant

    async def point(self, ask: Ask, drop_body: Callable[[], None]) -> Pointer:
        """Answers a router's prefill call: nothing is computed, vLLM's connector asks the prefilld named here.

        Nobody tells the gateway what vLLM then does, so the answer is all that there is to remember.

        drop_body() is called once the prompt has become tokens, or cannot. Raises PrefilldError if no prefilld is up.
        """
        tokens: Sequence[int] = []
        try:
            tokens, keys = await self._tokens(ask, drop_body) if ask.prompt is not None else ([], [])
        except ChatRefused:  # vLLM has a template of its own, perhaps
            keys = []
        if not tokens:
            self._metrics.count_unread_prompt()
        server, choice = self._upstream.prefills.choose(len(tokens), keys)
        server.route.note_sent(len(tokens) - choice.cached_tokens)
        self._metrics.count_choice(server.address, len(tokens), choice.cached_tokens)
        host, port = server.address.rsplit(":", 1)
        params = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": None,
            "remote_block_ids": None,
            "remote_host": host.strip("[]"),
            "remote_port": int(port),
        }
        answer = Answer(_new_id(ask), ask.model or self.model, ask.is_chat)
        body = answer.whole("", "length", Usage(len(tokens), 0), kv_transfer_params=params)
        return Pointer(body, lambda: server.route.memory.remember(keys))

    async def answer(
        self, ask: Ask, drop_body: Callable[[], None], arrival: float, deadline: float
    ) -> Running:
        """Makes tokens of the prompt, calls drop_body(), and returns the answer that is to be read.

        arrival, deadline: of time.monotonic(). Raises BadRequest.
        """
        if ask.model and ask.model != self.model:
            message = f"the model {ask.model!r} is not served here; {self.model!r} is"
            raise BadRequest(message, "model", status=404, code="model_not_found")
        if not self._upstream.workers.members:
            raise BadRequest(
                "this gateway has no decode worker: it answers routers' prefill calls alone "
                "(kv_transfer_params.do_remote_decode)",
                "kv_transfer_params",
            )
        try:
            tokens, keys = await self._tokens(ask, drop_body)
        except ChatRefused as error:
            raise BadRequest(str(error), "messages") from None
        info = self._upstream.prefills.info
        most = len(tokens) if info is None else info.max_prompt_tokens
        if not 1 <= len(tokens) <= most:
            message = f"the prompt has {len(tokens)} tokens, allowed: 1 to {most}"
            raise BadRequest(message, "messages" if ask.is_chat else "prompt")
        prompt = Prompt(
            id=_new_id(ask),
            tokens=tokens,
            keys=keys,
            cache_salt=ask.cache_salt,
            max_new_tokens=ask.max_tokens or self._default_max_tokens,
            sampling=ask.sampling,
            stop_token_ids=ask.stop_token_ids,
            ignore_eos=ask.ignore_eos,
        )
        ends = set() if ask.ignore_eos or info is None else set(info.eos_token_ids)
        text = AnswerText(self._prompts.decode, ends | set(ask.stop_token_ids), ask.stop, tokens[-5:])
        generation = Generation(self._upstream, prompt, deadline)
        return Running(ask, prompt, generation, text, self.model, arrival, self._metrics)

    async def _tokens(self, ask: Ask, drop_body: Callable[[], None]) -> tuple[Sequence[int], list[bytes]]:
        """Returns a prompt's tokens and the keys of its blocks. Long texts take a second, so a thread does it.

        A prompt that no server takes has no keys: there may be any number of tokens.
        """
        info = self._upstream.prefills.info
        fingerprint = self._upstream.prefills.fingerprint
        salt = f"{self._tenant}\n{ask.cache_salt}" if self._tenant else ask.cache_salt

        def make() -> tuple[Sequence[int], list[bytes]]:
            if ask.is_chat:
                tokens = self._prompts.of_messages(ask.prompt, ask.template)
            elif isinstance(ask.prompt, str):
                tokens = self._prompts.of_text(ask.prompt)
            else:
                tokens = ask.prompt
            if info is not None and len(tokens) > info.max_prompt_tokens:
                return tokens, []
            # Models whose rotation changes with the prompt's length have other keys; to tell beginnings apart these do.
            return tokens, prefix_keys(tokens, fingerprint, salt=salt)

        try:
            return await self._threads.run(ask.num_bytes, make)
        finally:
            drop_body()


class Running:
    """One answer on its way. Iterating over pieces() gives its text; finish and usage are known after it."""

    def __init__(
        self,
        ask: Ask,
        prompt: Prompt,
        generation: Generation,
        text: AnswerText,
        model: str,
        arrival: float,
        metrics: Metrics,
    ):
        self.form = Answer(prompt.id, model, ask.is_chat, ask.include_usage)
        self.finish = "stop"
        self._prompt = prompt
        self._generation = generation
        self._text = text
        self._arrival = arrival
        self._metrics = metrics
        self._num_tokens = 0

    @property
    def id(self) -> str:
        return self._prompt.id

    @property
    def usage(self) -> Usage:
        return Usage(len(self._prompt.tokens), self._num_tokens, self._generation.cached_tokens)

    async def pieces(self) -> AsyncGenerator[str, None]:
        """Yields the text of each token, which may be empty. Whoever stops early closes it. Raises PrefilldError."""
        async with contextlib.aclosing(self._generation.tokens()) as tokens:
            async for token in tokens:
                if self._num_tokens == 0:
                    self._metrics.observe_first_token(time.monotonic() - self._arrival)
                self._num_tokens += 1
                yield self._text.add(token.id)
                if self._text.has_stopped:
                    return
        rest = self._text.rest()
        if not self._text.has_stopped:
            self.finish = finish_reason(wire.enum_name("FinishReason", self._generation.result.finish_reason))
        if rest:
            yield rest


def _new_id(ask: Ask) -> str:
    return f"{'chatcmpl' if ask.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
