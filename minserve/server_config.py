"""`ServerConfig`: settings of the HTTP server."""

from __future__ import annotations

import re
from dataclasses import dataclass

from minserve.access_names import HOST_NAME, ORIGIN, URL, check_key, names_in
from minserve.config import option
from minserve.errors import ConfigError
from minserve.exit_codes import EXIT_HUNG

LOG_FORMATS = ("text", "json")
REQUEST_LINES = ("all", "errors", "off")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of the HTTP server.

    Raises:
        ConfigError: where a value is outside its range.
    """

    host: str = option("127.0.0.1", "address to listen on", group="server")
    port: int = option(8000, "port to listen on; 0 takes a free one", group="server")
    served_model_name: str | None = option(
        None, "the model's name in the API; default: taken from --model", group="server"
    )
    shutdown_timeout: float = option(
        30.0, "seconds that running requests may still take after SIGTERM", group="server"
    )
    profile_seconds: float = option(
        3.0,
        "time to measure this device at the first start; the result is kept, and refined while "
        "nothing runs",
        group="server",
    )
    first_byte_s: float = option(
        10.0,
        "a stream that has sent nothing for so many seconds begins with a comment, since proxies "
        "give up; until then an error has its own status; 0 waits for ever",
        group="server",
    )
    metrics_prefix: str = option(
        "minserve",
        "what the names in /metrics begin with; 'vllm' lets dashboards made for vLLM work",
        group="server",
    )
    watchdog_s: float = option(
        60.0,
        "an engine whose iteration lasts longer hangs: /health fails, and one of several is given up",
        group="server",
    )
    watchdog_exit_s: float = option(
        60.0,
        "a server whose only engine hangs or is broken for so long ends its process, with exit code "
        f"{EXIT_HUNG}, so that it is started again; 0: never",
        group="server",
    )
    log_format: str = option(
        "text", "json writes each log record as a JSON object", group="log", choices=LOG_FORMATS
    )
    log_requests: str = option(
        "all",
        "requests that the log has a line for; errors: those that were refused or did not end well",
        group="log",
        choices=REQUEST_LINES,
    )
    otlp_endpoint: str | None = option(
        None,
        "send a trace of each generation to this OTLP/HTTP collector, such as "
        "http://localhost:4318 (also OTEL_EXPORTER_OTLP_ENDPOINT); needs the extra otel",
        group="log",
    )
    api_key: tuple[str, ...] = option(
        (),
        "require 'Authorization: Bearer KEY'; may be given several times (also MINSERVE_API_KEY)",
        group="access",
    )
    api_keys_file: str | None = option(
        None, "file with more keys, one a line; # begins a comment", group="access"
    )
    allowed_hosts: tuple[str, ...] = option(
        (),
        "names by which clients may call this server, beside addresses, localhost and the "
        "machine's own; *: any. May be given several times",
        group="access",
    )
    allowed_origins: tuple[str, ...] = option(
        (),
        "origins whose web pages may use this server, such as https://chat.example.com; *: all. "
        "May be given several times",
        group="access",
    )
    max_body_mib: float = option(8.0, "largest request body in MiB", group="limits")
    max_connections: int = option(4096, "most connections at a time", group="limits")
    max_requests_per_key: int | None = option(
        None,
        "most requests at a time with one API key, or without keys from one address; default: no "
        "limit but --max-queue",
        group="limits",
    )
    request_timeout_s: float | None = option(
        None,
        "most seconds for a generation, waiting included; one that takes longer ends with an "
        "error; default: no limit",
        group="limits",
    )
    header_timeout_s: float = option(
        30.0, "most seconds for sending a request's headers", group="limits"
    )
    body_timeout_s: float = option(
        60.0, "most seconds for sending a request's body", group="limits"
    )
    send_timeout_s: float = option(
        60.0,
        "a client that takes so long to read what is buffered for it loses its connection",
        group="limits",
    )
    keep_alive_s: float = option(
        620.0, "a connection without requests is closed after so many seconds", group="limits"
    )

    @property
    def has_keys(self) -> bool:
        """True where requests need an API key."""
        return bool(self.api_key) or self.api_keys_file is not None

    def __post_init__(self) -> None:
        for name in (
            "profile_seconds",
            "watchdog_s",
            "max_body_mib",
            "header_timeout_s",
            "body_timeout_s",
            "send_timeout_s",
            "keep_alive_s",
            "request_timeout_s",
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name} must be above 0, not {value}")
        for name in ("max_connections", "max_requests_per_key"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be between 0 and 65535, not {self.port}")
        for name in ("shutdown_timeout", "first_byte_s", "watchdog_exit_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must not be below 0, not {getattr(self, name)}")
        if self.otlp_endpoint is not None and not URL.fullmatch(self.otlp_endpoint):
            raise ConfigError(
                "otlp_endpoint must be a URL such as http://localhost:4318, not "
                f"{self.otlp_endpoint!r}"
            )
        for name, choices in (("log_format", LOG_FORMATS), ("log_requests", REQUEST_LINES)):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}"
                )
        if not re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", self.metrics_prefix):
            raise ConfigError(
                f"metrics_prefix must be letters, digits and '_', and begin with no digit, "
                f"not {self.metrics_prefix!r}"
            )
        for name in ("api_key", "allowed_hosts", "allowed_origins"):
            if isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} must be a tuple of texts, not one text")
        for key in self.api_key:
            check_key(key, "an API key")
        for origin in names_in(self.allowed_origins):
            if not ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"allowed_origins: {origin!r} is no origin; one looks like "
                    "https://chat.example.com or http://localhost:3000, without a path"
                )
        for host in names_in(self.allowed_hosts):
            if not HOST_NAME.fullmatch(host):
                raise ConfigError(
                    f"allowed_hosts: {host!r} is no name; one looks like llm.example.com, "
                    "without a port"
                )
