"""The connector's configuration, and what a request says about its prefill. Nothing here needs vLLM."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc

from prefilld.options import MAX_LANES, Attention
from prefilld.vllm.addresses import Address, AddressPattern, read_port

MAX_ADDRESSES, MAX_PATTERNS, MAX_METADATA = 64, 64, 32
MAX_PRIORITY = 7  # either way, as prefilld takes it


@dataclass(frozen=True)
class ConnectorConfig:
    """`kv_connector_extra_config` of vLLM's KVTransferConfig. Every field may be left out.

    prefill_address: host:port of a prefilld, or a list that takes the calls in turn. Prompts of which at least
    min_prompt_tokens tokens are not in vLLM's own cache are prefilled there. Without it, and below that, only
    requests whose kv_transfer_params say do_remote_prefill are prefilled elsewhere.
    prefill_allow: patterns of the addresses that kv_transfer_params may name beside prefill_address, such as
    "10.2.*.*:50051" or "*.prefill:50051" (AddressPattern). All others are left alone: they would be sent the prompt and
    the metadata.
    load_async: vLLM goes on with other requests while a prompt is prefilled and its KV arrives. False: each load
    holds the engine up.
    policy: the attention policy of all prompts ("dense", "share", ...); None: the server's default.
    lanes: parallel streams for one prompt's KV, 1 to 16.
    max_loads: prompts whose KV a worker receives at once; others wait.
    timeout_s: seconds until a load has failed, its waiting at the server included.
    retries: how often an asynchronous load whose failure may pass is tried again before vLLM is told.
    resumable: a load whose connection breaks goes on where it stopped, and nothing is computed again, if the server
    lets it (--resume_window_s). A server that was killed is then given up once that time has passed. False: a load
    whose connection breaks has failed at once.
    model_fingerprint: if it is set, a server with another model refuses.
    metadata: key and value pairs that go with each call, for servers that tell tenants apart.
    tls_ca, tls_cert, tls_key: PEM files; tls_ca alone encrypts, with the others the connector names itself.
    """

    prefill_address: str | list[str] | None = None
    prefill_allow: list[str] = field(default_factory=list)
    min_prompt_tokens: int = 1024
    load_async: bool = True
    policy: str | None = None
    lanes: int = 1
    max_loads: int = 8
    timeout_s: float = 600.0
    retries: int = 1
    resumable: bool = True
    model_fingerprint: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None

    @classmethod
    def read(cls, extra: dict[str, Any]) -> ConnectorConfig:
        """Raises ValueError with all that is wrong with `extra`."""
        known = {f.name for f in dataclasses.fields(cls)}
        wrong = [f"{name!r} is unknown; one of {', '.join(sorted(known))}" for name in extra if name not in known]
        config = cls(**{name: value for name, value in extra.items() if name in known})
        wrong += config._mistakes()
        if wrong:
            raise ValueError("kv_connector_extra_config: " + "; ".join(wrong))
        return config

    @property
    def addresses(self) -> tuple[str, ...]:
        """Returns those of prefill_address."""
        if self.prefill_address is None:
            return ()
        return (self.prefill_address,) if isinstance(self.prefill_address, str) else tuple(self.prefill_address)

    def allowed(self, address: str) -> str:
        """Returns an address in its one form. Raises ValueError for one that requests may not name, or that is none."""
        asked = Address.parse(address)
        is_configured = any(asked == Address.parse(configured) for configured in self.addresses)
        if not is_configured and not any(AddressPattern(pattern).admits(asked) for pattern in self.prefill_allow):
            named = ", ".join((*self.addresses, *self.prefill_allow)) or "none"
            raise ValueError(f"{asked} is not among the allowed servers (prefill_address, prefill_allow): {named}")
        return str(asked)

    def _mistakes(self) -> Iterator[str]:
        for name, low, high in (
            ("min_prompt_tokens", 1, 2**31),
            ("lanes", 1, MAX_LANES),
            ("max_loads", 1, 1024),
            ("retries", 0, 100),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                yield f"{name} is {value!r}, allowed: whole numbers from {low} to {high}"
        if isinstance(self.timeout_s, bool) or not isinstance(self.timeout_s, (int, float)) or not (
            0.001 <= self.timeout_s <= 86_400
        ):
            yield f"timeout_s is {self.timeout_s!r}, allowed: 0.001 to 86400"
        for name in ("load_async", "resumable"):
            if not isinstance(getattr(self, name), bool):
                yield f"{name} is {getattr(self, name)!r}, allowed: true and false"
        yield from _mistakes_of_addresses(self.prefill_address)
        yield from _mistakes_of_list("prefill_allow", self.prefill_allow, AddressPattern, 0, MAX_PATTERNS)
        try:
            Attention(self.policy).to_wire()
        except (ValueError, TypeError, AttributeError) as error:
            yield f"policy is {self.policy!r}: {error}"
        if not isinstance(self.model_fingerprint, str) or len(self.model_fingerprint) > 128:
            yield f"model_fingerprint is {self.model_fingerprint!r}, allowed: a text of at most 128 characters"
        yield from _mistakes_of_metadata(self.metadata)
        for name in ("tls_ca", "tls_cert", "tls_key"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                yield f"{name} is {value!r}, allowed: the path of a PEM file"
        if bool(self.tls_cert) != bool(self.tls_key) or (self.tls_cert and not self.tls_ca):
            yield "tls_cert and tls_key need each other and tls_ca"

    def credentials(self) -> grpc.ChannelCredentials | None:
        if self.tls_ca is None:
            return None

        def read(path):
            if path is None:
                return None
            with open(path, "rb") as file:
                return file.read()

        return grpc.ssl_channel_credentials(read(self.tls_ca), read(self.tls_key), read(self.tls_cert))


def _mistakes_of_addresses(value: Any) -> Iterator[str]:
    if value is None:
        return
    listed = [value] if isinstance(value, str) else value
    yield from _mistakes_of_list("prefill_address", listed, Address.parse, 1, MAX_ADDRESSES)


def _mistakes_of_list(
    name: str, value: Any, read: Callable[[str], Any], fewest: int, most: int
) -> Iterator[str]:
    if not isinstance(value, (list, tuple)) or not fewest <= len(value) <= most:
        yield f"{name} is {value!r}, allowed: a list of {fewest} to {most} texts"
        return
    for entry in value:
        try:
            read(entry)
        except (ValueError, TypeError, AttributeError) as error:
            yield f"{name} has {entry!r}: {error}"


def _mistakes_of_metadata(value: Any) -> Iterator[str]:
    if not isinstance(value, dict) or len(value) > MAX_METADATA:
        yield f"metadata is no object of at most {MAX_METADATA} texts"  # without the value, which may be a secret
        return
    for key, text in value.items():
        if not isinstance(key, str) or not re.fullmatch(r"[0-9a-z_.-]{1,256}", key) or key.startswith("grpc-"):
            yield f"metadata has the key {key!r}, allowed: 1 to 256 of 0-9 a-z _ . -, not beginning with grpc-"
        elif key.endswith("-bin"):
            yield f"metadata has the key {key!r}; bytes (-bin) cannot be given here"
        elif not isinstance(text, str) or not re.fullmatch(r"[ -~]{0,8192}", text):
            yield f"metadata {key!r} is no text of at most 8192 printable ASCII characters"


@dataclass(frozen=True)
class SharedPrefill:
    """The one computation from which all tensor-parallel ranks take their heads, known to each of them beforehand.

    Rank 0 asks for it by this id, and the others attach to it with the key: at the first of the addresses, and at the
    next one after a server was away.
    """

    addresses: tuple[str, ...]
    request_id: str
    key: str

    def at_next_address(self) -> SharedPrefill:
        return dataclasses.replace(self, addresses=self.addresses[1:] + self.addresses[:1])


@dataclass
class Load:
    """Tokens [first_token, end_token) of one prompt, which are to come into the blocks of one request.

    block_ids: vLLM's blocks of the whole prompt. address: None is the configured one. shared: None where there is
    one rank.
    """

    request_id: str
    tokens: list[int]
    block_ids: list[int]
    first_token: int
    end_token: int
    is_async: bool
    address: str | None = None
    attention: dict[str, Any] = field(default_factory=dict)
    priority: int = 0
    cache_salt: str = ""
    shared: SharedPrefill | None = None

    def blocks_to_fill(self, block_size: int) -> list[int]:
        """Returns the blocks that hold one of the tokens."""
        return self.block_ids[self.first_token // block_size : -(-self.end_token // block_size)]


@dataclass(frozen=True)
class Wish:
    """Where and how one request's prompt is to be prefilled.

    As `kv_transfer_params` of a request say it: {"do_remote_prefill": true, "remote_host": "10.0.0.1",
    "remote_port": 50051}, which is what routers send, and beside these "load_async": false, "priority": 3, and
    "attention": {"policy": "dense"} with the thresholds of prefilld.Attention.
    """

    address: str | None
    load_async: bool
    attention: dict[str, Any]
    priority: int

    @classmethod
    def of(cls, params: dict[str, Any] | None, config: ConnectorConfig) -> Wish | None:
        """Returns None for a request that vLLM shall prefill, and ValueError for params that nobody understands."""
        params = params or {}
        attention = {} if config.policy is None else {"policy": config.policy}
        if not params.get("do_remote_prefill"):
            # Params of other kinds are somebody's own plan for the request.
            if config.prefill_address is None or params:
                return None
            return cls(None, config.load_async, attention, 0)
        address = _address_of(params, config)
        own = params.get("attention") or {}
        priority = params.get("priority", 0)
        load_async = params.get("load_async", config.load_async)
        if not isinstance(own, dict):
            raise ValueError(f"attention is {own!r}, allowed: an object")
        if isinstance(priority, bool) or not isinstance(priority, int) or not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
            raise ValueError(f"priority is {priority!r}, allowed: whole numbers from {-MAX_PRIORITY} to {MAX_PRIORITY}")
        if not isinstance(load_async, bool):
            raise ValueError(f"load_async is {load_async!r}, allowed: true and false")
        return cls(address, load_async, {**attention, **own}, priority)


def _address_of(params: dict[str, Any], config: ConnectorConfig) -> str | None:
    """Returns the address that a request names, None if it names none. Raises ValueError if it may not name it."""
    host, port = params.get("remote_host"), params.get("remote_port")
    if not host and not port:
        if config.prefill_address is None:
            raise ValueError("do_remote_prefill without remote_host, and no prefill_address is configured")
        return None
    number = read_port(str(port))
    if not isinstance(host, str) or not host or number is None:
        raise ValueError(f"remote_host {host!r} and remote_port {port!r} are no address")
    return config.allowed(f"[{host}]:{number}" if ":" in host and not host.startswith("[") else f"{host}:{number}")
