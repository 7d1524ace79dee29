"""The attention interface and the choice of a backend.

A backend plans once per iteration (`prepare`) and runs once per layer (`write_kv`,
`forward`): everything that depends only on the batch's shape is computed in `prepare`.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from minserve.config import ATTENTION_BACKENDS
from minserve.errors import BackendUnavailableError
from minserve.kernels.kv_quantization import KV_FORMS, KVForm, KVScales
from minserve.kernels.upload import to_device

# The torch backend where results must not depend on the batch; a setting of its own asks for it.
DETERMINISTIC = "torch, deterministic"


@dataclass(frozen=True, slots=True)
class LayerKV:
    """The KV cache of a layer, allocated by `AttentionBackend.allocate`.

    Attributes:
        key, value: ``[num_blocks, block_size, num_kv_heads, head_dim]``; the backend chooses
            their order in memory.
        views: other views of the same memory that the backend keeps at hand.
        scales: of keys and values that are stored in 8 bits, else ``None``.
    """

    key: torch.Tensor
    value: torch.Tensor
    views: Any = None
    scales: KVScales | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which attention computes."""
        return self.key.dtype if self.scales is None else self.scales.dtype

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """The tensors that take memory: keys, values, and their scales where there are any."""
        scales = () if self.scales is None else (self.scales.key, self.scales.value)
        return (self.key, self.value, *scales)


