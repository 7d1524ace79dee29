"""Settings: `EngineConfig`, a frozen dataclass whose help texts become the command line's flags.

Knows nothing of torch: names of devices and dtypes are strings until the engine reads them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from minserve.chat_formats import REASONING_SETTINGS, TOOL_SETTINGS
from minserve.errors import ConfigError
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
