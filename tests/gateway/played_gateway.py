"""A gateway, a process of its own, beside prefilld and decode workers that a test plays."""

from __future__ import annotations

import asyncio
import unittest
from pathlib import Path

from gateway_process import GatewayProcess, wait_until
from played_peers import PlayedPeers

MODEL = Path(__file__).resolve().parents[2] / "model" / "tiny"  # for its tokenizer; no weights are read
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
PREFILL_CALL = {"do_remote_decode": True}


def request(number: int, **more) -> dict:
    return {"prompt": [number, 1, 2], "max_tokens": 50, "temperature": 0, "ignore_eos": False, **more}


class PlayedGateway(unittest.IsolatedAsyncioTestCase):
    async def asyncSetUp(self):
        asyncio.get_running_loop().set_debug(False)  # which is slow

    async def start(self, *flags, workers=2):
        """Starts two prefilld, so many workers, and the gateway."""
        self.peers = PlayedPeers()
        self.addAsyncCleanup(self.peers.stop)
        prefill = [await self.peers.start("PrefillService") for _ in range(2)]
        decode = [await self.peers.start("DecodeService") for _ in range(workers)]
        addresses = (f"--prefill={','.join(prefill)}", f"--decode={','.join(decode)}")
        self.gateway = GatewayProcess(MODEL, *addresses, *flags)
        await asyncio.to_thread(self.gateway.__enter__)
        self.addAsyncCleanup(asyncio.to_thread, self.gateway.__exit__)
        await asyncio.to_thread(self.gateway.wait_until_ready)

    async def wait(self, is_so, what):
        await asyncio.to_thread(wait_until, is_so, what)

    async def metric(self, name, **labels):
        return await asyncio.to_thread(lambda: self.gateway.metric(f"prefilld_gateway_{name}", **labels))

    async def nothing_runs(self):
        await self.wait(lambda: not self.peers.running.total(), "no call runs at a server")
        await self.wait(lambda: self.gateway.metric("prefilld_gateway_running_requests") == 0, "no request runs")
