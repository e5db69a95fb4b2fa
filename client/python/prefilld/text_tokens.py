"""Text to tokens and back, as the folder of a model has it.

A byte-level model says `"byte_tokens": true` in its config.json; any other needs its tokenizer.json and the package
`tokenizers` (pip install 'prefilld[tokenizer]'). Text is taken as it is, without a chat template.

    python3 -m prefilld.text_tokens MODEL_FOLDER

speaks with other programs, such as prefill-cli: it prints {"vocab_size": N}, then answers each line of JSON on standard
input with one line:

    {"text": "..."}    {"token_ids": [...]}   a prompt, with the beginning token that the model wants
    {"token_id": 7}    {"text": "..."}        what an answer's next token adds; some come with a later one
    {"end": true}      {"text": "..."}        what was held back; the next token begins another answer

An error is answered with {"error": "..."}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

_LFS_POINTER = "version https://git-lfs.github.com/spec/v1"


class NoTokenizer(ValueError):
    """The folder's text cannot become tokens. The message says why, and what would do."""


class ByteTokens:
    """The tokens of a byte-level model: 0 to 255 are bytes, the others are special."""

    vocab_size = 256

    def __init__(self, bos: int | None):
        self._bos = bos

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """special_tokens: whether the model's beginning token is put before the text."""
        return [*([self._bos] if special_tokens and self._bos is not None else []), *text.encode()]

    def decode(self, token_ids: list[int]) -> str:
        return bytes(i for i in token_ids if i < 256).decode(errors="replace")


class FileTokens:
    """The tokens of a tokenizer.json."""

    def __init__(self, file: Path):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise NoTokenizer(
                f"{file} needs the Python package tokenizers: pip install 'prefilld[tokenizer]'"
            ) from None
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises Exception itself
            raise NoTokenizer(f"{file} cannot be read: {error}") from None
        self.vocab_size = self._tokenizer.get_vocab_size()

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """special_tokens: whether the file's own template adds its tokens, which a chat template has written already."""
        return self._tokenizer.encode(text, add_special_tokens=special_tokens).ids

    def decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)


def open_tokens(folder: str | Path) -> ByteTokens | FileTokens:
    """Returns the tokens of the model in the folder. Raises NoTokenizer."""
    config_file, file = Path(folder) / "config.json", Path(folder) / "tokenizer.json"
    try:
        config = json.loads(config_file.read_text())
    except (OSError, ValueError) as error:
        raise NoTokenizer(f"{config_file} cannot be read: {error}") from None
    if config.get("byte_tokens") is True:
        return ByteTokens(config.get("bos_token_id"))
    if not file.exists():
        raise NoTokenizer(f'{folder} has no tokenizer.json, and its config.json does not say "byte_tokens": true')
    with file.open("rb") as content:
        if content.read(len(_LFS_POINTER)) == _LFS_POINTER.encode():
            raise NoTokenizer(f"{file} is a Git LFS pointer; `git lfs pull` in its folder fetches the file")
    return FileTokens(file)


_MOST_HELD = 8  # tokens: a character has four bytes at most; others have no text, such as end tokens


class TextStream:
    """Text of tokens that come one by one. A character that is not whole yet is held back.

    prompt: the last tokens before the first one, because text depends on its neighbours; a few suffice.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int] = ()):
        self._decode = decode
        self._before = list(prompt)  # their text was returned, or is the prompt's
        self._held: list[int] = []

    def add(self, token_id: int) -> str:
        self._held.append(token_id)
        before, text = self._texts()
        is_whole = len(text) > len(before) and not text.endswith("\N{REPLACEMENT CHARACTER}")
        return self._show(before, text) if is_whole or len(self._held) >= _MOST_HELD else ""

    def rest(self) -> str:
        """Returns what was held back; the next token begins another text."""
        before, text = self._texts()
        self._before, self._held = [], []
        return text[len(before) :]

    def _show(self, before: str, text: str) -> str:
        self._before, self._held = self._held, []
        return text[len(before) :]

    def _texts(self) -> tuple[str, str]:
        return self._decode(self._before), self._decode(self._before + self._held)


def _answer(tokens: ByteTokens | FileTokens, stream: TextStream, question: dict) -> dict:
    if "text" in question:
        return {"token_ids": tokens.encode(question["text"])}
    if "token_id" in question:
        return {"text": stream.add(int(question["token_id"]))}
    if "end" in question:
        return {"text": stream.rest()}
    return {"error": "a question has text, token_id or end"}


def main() -> None:
    def say(answer: dict) -> None:
        print(json.dumps(answer), flush=True)

    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        tokens = open_tokens(sys.argv[1])
    except NoTokenizer as error:
        say({"error": str(error)})
        sys.exit(1)
    say({"vocab_size": tokens.vocab_size})
    stream = TextStream(tokens.decode)
    for line in sys.stdin:
        try:
            say(_answer(tokens, stream, json.loads(line)))
        except (ValueError, TypeError, OverflowError) as error:
            say({"error": str(error)})


if __name__ == "__main__":
    main()
