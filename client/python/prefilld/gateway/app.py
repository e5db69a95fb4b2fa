"""The routes of the gateway."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from prefilld.gateway.exchange import Door, Exchange
from prefilld.gateway.openai_answers import Failure
from prefilld.gateway.peers import Peer


def make_app(door: Door, peers: Sequence[Peer], lifespan) -> Starlette:
    """lifespan: an asynchronous context manager of the app, in which the peers are watched."""

    async def completions(request: Request) -> Exchange:
        return Exchange(door, is_chat=False)

    async def chat_completions(request: Request) -> Exchange:
        return Exchange(door, is_chat=True)

    async def models(request: Request) -> Response:
        entry = {"id": door.service.model, "object": "model", "created": 0, "owned_by": "prefilld"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def health(request: Request) -> Response:
        """Ready means that of each kind of server one is up."""
        ready = all(any(p.is_up for p in peers if p.kind == kind) for kind in {p.kind for p in peers})
        servers = [{"kind": p.kind, "address": p.address, "up": p.is_up, "reason": p.reason} for p in peers]
        return JSONResponse({"status": "ok" if ready else "unavailable", "servers": servers}, 200 if ready else 503)

    async def metrics(request: Request) -> Response:
        page, content_type = door.metrics.page()
        return Response(page, headers={"content-type": content_type})

    async def no_route(request: Request, error: Exception) -> Response:
        failure = Failure(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse(failure.body(), failure.status, error.headers)

    return Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
            Route("/metrics", metrics),
        ],
        exception_handlers={404: no_route, 405: no_route},
        lifespan=lifespan,
    )
