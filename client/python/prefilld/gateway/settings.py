"""The flags of prefilld-gateway. They are read here and nowhere else."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import grpc

from prefilld.options import Attention


@dataclass(frozen=True)
class Settings:
    """The flags, by name; read_settings() describes each."""

    model: Path
    prefill: list[str]
    decode: list[str]
    listen: tuple[str, int]
    port_file: Path | None
    served_model_name: str
    policy: str | None
    tries: int
    default_max_tokens: int
    remembered_blocks: int
    max_requests: int
    max_connections: int
    max_body_bytes: int
    max_pending_body_bytes: int
    receive_timeout_s: float
    request_timeout_s: float
    stall_timeout_s: float
    drain_timeout_s: float
    metadata: tuple[tuple[str, str], ...]
    tenant: str
    tls_ca: str | None
    tls_cert: str | None
    tls_key: str | None

    def credentials(self) -> grpc.ChannelCredentials | None:
        """Returns those for calls to prefilld and to decode workers. Raises OSError."""
        if self.tls_ca is None:
            return None
        ca, key, cert = (Path(f).read_bytes() if f else None for f in (self.tls_ca, self.tls_key, self.tls_cert))
        return grpc.ssl_channel_credentials(ca, key, cert)


def read_settings(arguments: list[str] | None = None) -> Settings:
    """Reads the command line. Ends the process with a message that lists all that is wrong with it."""
    parser = argparse.ArgumentParser(
        prog="prefilld-gateway",
        description="OpenAI's HTTP interface before prefilld, for routers and for people.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, type=Path, help="the model's folder, for its tokenizer and its chat template")
    add("--prefill", required=True, help="host:port of each prefilld, with commas, as vLLM reaches them too")
    add("--decode", default="", help="host:port of each decode worker, as prefilld reaches them too; "
        "none: only routers' prefill calls are answered")  # fmt: skip
    add("--listen", default="127.0.0.1:8000", help="host:port of this HTTP server; port 0 is any free one")
    add("--port_file", type=Path, help="the chosen port is written here once the gateway listens")
    add("--served_model_name", default="", help="the model's name for clients; default: that of the folder")
    add("--policy", help="the attention policy of all prompts; default: the server's")
    add("--tries", type=int, default=3, help="how often a prompt is tried, if servers fail before a token comes")
    add("--default_max_tokens", type=int, default=512, help="tokens of a chat's answer where the request does not say")
    add("--remembered_blocks", type=int, default=100_000,
        help="blocks of 128 tokens that are remembered for each prefilld, at most")  # fmt: skip
    add("--max_requests", type=int, default=256, help="requests of all paths that are answered at once; more get 503")
    add("--max_connections", type=int, default=1024, help="connections that are served at once; more get 503")
    add("--max_body_bytes", type=int, default=16 << 20, help="the largest body of a request")
    add("--max_pending_body_bytes", type=int, default=64 << 20,
        help="of all bodies that are still coming, or whose prompts are no tokens yet; more get 503")  # fmt: skip
    add("--receive_timeout_s", type=float, default=30.0,
        help="seconds until the head of a request has come, and again until its body has")  # fmt: skip
    add("--request_timeout_s", type=float, default=600.0, help="seconds until an answer must be whole")
    add("--stall_timeout_s", type=float, default=30.0, help="seconds until a client that takes nothing is cut off")
    add("--drain_timeout_s", type=float, default=25.0, help="seconds that answers have to end after SIGTERM")
    add("--metadata", action="append", default=[], metavar="KEY=VALUE",
        help="goes with each call to prefilld, for servers that tell tenants apart; may be given again")  # fmt: skip
    add("--tenant", default="", help="the tenant that prefilld counts these calls to, where it tells tenants apart: "
        "what its prefix cache has for others is then not counted on")  # fmt: skip
    add("--tls_ca", help="PEM file with which prefilld's and the workers' certificates are verified; none: plain text")
    add("--tls_cert", help="PEM file of the gateway's own certificate, for servers that ask for one")
    add("--tls_key", help="PEM file of its key")
    flags = parser.parse_args(arguments)

    wrong: list[str] = []
    for name, low, high in (
        ("tries", 1, 16),
        ("default_max_tokens", 1, 2**31 - 1),
        ("remembered_blocks", 0, 10**8),
        ("max_requests", 1, 10**5),
        ("max_connections", 1, 10**6),
        ("max_body_bytes", 1, 2**31),
        ("max_pending_body_bytes", 1, 2**36),
        ("receive_timeout_s", 0.1, 3_600),
        ("request_timeout_s", 0.1, 86_400),
        ("stall_timeout_s", 0.1, 86_400),
        ("drain_timeout_s", 0, 86_400),
    ):
        if not low <= getattr(flags, name) <= high:
            wrong.append(f"--{name} is {getattr(flags, name)}, allowed: {low} to {high}")
    if flags.max_pending_body_bytes < flags.max_body_bytes:
        wrong.append("--max_pending_body_bytes is less than --max_body_bytes: no such body could come")
    if len(flags.tenant) > 128 or not flags.tenant.isascii() or not flags.tenant.isprintable():
        wrong.append(f"--tenant is {flags.tenant!r}, allowed: at most 128 printable ASCII characters")
    prefill, decode = (_addresses(name, getattr(flags, name), wrong) for name in ("prefill", "decode"))
    listen = _address("listen", flags.listen, 0, wrong)
    metadata = [tuple(entry.split("=", 1)) for entry in flags.metadata if "=" in entry]
    if len(metadata) < len(flags.metadata):
        wrong.append("--metadata must be KEY=VALUE")
    if flags.policy:
        try:
            Attention(flags.policy).to_wire()
        except ValueError as error:
            wrong.append(f"--policy: {error}")
    if bool(flags.tls_cert) != bool(flags.tls_key) or (flags.tls_cert and not flags.tls_ca):
        wrong.append("--tls_cert and --tls_key need each other and --tls_ca")
    if wrong:
        parser.error("; ".join(wrong))
    return Settings(
        **{
            **vars(flags),
            "prefill": prefill,
            "decode": decode,
            "listen": listen,
            "metadata": tuple(metadata),
            "served_model_name": flags.served_model_name or flags.model.resolve().name,
        }
    )


def _addresses(name: str, value: str, wrong: list[str]) -> list[str]:
    addresses = [a.strip() for a in value.split(",") if a.strip()]
    for address in addresses:
        _address(name, address, 1, wrong)
    if len(set(addresses)) < len(addresses):
        wrong.append(f"--{name} names an address twice")
    if name == "prefill" and not addresses:
        wrong.append("--prefill names no address")
    return addresses


def _address(name: str, value: str, lowest_port: int, wrong: list[str]) -> tuple[str, int]:
    host, _, port = value.rpartition(":")
    is_bare_v6 = ":" in host and not (host.startswith("[") and host.endswith("]"))
    if not host or is_bare_v6 or not (port.isdecimal() and lowest_port <= int(port) < 65536):
        wrong.append(f"--{name}: {value!r} is not host:port, or [IPv6]:port")
        return "", 0
    return host.strip("[]"), int(port)
