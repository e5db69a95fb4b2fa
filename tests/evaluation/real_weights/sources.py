"""Reads text out of pinned packages of Debian 12, which sources.json lists. Needs apt-get and dpkg-deb."""

from __future__ import annotations

import gzip
import hashlib
import html.parser
import json
import struct
import subprocess
import zlib
from dataclasses import dataclass, field
from pathlib import Path

MANIFEST = Path(__file__).with_name("sources.json")
ROLES = ("judging", "calibration")


@dataclass(frozen=True)
class Source:
    role: str  # "judging" or "calibration"
    kind: str  # of text: "prose", "manuals" or "code"
    package: str  # NAME=VERSION in Debian 12
    sha256: str  # of the package's file
    licence: str
    texts: int  # so many are taken from it
    files: list[str]  # patterns within the package
    parts: list[str] = field(default_factory=list)  # of an .rdb: first lines of the objects taken


@dataclass(frozen=True)
class Document:
    name: str  # path in the package, and the part of it
    text: str


def manifest(path: Path = MANIFEST) -> list[Source]:
    listed = json.loads(path.read_text())
    return [Source(role=role, **fields) for role in ROLES for fields in listed[role]]


def fetch(package: str, sha256: str, cache: Path) -> Path:
    """Returns the folder of the unpacked package. Raises ValueError when Debian's file is not the one pinned."""
    folder = cache / "packages" / package.replace(":", "_").replace("=", "_")
    if folder.exists():
        return folder
    download = cache / "download"
    download.mkdir(parents=True, exist_ok=True)
    for left in download.glob("*.deb"):
        left.unlink()
    # apt's own user may have no access to the folder.
    subprocess.run(
        ["apt-get", "download", "--quiet=2", "--option=APT::Sandbox::User=root", package], cwd=download, check=True
    )
    (deb,) = download.glob("*.deb")
    if (found := hashlib.sha256(deb.read_bytes()).hexdigest()) != sha256:
        raise ValueError(f"{package} has sha256 {found}; {sha256} is expected")
    half_done = folder.with_name(folder.name + ".new")
    subprocess.run(["rm", "-rf", half_done], check=True)
    half_done.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["dpkg-deb", "--extract", deb, half_done], check=True)
    deb.unlink()
    return half_done.rename(folder)


def documents(source: Source, folder: Path) -> list[Document]:
    """Reads the documents of a source, in an order that is mixed and yet the same everywhere."""
    paths = {path for pattern in source.files for path in folder.glob(pattern) if path.is_file()}
    found = [document for path in paths for document in _read(path, str(path.relative_to(folder)), source.parts)]
    return sorted(found, key=lambda document: hashlib.sha256(document.name.encode()).digest())


def _read(path: Path, name: str, parts: list[str]) -> list[Document]:
    data = path.read_bytes()
    if path.suffix == ".rdb":
        books = [strings for strings in r_character_vectors(data) if strings[0] in parts]
        return [Document(f"{name}#{book[0]}", "\n".join(book)) for book in books]
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    text = data.decode(errors="ignore")
    return [Document(name, text_of_html(text) if path.suffix == ".html" else text)]


def r_character_vectors(data: bytes) -> list[list[str]]:
    """Reads an .rdb of R that holds plain character vectors alone: a length, then zlib, of each serialised object."""
    vectors = []
    while data:
        unpack = zlib.decompressobj()
        vectors.append(_r_character_vector(unpack.decompress(data[4:])))
        data = unpack.unused_data
    return vectors


def _r_character_vector(data: bytes) -> list[str]:
    """Reads R's serialisation, format 3, big-endian: two bytes and three numbers, the encoding, flags, the strings."""
    numbers = struct.Struct(">ii")
    (encoding_length,) = struct.unpack_from(">i", data, 14)
    at = 18 + encoding_length
    flags, count = numbers.unpack_from(data, at)
    if data[:2] != b"X\n" or flags & 0xFF != 16:
        raise ValueError("an object of the .rdb is no character vector")
    at, strings = at + numbers.size, []
    for _ in range(count):
        _, length = numbers.unpack_from(data, at)
        at += numbers.size
        strings.append(data[at : at + length].decode())
        at += length
    return strings


class _Text(html.parser.HTMLParser):
    HIDDEN = {"script", "style", "head"}
    ENDS_LINE = {"p", "br", "div", "li", "h1", "h2", "h3", "h4", "h5", "h6", "tr", "blockquote"}

    def __init__(self):
        super().__init__()
        self.pieces, self._hidden = [], 0

    def handle_starttag(self, tag, attrs):
        self._hidden += tag in self.HIDDEN
        if tag in self.ENDS_LINE:
            self.pieces.append("\n")

    def handle_endtag(self, tag):
        self._hidden -= tag in self.HIDDEN
        if tag in self.ENDS_LINE:
            self.pieces.append("\n")

    def handle_data(self, data):
        if not self._hidden:
            self.pieces.append(data.replace("\n", " "))  # a line break in the source ends no line


def text_of_html(page: str) -> str:
    """Returns what a reader sees, a paragraph a line, with an empty line between paragraphs."""
    parser = _Text()
    parser.feed(page)
    parser.close()
    lines = (" ".join(line.split()) for line in "".join(parser.pieces).split("\n"))
    return "\n\n".join(filter(None, lines)) + "\n"
