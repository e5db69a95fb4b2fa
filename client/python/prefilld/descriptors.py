"""The wire contract in compiled form: a FileDescriptorSet of proto/.

In a checkout it is compiled from proto/ on import, which takes a few milliseconds and cannot be
stale. client/python has a copy of proto/ (a test compares them), so that the folder can be used and
installed alone. An installed package carries the compiled file. To take the client to a machine
without a compiler:

    python3 client/python/prefilld/descriptors.py

writes it beside this module.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

FILE_NAME = "descriptors.binpb"
PACKAGED = Path(__file__).with_name(FILE_NAME)


def _proto_root() -> Path | None:
    """Returns proto/ of the checkout, or else the copy beside the package, or None when it is installed."""
    above = Path(__file__).resolve().parents
    for root in (above[min(3, len(above) - 1)] / "proto", above[1] / "proto"):
        if (root / "prefill" / "v1").is_dir():
            return root
    return None


PROTO_ROOT = _proto_root()


def _run_compiler(arguments: list[str]) -> None:
    """Runs the system's protoc, or else the one inside grpcio-tools."""
    if shutil.which("protoc"):
        done = subprocess.run(["protoc", *arguments], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{PROTO_ROOT} does not compile: {done.stderr}")
        return
    try:
        import grpc_tools
        from grpc_tools import protoc
    except ImportError:
        raise RuntimeError(
            f"{PROTO_ROOT} cannot be compiled: neither protoc (Debian: protobuf-compiler) nor grpcio-tools is here"
        ) from None
    includes = Path(grpc_tools.__file__).parent / "_proto"
    if protoc.main(["protoc", f"-I{includes}", *arguments]) != 0:
        raise RuntimeError(f"{PROTO_ROOT} does not compile")


def compile_descriptors() -> bytes:
    files = sorted(str(p.relative_to(PROTO_ROOT)) for p in PROTO_ROOT.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / FILE_NAME
        _run_compiler(["--include_imports", f"--descriptor_set_out={out}", f"-I{PROTO_ROOT}", *files])
        return out.read_bytes()


def load_descriptors() -> bytes:
    """Compiles the contract afresh where its text is, otherwise reads the packaged file."""
    if PROTO_ROOT is None:
        return PACKAGED.read_bytes()
    try:
        return compile_descriptors()
    except RuntimeError:
        if PACKAGED.exists():
            return PACKAGED.read_bytes()
        raise


def write_descriptors(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(compile_descriptors())


if __name__ == "__main__":
    write_descriptors(PACKAGED)
