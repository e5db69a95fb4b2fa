"""Tests the token that the Python client shows, beside a server that the test plays.

Exits with 77 (skipped, for CTest) without the client's packages.
"""

import asyncio
import os
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "client" / "python"))
try:
    import grpc
    from grpc.experimental import insecure_channel_credentials
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
        self.clock = self.enterContext(mock.patch("prefilld.bearer_token.time", wraps=time))
        self.clock.monotonic.return_value = 1000.0

    def shown(self, token: BearerToken) -> str:
        """Returns what a call shows that is made late enough to look at the file."""
        self.clock.monotonic.return_value += 1
        return token.token()

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
                self.clock.monotonic.return_value += 1
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

    def test_credentials_that_do_not_encrypt_are_plain_text(self):
        tls, local = grpc.ssl_channel_credentials(), grpc.local_channel_credentials()
        named = grpc.access_token_call_credentials("named")
        for plain in (insecure_channel_credentials(), local, grpc.composite_channel_credentials(local, named)):
            for client in (PrefillClient, AsyncPrefillClient):
                with self.assertRaisesRegex(ValueError, "in plain text"):
                    client("127.0.0.1:1", token_file=self.path, credentials=plain)
            PrefillClient("127.0.0.1:1", token_file=self.path, credentials=plain, token_without_tls=True).close()
            PrefillClient("127.0.0.1:1", credentials=plain).close()
        for encrypted in (tls, grpc.composite_channel_credentials(tls, named)):
            PrefillClient("127.0.0.1:1", token_file=self.path, credentials=encrypted).close()

    def test_a_changed_file_counts_once_it_has_rested(self):
        token = BearerToken(self.path)
        self.assertEqual(self.shown(token), "sesame")
        self.write("barley", age=0)
        self.assertEqual(self.shown(token), "sesame")
        self.write("barley", age=10)
        self.assertEqual(token.token(), "sesame", "one look a second is enough")
        self.assertEqual(self.shown(token), "barley")

    def test_a_file_that_hangs_holds_up_one_call_and_no_other(self):
        token = BearerToken(self.path)
        self.path.unlink()
        os.mkfifo(self.path)  # whoever reads it waits until somebody writes
        os.utime(self.path, (1e9, 1e9))
        self.clock.monotonic.return_value += 1
        first = threading.Thread(target=token.token)
        first.start()
        while True:
            try:
                writer = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
                break
            except OSError:  # nobody reads yet
                time.sleep(0.01)
        self.assertEqual(self.shown(token), "sesame")
        self.assertTrue(first.is_alive())
        os.close(writer)
        first.join()

    def test_a_file_without_a_token_changes_nothing(self):
        token = BearerToken(self.path)
        for content in ("", "two words", "umlaut: \u00fc", "x" * 9000):
            self.write(content, age=10)
            self.assertEqual(self.shown(token), "sesame")
        self.path.unlink()
        self.assertEqual(self.shown(token), "sesame")
        with self.assertRaises(OSError):
            BearerToken(self.path)
        self.write("\n", age=10)
        with self.assertRaisesRegex(ValueError, "holds no token"):
            BearerToken(self.path)


if __name__ == "__main__":
    unittest.main()
