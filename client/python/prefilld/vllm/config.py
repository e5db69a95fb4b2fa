"""The connector's configuration, and what a request says about its prefill. Nothing here needs vLLM."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import grpc

from prefilld.options import MAX_LANES


@dataclass(frozen=True)
class ConnectorConfig:
    """`kv_connector_extra_config` of vLLM's KVTransferConfig. Every field may be left out.

    prefill_address: host:port of a prefilld, or a list that takes the calls in turn. Prompts of which at least
    min_prompt_tokens tokens are not in vLLM's own cache are prefilled there. Without it, and below that, only
    requests whose kv_transfer_params say do_remote_prefill are prefilled elsewhere.
    load_async: vLLM goes on with other requests while a prompt is prefilled and its KV arrives. False: each load
    holds the engine up.
    policy: the attention policy of all prompts ("dense", "share", ...); None: the server's default.
    lanes: parallel streams for one prompt's KV, 1 to 16.
    max_loads: prompts whose KV a worker receives at once; others wait.
    timeout_s: seconds until a load has failed, its waiting at the server included.
    retries: how often an asynchronous load whose failure may pass is tried again before vLLM is told.
    model_fingerprint: if it is set, a server with another model refuses.
    metadata: key and value pairs that go with each call, for servers that tell tenants apart.
    tls_ca, tls_cert, tls_key: PEM files; tls_ca alone encrypts, with the others the connector names itself.
    """

    prefill_address: str | list[str] | None = None
    min_prompt_tokens: int = 1024
    load_async: bool = True
    policy: str | None = None
    lanes: int = 1
    max_loads: int = 8
    timeout_s: float = 600.0
    retries: int = 1
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
        for name, low, high in (
            ("min_prompt_tokens", 1, 2**31),
            ("lanes", 1, MAX_LANES),
            ("max_loads", 1, 1024),
            ("timeout_s", 0.001, 86_400),
            ("retries", 0, 100),
        ):
            value = getattr(config, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                wrong.append(f"{name} is {value!r}, allowed: {low} to {high}")
        if bool(config.tls_cert) != bool(config.tls_key) or (config.tls_cert and not config.tls_ca):
            wrong.append("tls_cert and tls_key need each other and tls_ca")
        if wrong:
            raise ValueError("kv_connector_extra_config: " + "; ".join(wrong))
        return config

    def credentials(self) -> grpc.ChannelCredentials | None:
        if self.tls_ca is None:
            return None

        def read(path):
            if path is None:
                return None
            with open(path, "rb") as file:
                return file.read()

        return grpc.ssl_channel_credentials(read(self.tls_ca), read(self.tls_key), read(self.tls_cert))


@dataclass(frozen=True)
class SharedPrefill:
    """The one computation from which all tensor-parallel ranks take their heads, known to each of them beforehand.

    Rank 0 asks for it at `address` by this id, and the others attach to it with the key.
    """

    address: str
    request_id: str
    key: str


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
        address = None
        if params.get("remote_host") or params.get("remote_port"):
            host, port = params.get("remote_host"), params.get("remote_port")
            if not isinstance(host, str) or not host or not str(port).isdecimal() or not 0 < int(port) < 65536:
                raise ValueError(f"remote_host {host!r} and remote_port {port!r} are no address")
            address = f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
        elif config.prefill_address is None:
            raise ValueError("do_remote_prefill without remote_host, and no prefill_address is configured")
        own = params.get("attention") or {}
        priority = params.get("priority", 0)
        if not isinstance(own, dict) or not isinstance(priority, int):
            raise ValueError(f"attention {own!r} must be an object, and priority {priority!r} a number")
        return cls(address, bool(params.get("load_async", config.load_async)), {**attention, **own}, priority)
