"""Runs prefilld-gateway: reads the flags, listens, watches the servers behind it, and drains on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import socket
import sys

import uvicorn

from prefilld.aio import AsyncDecodeClient, AsyncPrefillClient
from prefilld.gateway.app import make_app
from prefilld.gateway.bodies import Bodies, ParsingProcess, SideThreads
from prefilld.gateway.exchange import Door
from prefilld.gateway.generation import Upstream
from prefilld.gateway.metrics import Metrics
from prefilld.gateway.peers import DecodeGroup, DecodeWorker, Prefilld, PrefillGroup
from prefilld.gateway.prompts import ModelPrompts
from prefilld.gateway.service import Service
from prefilld.gateway.settings import Settings, read_settings
from prefilld.gateway.timed_http import TimedHttp
from prefilld.options import Attention

_ERROR_SECONDS = 2.0  # for errors to reach clients at the end of a drain

logger = logging.getLogger("prefilld.gateway")


def main() -> None:
    settings = read_settings()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        prompts = ModelPrompts(settings.model)
        credentials = settings.credentials()
        listener = _listen(settings)
    except (OSError, ValueError) as error:
        sys.exit(f"prefilld-gateway: {error}")
    if prompts.chat_refusal:
        logger.warning("chats are refused: %s", prompts.chat_refusal)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(settings, prompts, credentials, listener))


async def _serve(settings: Settings, prompts: ModelPrompts, credentials, listener: socket.socket) -> None:
    prefills = PrefillGroup([
        Prefilld(AsyncPrefillClient(address, credentials=credentials), address, settings.remembered_blocks,
                 settings.metadata)
        for address in settings.prefill
    ])  # fmt: skip
    workers = DecodeGroup(
        [DecodeWorker(AsyncDecodeClient(address, credentials=credentials), address) for address in settings.decode]
    )
    peers = [*prefills.members, *workers.members]
    metrics = Metrics(prefills, workers)
    upstream = Upstream(
        prefills=prefills,
        workers=workers,
        attention=Attention(settings.policy),
        metadata=settings.metadata,
        tries=settings.tries,
        count_choice=metrics.count_choice,
    )
    threads, parser = SideThreads(), ParsingProcess()
    service = Service(
        prompts, upstream, metrics, threads, settings.served_model_name, settings.default_max_tokens, settings.tenant
    )
    bodies = Bodies(
        threads,
        parser,
        settings.max_body_bytes,
        settings.max_pending_body_bytes,
        min(settings.receive_timeout_s, settings.request_timeout_s),
        has_answers=bool(settings.decode),
    )
    door = Door(service, metrics, bodies, settings.max_requests, settings.request_timeout_s)

    @contextlib.asynccontextmanager
    async def watched(app):
        watches = [asyncio.ensure_future(peer.watch()) for peer in peers]
        watches += [asyncio.ensure_future(member.follow_cache()) for member in prefills.members]
        _tell_port(settings, listener)
        try:
            yield
        finally:
            parser.close()
            for watch in watches:
                watch.cancel()
            await asyncio.gather(*watches, return_exceptions=True)
            for peer in peers:
                await peer.client.close()

    config = uvicorn.Config(
        make_app(door, peers, watched),
        loop="asyncio",
        http=functools.partial(TimedHttp, settings.receive_timeout_s),
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        limit_concurrency=settings.max_connections,
        server_header=False,
        timeout_keep_alive=120,  # longer than routers keep idle connections, so that none is closed as it is used
    )
    server = uvicorn.Server(config)
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn drains, and then raises the signal again
        signal.signal(number, lambda *_: None)
    drain = asyncio.ensure_future(_bound_drain(server, door, settings.drain_timeout_s))
    await server.serve(sockets=[listener])
    drain.cancel()


async def _bound_drain(server: uvicorn.Server, door: Door, seconds: float) -> None:
    """Ends what still runs a while after the signal. uvicorn has taken no connection since."""
    while not server.should_exit:
        await asyncio.sleep(0.1)
    await asyncio.sleep(seconds)
    logger.warning("%d answers still ran %g s after the signal; they end with an error", door.running, seconds)
    door.closing.set()
    await asyncio.sleep(_ERROR_SECONDS)
    server.force_exit = True


def _listen(settings: Settings) -> socket.socket:
    """Opens the socket whose settings all connections inherit. Raises OSError."""
    host, port = settings.listen
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=1024)
    # A client that takes nothing, or whose machine is gone, is cut off by the kernel: what it holds must come free.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * settings.stall_timeout_s))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return listener


def _tell_port(settings: Settings, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    logger.info("listening on %s port %d, model %s", host, port, settings.served_model_name)
    if settings.port_file is not None:
        unfinished = settings.port_file.with_suffix(".new")
        unfinished.write_text(f"http={port}\n")
        unfinished.replace(settings.port_file)  # whoever waits for it never reads half


if __name__ == "__main__":
    main()
