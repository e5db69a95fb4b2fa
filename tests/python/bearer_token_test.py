"""Tests the token that the Python client shows, beside a server that the test plays.

Exits with 77 (skipped, for CTest) without the client's packages.
"""

import asyncio
import os
import sys
import tempfile
import time
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "client" / "python"))
try:
    import grpc
    from played_server import TOKENS, PlayedServer, whole
    from prefilld import AsyncPrefillClient, PrefillClient
    from prefilld.bearer_token import BearerToken
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)


class Tokens(unittest.TestCase):
    def setUp(self):
        self.path = Path(self.enterContext(tempfile.TemporaryDirectory())) / "token"
        self.write("sesame\n", age=10)
        self.seen = []

    def write(self, content: str, age: float):
        """Puts a file in the place of the token's that was last written `age` seconds ago."""
        new = self.path.with_suffix(".new")
        new.write_text(content)
        os.utime(new, (time.time() - age,) * 2)
        new.replace(self.path)

    def noting(self, server, context):
        metadata = dict(context.invocation_metadata())
        self.seen.append((metadata.get("authorization"), metadata.get("traceparent")))
        yield from whole(server, context)

    def test_it_goes_with_each_call_beside_the_calls_own_metadata(self):
        with PlayedServer(self.noting) as server:
            with PrefillClient(server.address, token_file=self.path, token_without_tls=True) as client:
                list(client.prefill(TOKENS, metadata=[("traceparent", "00-...")]))
                self.write("barley", age=10)
                list(client.attach_receiver("a", "secret", 1, len(TOKENS)))
                list(client.prefill(TOKENS, metadata=[("authorization", "Bearer own")]))
        self.assertEqual(self.seen, [("Bearer sesame", "00-..."), ("Bearer barley", None), ("Bearer own", None)])

    def test_asyncio_shows_it_too(self):
        async def prefill(address):
            async with AsyncPrefillClient(address, token_file=self.path, token_without_tls=True) as client:
                await (await client.prefill(TOKENS)).read_all()

        with PlayedServer(self.noting) as server:
            asyncio.run(prefill(server.address))
        self.assertEqual(self.seen, [("Bearer sesame", None)])

    def test_it_does_not_go_in_plain_text_unasked(self):
        for client in (PrefillClient, AsyncPrefillClient):
            with self.assertRaisesRegex(ValueError, "127.0.0.1:1 in plain text"):
                client(["unix:/run/prefilld.sock", "127.0.0.1:1"], token_file=self.path)
        PrefillClient("unix:/run/prefilld.sock", token_file=self.path).close()
        PrefillClient("127.0.0.1:1", token_file=self.path, credentials=grpc.ssl_channel_credentials()).close()

    def test_a_changed_file_counts_once_it_has_rested(self):
        token = BearerToken(self.path)
        self.write("barley", age=0)
        self.assertEqual(token.token(), "sesame")
        self.write("barley", age=10)
        self.assertEqual(token.token(), "barley")

    def test_a_file_without_a_token_changes_nothing(self):
        token = BearerToken(self.path)
        for content in ("", "two words", "umlaut: \u00fc", "x" * 9000):
            self.write(content, age=10)
            self.assertEqual(token.token(), "sesame")
        self.path.unlink()
        self.assertEqual(token.token(), "sesame")
        with self.assertRaises(OSError):
            BearerToken(self.path)
        self.write("\n", age=10)
        with self.assertRaisesRegex(ValueError, "holds no token"):
            BearerToken(self.path)


if __name__ == "__main__":
    unittest.main()
