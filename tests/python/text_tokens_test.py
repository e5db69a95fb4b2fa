#!/usr/bin/env python3
"""Tests how text becomes tokens: prefilld.text_tokens, and prefill-cli, which runs it.

    python3 tests/python/text_tokens_test.py build/release/bin

Exits with 77 (skipped, for CTest) without the package tokenizers or what the Python client imports.
"""

import json
import os
import subprocess
import sys
import tempfile
import unittest
from concurrent import futures
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CLIENT = ROOT / "client" / "python"
sys.path.insert(0, str(CLIENT))
try:
    import grpc
    import tokenizers
    from prefilld import wire
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)
from prefilld.text_tokens import NoTokenizer, TextStream, open_tokens  # noqa: E402

TEXT = "The fisher's lantern: größer, 灯台 and 🗼!"
BOS = "<s>"


def model_folder(folder: Path, **config) -> Path:
    """Makes a folder with a small byte-pair tokenizer.json, in which many characters take several tokens."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=[BOS], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(["the fisher and the lantern in the harbour"] * 20, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Folder(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="prefilld-text-")
        self.addCleanup(folder.cleanup)
        self.folder = model_folder(Path(folder.name))


class Tokens(Folder):
    def test_a_tokenizer_file_gives_ids_and_text_back(self):
        tokens = open_tokens(self.folder)
        ids = tokens.encode(TEXT)
        self.assertEqual(ids[0], 0)  # the beginning token, by the file's own template
        self.assertNotEqual(ids[1:], list(TEXT.encode()))
        self.assertEqual(tokens.decode(ids), TEXT)

    def test_a_stream_of_tokens_gives_whole_characters(self):
        tokens = open_tokens(self.folder)
        stream, pieces = TextStream(tokens.decode), []
        for token in tokens.encode(TEXT):
            pieces.append(stream.add(token))
            self.assertNotIn("\N{REPLACEMENT CHARACTER}", pieces[-1])
        self.assertIn("", pieces[2:])  # some character took several tokens
        self.assertEqual("".join(pieces) + stream.rest(), TEXT)
        cut = tokens.encode("灯")[1:-1]  # half a character is shown in the end, as what it is
        self.assertEqual("".join(map(stream.add, cut)), "")
        self.assertEqual(stream.rest(), tokens.decode(cut))

    def test_bytes_are_tokens_only_where_the_model_says_so(self):
        (self.folder / "config.json").write_text(json.dumps({"byte_tokens": True, "bos_token_id": 256}))
        tokens = open_tokens(self.folder)
        self.assertEqual(tokens.encode("aä"), [256, *"aä".encode()])
        self.assertEqual(tokens.decode([*"aä".encode(), 257]), "aä")
        self.assertEqual(open_tokens(ROOT / "model" / "tiny").encode("a"), [256, 97])

    def test_a_folder_without_a_tokenizer_says_what_is_missing(self):
        def reason():
            with self.assertRaises(NoTokenizer) as caught:
                open_tokens(self.folder)
            return str(caught.exception)

        (self.folder / "tokenizer.json").write_text("{}")
        self.assertIn("tokenizer.json cannot be read", reason())
        (self.folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
        self.assertIn("git lfs pull", reason())
        (self.folder / "tokenizer.json").unlink()
        self.assertIn("has no tokenizer.json", reason())
        (self.folder / "config.json").unlink()
        self.assertIn("config.json cannot be read", reason())


class ScriptedWorker:
    """A decode worker that answers any prompt with the tokens given, and keeps the prompt."""

    def __init__(self, answer):
        self.answer, self.prompt = answer, None
        handler = grpc.unary_stream_rpc_method_handler(
            self.generate, wire.GenerateRequest.FromString, lambda event: event.SerializeToString()
        )
        self.server = grpc.server(futures.ThreadPoolExecutor(2))
        self.server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("prefill.v1.DecodeService", {"Generate": handler})]
        )
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()

    def generate(self, request, context):
        self.prompt = list(request.token_ids)
        for index, token in enumerate(self.answer):
            yield wire.GenerateEvent(token={"token": {"token_id": token}, "index": index})
        yield wire.GenerateEvent(result={"num_tokens": len(self.answer), "finish_reason": 1})


class CommandLine(Folder):
    def setUp(self):
        super().setUp()
        self.tokens = open_tokens(self.folder)
        self.worker = ScriptedWorker(self.tokens.encode(TEXT)[1:])
        self.addCleanup(self.worker.server.stop, None)

    def run_cli(self, *arguments, **environment):
        command = [PROGRAMS / "prefill-cli", "generate", f"--worker={self.worker.address}", *arguments]
        done = subprocess.run(command, capture_output=True, timeout=60,
                              env={**os.environ, "PYTHONPATH": str(CLIENT), **environment})  # fmt: skip
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    def test_text_goes_and_comes_through_the_models_tokenizer(self):
        flags = (f"--model={self.folder}", f"--python={sys.executable}", "--text=größer than the lantern")
        code, out, error = self.run_cli(*flags)
        self.assertEqual((code, out), (0, TEXT + "\n"), error)
        self.assertEqual(self.worker.prompt, self.tokens.encode("größer than the lantern"))
        code, out, error = self.run_cli(*flags, "--json")
        self.assertEqual(json.loads(out)["text"], TEXT, error)

    def test_text_is_refused_where_it_cannot_become_tokens(self):
        for flags, reason in (
            ((), "a text needs --model=FOLDER"),
            ((f"--model={self.folder}", "--python=/nonexistent"), "--python=/nonexistent cannot be run"),
            ((f"--model={self.folder}", "--python=false"), "pip install"),
        ):
            code, out, error = self.run_cli("--text=a", *flags)
            self.assertNotEqual(code, 0)
            self.assertEqual(out, "")
            self.assertIn(reason, error)
        code, _, error = self.run_cli("--text=a", f"--model={self.folder}", f"--python={sys.executable}", PYTHONPATH="")
        self.assertNotEqual(code, 0)
        self.assertIn("pip install", error)
        latin = self.folder / "latin"
        latin.write_bytes(b"gr\xf6\xdfer")
        code, _, error = self.run_cli(f"--text_file={latin}", f"--model={self.folder}", f"--python={sys.executable}")
        self.assertNotEqual(code, 0)
        self.assertIn("not UTF-8", error)
        self.assertIsNone(self.worker.prompt)  # nothing was sent

    def test_reads_what_our_tools_write(self):
        prompt = self.folder / "prompt.json"
        prompt.write_text(json.dumps({"domain": "prose", "token_ids": [5, 6, 7]}))  # as make_prompts.py does
        code, out, error = self.run_cli(f"--token_ids_file={prompt}", "--json")
        self.assertEqual((code, self.worker.prompt), (0, [5, 6, 7]), error)
        prompt.write_text(out)  # an answer of generate --json is the next prompt
        code, _, error = self.run_cli(f"--token_ids_file={prompt}")
        self.assertEqual((code, self.worker.prompt), (0, self.worker.answer), error)


if __name__ == "__main__":
    PROGRAMS = Path(sys.argv.pop(1)).resolve()
    unittest.main()