@dataclass(slots=True, kw_only=True)
class AttentionMetadata:
    """The batch of an iteration, shared by every layer. Decodes come first, then prefill chunks.

    Attributes:
        query_start_loc: first token of each sequence in the batch, then the total number of
            tokens; ``num_seqs + 1`` Python ints.
        seq_lens: tokens of each sequence that have KV after this iteration.
        block_tables: int64 ``[num_seqs, max_blocks]`` on the device, padded with 0.
        slot_mapping: int64 ``[num_tokens]`` on the device; the place of each token's KV:
            ``block_id * block_size + offset``.
        block_size: tokens per block.
        num_decodes: number of decodes, the first sequences (one query token each, or
            1 + speculation length while drafts are verified).
        lengths_known: false if `seq_lens` are upper bounds, as in CUDA graphs.
        starts, lengths: `query_start_loc` and `seq_lens` on the device, int64, for backends
            that read them there; ``None`` if they were not sent there yet.
        state: what the backend's `prepare` leaves for `forward`.
    """

    query_start_loc: list[int]
    seq_lens: list[int]
    block_tables: torch.Tensor
    slot_mapping: torch.Tensor
    block_size: int
    num_decodes: int
    lengths_known: bool = True
    starts: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    state: Any = None

    @property
    def num_seqs(self) -> int:
        return len(self.seq_lens)

    @property
    def num_tokens(self) -> int:
        return self.query_start_loc[-1]

    def on_device(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``starts`` and ``lengths``; sends them to the device if they are not there."""
        starts, lengths = (
            to_device(numbers, torch.int64, self.slot_mapping.device) if there is None else there
            for there, numbers in (
                (self.starts, self.query_start_loc),
                (self.lengths, self.seq_lens),
            )
        )
        return starts, lengths


class AttentionBackend(ABC):
    """Attention of one model's layers over the paged cache.

    Args:
        num_heads, num_kv_heads: query heads and KV heads (GQA groups of
            ``num_heads // num_kv_heads``).
        head_dim: width of a head.
        scale: factor on the scores.

    Attributes:
        supports_graphs: true if passes can be recorded in a CUDA graph and replayed for other
            batches with as many places for decodes and for prefill chunks. In a replay the metadata's ``starts``, ``lengths``,
            ``slot_mapping`` and ``block_tables`` are exact, while the lists on the host are
            upper bounds: every sequence may have fewer query tokens and be shorter. Tokens
            with slot -1 keep no KV, sequences of length 0 have no query tokens, and block
            ids after a sequence's length mean nothing.
        in_triton: true if Triton runs on the device, so that other operations may be Triton
            kernels too.
        chunk_sizes: chunk sizes in tokens, ascending; from each on, another kernel runs than below.
        kv_form: the form of 8 bits in which it stores keys and values; ``None`` for their own dtype.
    """

    name: str
    supports_graphs: bool = False
    in_triton: bool = False
    chunk_sizes: tuple[int, ...] = (1,)
    kv_form: KVForm | None = None

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, scale: float) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.scale = scale

    @abstractmethod
    def allocate(
        self, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> LayerKV:
        """Return a zeroed cache for one layer.

        Args:
            dtype: that of the model's arithmetic, and of the cache if there is no `kv_form`.
        """

    @abstractmethod
    def prepare(self, metadata: AttentionMetadata) -> None:
        """Plan the iteration and put the plan into ``metadata.state``."""

    @abstractmethod
    def write_kv(
        self,
        qkv: torch.Tensor,
        kv: LayerKV,
        metadata: AttentionMetadata,
        rotations: torch.Tensor | None = None,
    ) -> None:
        """Store the batch's keys and values.

        Args:
            qkv: ``[num_tokens, num_heads + 2 * num_kv_heads, head_dim]``: the heads of
                queries, keys, values.
            rotations: complex64 ``[num_tokens, 1, head_dim / 2]``, for models with RoPE: queries
                are rotated in place, and keys before they are stored (their values in ``qkv`` are
                undefined afterwards). A head's dimensions ``2 i`` and ``2 i + 1`` are one complex
                number.
        """

    @abstractmethod
    def forward(
        self, query: torch.Tensor, kv: LayerKV, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """Attend causally to all KV that was written so far.

        Args:
            query: ``[num_tokens, num_heads, head_dim]``; heads are adjacent, rows need not be.

        Returns:
            ``[num_tokens, num_heads * head_dim]``.
        """


def choose_attention_backend(name: str, device: torch.device) -> str:
    """Return the name of the backend to use on a device. ``auto`` takes the best that runs there.

    Raises:
        BackendUnavailableError: for an unknown name, or a backend that cannot run there.
    """
    if name not in ATTENTION_BACKENDS:
        raise _unknown(name)
    if name == "auto":
        return "triton" if device.type == "cuda" and not _why_not_triton(device) else "torch"
    problem = None if name == "torch" else _why_not_triton(device)
    if name == "flash-attn" and importlib.util.find_spec("flash_attn") is None:
        problem = (
            "the flash-attn library is missing; on a machine with CUDA: "
            "pip install --no-build-isolation 'minserve[flash-attn]'"
        )
    if problem is not None:
        raise BackendUnavailableError(f"attention backend {name!r} cannot run here: {problem}")
    return name


def _unknown(name: str) -> BackendUnavailableError:
    known = ", ".join(ATTENTION_BACKENDS)
    return BackendUnavailableError(f"unknown attention backend {name!r}; known: {known}")


def _why_not_triton(device: torch.device) -> str | None:
    """Return why Triton kernels cannot run on a device; ``None`` if they can."""
    try:
        from triton import knobs
    except ImportError:
        return "triton is not installed (pip install triton, on Linux)"
    if device.type != "cuda" and not knobs.runtime.interpret:
        return (
            f"it needs a CUDA device, and this one is {device.type}; use --attention-backend torch"
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer; use --attention-backend torch"
    return None


def make_attention_backend(
    name: str,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    kv_cache_dtype: str = "auto",
) -> AttentionBackend:
    """Return a new backend for a name that `choose_attention_backend` returned, or `DETERMINISTIC`.

    Args:
        kv_cache_dtype: as in `EngineConfig`; 8 bits are for the backends torch and triton alone.

    Raises:
        BackendUnavailableError: for an unknown name, or if it cannot serve such heads.
    """
    backend = _backend_class(name)(num_heads, num_kv_heads, head_dim, scale)
    backend.kv_form = KV_FORMS[kv_cache_dtype]
    return backend


def _backend_class(name: str) -> type[AttentionBackend]:
    """Return the class of a backend, whose libraries may be missing elsewhere."""
    if name == DETERMINISTIC:
        from minserve.kernels.deterministic_backend import DeterministicBackend

        return DeterministicBackend
    if name == "torch":
        from minserve.kernels.torch_backend import TorchBackend

        return TorchBackend
    if name == "triton":
        from minserve.kernels.triton_backend import TritonBackend

        return TritonBackend
    if name == "flash-attn":
        from minserve.kernels.flash_attn import FlashAttnBackend

        return FlashAttnBackend
    raise _unknown(name)
