"""Settings: frozen dataclasses whose help texts become the command line's flags.

Knows nothing of torch: names of devices and dtypes are strings until the engine reads them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from minserve.access_names import HOST_NAME, ORIGIN, URL, check_key, names_in
from minserve.chat_formats import REASONING_SETTINGS, TOOL_SETTINGS
from minserve.errors import ConfigError
from minserve.exit_codes import EXIT_HUNG
from minserve.planner.policies.registry import POLICIES
from minserve.slo.objectives import SLO

DEFAULT_MODEL = "smollm2"
DTYPES = ("auto", "float32", "float16", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
QUANTIZATIONS = ("none", "int8")
KV_CACHE_DTYPES = ("auto", "fp8", "int8")
GENERATION_CONFIGS = ("auto", "off")
LENGTH_ESTIMATORS = ("quantile", "max_tokens")
# Most tokens of an iteration, unless the settings say. A GPU needs thousands to be busy.
TOKEN_BUDGETS = {"cuda": 8192, "cpu": 512}
# flash-attn pages its KV in blocks of a multiple of so many tokens.
FLASH_ATTN_PAGE = 256
ATTENTION_BACKENDS = ("auto", "torch", "triton", "flash-attn")
SPECULATORS = ("auto", "draft", "ngram", "off")
EXECUTORS = ("model", "simulated")
LOG_FORMATS = ("text", "json")
REQUEST_LINES = ("all", "errors", "off")
ROUTERS = ("slo", "least-loaded", "round-robin")


def option(default: Any, help: str, *, group: str, choices: Collection[str] | None = None) -> Any:
    """A dataclass field that carries its help text, flag group and choices."""
    return field(default=default, metadata={"help": help, "group": group, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything that one engine needs to know.

    Raises:
        ConfigError: where a value is outside its range.
    """

    model: str = option(
        DEFAULT_MODEL,
        "a local Hugging Face folder, a .gguf file, a hub id, or 'smollm2' for the embedded "
        "SmolLM2-135M-Instruct",
        group="model",
    )
    tokenizer: str | None = option(
        None,
        "folder, GGUF file or hub id of the tokenizer, where it is not beside the model",
        group="model",
    )
    chat_template: str | None = option(
        None,
        "how chats are written as prompts: a file with a jinja template, or the name of one of "
        "the model's templates where it has several; default: the model's own",
        group="model",
    )
    tool_format: str = option(
        "auto",
        "the form in which the model writes calls of tools. auto: told by its chat template, or "
        "hermes, with the tools described in a system message, where the template knows none. none: "
        "tools are refused",
        group="model",
        choices=TOOL_SETTINGS,
    )
    reasoning_format: str = option(
        "auto",
        "the markers of the model's thinking, which answers tell apart: think for <think> and "
        "</think>, mistral for [THINK] and [/THINK]. auto: told by its chat template and its tokens. "
        "none: thinking stays in the text",
        group="model",
        choices=REASONING_SETTINGS,
    )
    dtype: str = option(
        "auto",
        "float32, bfloat16 or float16. auto: bfloat16 on a GPU and on CPUs that multiply it in "
        "hardware, float16 on other CPUs (weights in float16, arithmetic in float32)",
        group="model",
        choices=DTYPES,
    )
    quantization: str = option(
        "none",
        "int8: weights of linear layers in 8 bits, of the draft model too, multiplied in int8: half "
        "the weights' memory at about the same speed, slightly less exact; x86 CPUs alone",
        group="model",
        choices=QUANTIZATIONS,
    )
    generation_config: str = option(
        "auto",
        "auto: requests that leave sampling settings out get those of the model's "
        "generation_config.json. off: they get the API's own, and the file's stop tokens do not count",
        group="model",
        choices=GENERATION_CONFIGS,
    )
    device: str = option(
        "auto", "auto takes CUDA where there is one", group="model", choices=DEVICES
    )
    max_model_len: int | None = option(
        None, "most tokens of prompt and output together; default: the model's own", group="model"
    )
    threads: int | None = option(
        None,
        "threads of the forward pass on a CPU; default: the physical cores that this process may "
        "use, at most a container's CPU quota (OMP_NUM_THREADS does not change it)",
        group="model",
    )
    tensor_parallel: int = option(
        1,
        "ranks that share one model: each is a process with a GPU of its own, or on a CPU with its "
        "share of the threads, and holds a part of each layer",
        group="model",
    )
    attention_backend: str = option(
        "auto",
        "triton: this project's kernels; flash-attn: that library's; torch: plain operations, "
        "everywhere. auto: triton on a GPU of compute capability 8.0 or newer, else torch. A "
        "backend asked for by name fails where it cannot run",
        group="model",
        choices=ATTENTION_BACKENDS,
    )
    cuda_graphs: bool = option(
        True,
        "launch passes over decodes, and over small batches with prefills, as CUDA graphs, recorded "
        "at the start (on a GPU, with --attention-backend triton)",
        group="model",
    )
    deterministic: bool = option(
        False,
        "make every output the same, to the last bit of its log probabilities, whatever else runs "
        "beside it: alone or in a batch, with drafts or without. On CPUs alone, and slower",
        group="model",
    )
    executor: str = option(
        "model",
        "model: run it. simulated: wait for as long as a device would take by its --profile, and "
        "make tokens up; all else is real",
        group="model",
        choices=EXECUTORS,
    )
    profile: str | None = option(
        None,
        "with --executor simulated: a file of 'minserve profile', or a published device such as "
        "opt-6.7b-a100",
        group="model",
    )
    block_size: int = option(32, "tokens per KV cache block", group="kv cache")
    kv_cache_gib: float | None = option(
        None,
        "memory for the KV cache in GiB; default: 90%% of what is free on a GPU (85%% "
        "with CUDA graphs), on a CPU a quarter of the memory that is free, within a "
        "container's limit, and at most 4 GiB",
        group="kv cache",
    )
    num_blocks: int | None = option(
        None, "size of the KV cache in blocks (instead of --kv-cache-gib)", group="kv cache"
    )
    kv_cache_dtype: str = option(
        "auto",
        "keys and values in 8 bits, of the draft model too: nearly twice the tokens in the same "
        "memory, slightly less exact. int8 is more exact than fp8 (e4m3); auto: as --dtype says",
        group="kv cache",
        choices=KV_CACHE_DTYPES,
    )
    prefix_caching: bool = option(
        True, "reuse the KV of prompts that begin alike", group="kv cache"
    )
    policy: str = option(
        "dp",
        "who runs in each iteration. dp: whoever's SLOs can be kept, chosen by a dynamic program; "
        "edf: the same with greedy admission by deadline; sarathi: decodes first, then chunked "
        "prefills under the token budget; fcfs: waiting prefills first, then decodes",
        group="planner",
        choices=POLICIES,
    )
    token_budget: int | None = option(
        None,
        "most tokens in one iteration (dp and edf make it shorter to keep SLOs); default: 8192 on a "
        "GPU, 512 on a CPU",
        group="planner",
    )
    max_num_seqs: int = option(128, "most sequences in one iteration", group="planner")
    chunked_prefill: bool = option(
        True, "split long prompts over iterations (only fcfs can do without)", group="planner"
    )
    max_queue: int = option(
        1024, "most outputs waiting or running; a request beyond it is refused", group="planner"
    )
    speculator: str = option(
        "auto",
        "who drafts tokens for the model to verify. draft: a small model; ngram: what followed "
        "the last time that the text ended like this; auto: draft where --draft-model is given, "
        "else off",
        group="speculation",
        choices=SPECULATORS,
    )
    draft_model: str | None = option(
        None,
        "the draft model, as for --model; its vocabulary must be the model's. Default with "
        "--speculator draft and the embedded model: the draft that comes with it",
        group="speculation",
    )
    max_speculation: int = option(
        8,
        "most tokens drafted for a sequence in one iteration. dp and edf choose each length by "
        "what it brings, sarathi and fcfs always draft this many",
        group="speculation",
    )
    slo_classes: str | Mapping[str, SLO] | None = option(
        None,
        "TOML file of SLO classes, added to the built-in ones (chatbot, coding, ...)",
        group="slo",
    )
    default_slo: str | None = option(
        None, "class of requests that bring no SLO; default: they are best effort", group="slo"
    )
    thinking_marker: str | None = option(
        None,
        "text that ends the model's thinking; default: that of --reasoning-format",
        group="slo",
    )
    length_estimator: str = option(
        "quantile",
        "how long outputs will be. quantile: from recent outputs of the same class; max_tokens: "
        "as long as they may be",
        group="slo",
        choices=LENGTH_ESTIMATORS,
    )
    best_effort_share: float = option(
        0.05, "share of the device's time that best effort gets at least", group="slo"
    )
    seed: int | None = option(
        None,
        "base of the seeds drawn for requests that bring none; default: the system's entropy",
        group="planner",
    )

    def __post_init__(self) -> None:
        for name, low in (
            ("block_size", 1),
            ("num_blocks", 1),
            ("token_budget", 1),
            ("max_num_seqs", 1),
            ("max_queue", 1),
            ("max_model_len", 1),
            ("max_speculation", 1),
            ("threads", 1),
            ("tensor_parallel", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name} must be at least {low}, not {value}")
        if self.kv_cache_gib is not None and not 0 < self.kv_cache_gib < float("inf"):
            raise ConfigError(f"kv_cache_gib must be above 0, not {self.kv_cache_gib}")
        if not 0 <= self.best_effort_share < 1:
            raise ConfigError(
                f"best_effort_share must be at least 0 and below 1, not {self.best_effort_share}"
            )
        if (self.executor == "simulated") != (self.profile is not None):
            raise ConfigError("executor simulated and profile belong together: give both or none")
        if self.executor == "simulated" and self.quantization != "none":
            raise ConfigError(
                "executor simulated has no weights: leave quantization out, and simulate by a "
                "profile measured with it"
            )
        if self.kv_cache_dtype != "auto":
            self._check_kv_cache_dtype()
        if self.executor == "simulated" and self.tensor_parallel > 1:
            raise ConfigError(
                "executor simulated has no ranks: leave tensor_parallel out, and simulate by a "
                "profile measured with it"
            )
        if self.deterministic:
            self._check_deterministic()
        if self.draft_model is not None and self.speculator not in ("auto", "draft"):
            raise ConfigError(
                f"draft_model is given, but speculator {self.speculator!r} does not use one"
            )
        if self.speculator == "draft" and self.draft_model is None and self.model != DEFAULT_MODEL:
            raise ConfigError(f"speculator draft needs a draft_model for {self.model}")
        if self.num_blocks is not None and self.kv_cache_gib is not None:
            raise ConfigError("give num_blocks or kv_cache_gib, not both")
        if self.token_budget is not None:
            self._check_budget(self.token_budget)
        if self.attention_backend == "flash-attn" and self.block_size % FLASH_ATTN_PAGE:
            raise ConfigError(
                "attention_backend flash-attn needs a block_size of a multiple of "
                f"{FLASH_ATTN_PAGE}, not {self.block_size}"
            )
        for f in fields(self):
            choices = f.metadata["choices"]
            if choices and getattr(self, f.name) not in choices:
                raise ConfigError(
                    f"{f.name} must be one of {', '.join(choices)}, not {getattr(self, f.name)!r}"
                )

    def _check_kv_cache_dtype(self) -> None:
        if self.attention_backend == "flash-attn":
            raise ConfigError(
                f"attention_backend flash-attn reads no KV cache in {self.kv_cache_dtype}; use "
                "--attention-backend triton, or leave kv_cache_dtype out"
            )
        if self.executor == "simulated":
            raise ConfigError(
                "executor simulated has no KV in memory: leave kv_cache_dtype out, and simulate by "
                "a profile measured with it"
            )

    def _check_deterministic(self) -> None:
        for name, fitting in (
            ("device", ("auto", "cpu")),
            ("attention_backend", ("auto", "torch")),
            ("quantization", ("none",)),
            ("kv_cache_dtype", ("auto",)),
            ("executor", ("model",)),
            ("tensor_parallel", (1,)),
        ):
            if getattr(self, name) not in fitting:
                raise ConfigError(
                    f"deterministic is not available with {name} {getattr(self, name)!r}; "
                    "leave one of the two out"
                )

    def budget_on(self, device: str) -> int:
        """Return the most tokens of an iteration on a device of a type, ``cuda`` or ``cpu``.

        Raises:
            ConfigError: where the type's default is too small for ``max_num_seqs``.
        """
        budget = self.token_budget or TOKEN_BUDGETS[device]
        self._check_budget(budget)
        return budget

    def _check_budget(self, token_budget: int) -> None:
        if token_budget < self.max_num_seqs:
            raise ConfigError(
                f"token_budget ({token_budget}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): each running sequence takes one token per iteration"
            )

    @classmethod
    def create(cls, model: str = DEFAULT_MODEL, **settings: Any) -> EngineConfig:
        """Build a config from keyword settings, naming an unknown one.

        Raises:
            ConfigError: for a setting that does not exist.
        """
        known = {f.name for f in fields(cls)}
        for name in settings:
            if name not in known:
                raise ConfigError(f"unknown setting {name!r}; known: {', '.join(sorted(known))}")
        return cls(model=str(model), **settings)


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


@dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """Settings of several replicas and what stands in front of them.

    Raises:
        ConfigError: where a value is outside its range.
    """

    replicas: int = option(
        1, "engines behind this endpoint, each a process of its own", group="replicas"
    )
    router: str = option(
        "slo",
        "which replica gets a request. slo: one that can keep its SLO, with the most prefill budget "
        "left, counting the prefix that it holds; least-loaded: with the fewest requests; "
        "round-robin: the next one",
        group="replicas",
        choices=ROUTERS,
    )
    hop_limit: int = option(
        2, "times that a request is moved on to a replica that may keep its SLO", group="replicas"
    )
    replica_timeout: float = option(
        5.0, "a replica that is silent for so many seconds is given up", group="replicas"
    )
    control_host: str = option(
        "127.0.0.1", "address that replicas meet the controller at", group="replicas"
    )
    control_port: int = option(
        0, "port that replicas meet the controller at; 0 takes a free one", group="replicas"
    )

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ConfigError(f"replicas must be at least 1, not {self.replicas}")
        if self.hop_limit < 0:
            raise ConfigError(f"hop_limit must not be below 0, not {self.hop_limit}")
        if not 1 <= self.replica_timeout < float("inf"):
            raise ConfigError(
                f"replica_timeout must be at least 1 second, not {self.replica_timeout}"
            )
        if not 0 <= self.control_port <= 65535:
            raise ConfigError(f"control_port must be between 0 and 65535, not {self.control_port}")
        if self.router not in ROUTERS:
            raise ConfigError(f"router must be one of {', '.join(ROUTERS)}, not {self.router!r}")
