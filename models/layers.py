"""Layers as plain callables: linears in the form that is fastest on the device, and norms.

A linear's weight is repacked once at load. On a CPU the best form depends on the arithmetic that
the processor has in hardware (`WeightFormat`; bench/linears.py compares the forms); on a GPU it is
the plain tensor. On a GPU, norms and activations have a second form, fused into Triton kernels
(fused_layers.py).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from minserve.errors import ConfigError
from minserve.models.quantized_layers import Int8Linear, int8_is_supported
from minserve.models.weights.packed_tensor import PackedTensor

Linear = Callable[[Tensor], Tensor]
Activation = Callable[[Tensor], Tensor]

LAYER_NORM_EPS = 1e-5
FLOAT16_MAX = torch.finfo(torch.float16).max

# oneDNN writes a program for each number of rows, in a millisecond, and keeps it: half a megabyte,
# 1024 times unless told otherwise, by torch's binding (the second name) as well.
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "256")

_onednn = torch.ops.mkldnn._linear_pointwise.default
_onednn_binary = torch.ops.mkldnn._linear_pointwise.binary
# The operator itself: a call through torch.ops with a packed weight takes microseconds longer.
_fbgemm_fp16 = torch.ops.quantized.linear_dynamic_fp16.default._op


class WeightFormat(Enum):
    """The form in which a linear's weight is kept.

    DENSE: the plain tensor, for GPUs and for CPUs that have no packed form.
    ONEDNN: prepacked for oneDNN in the activations' dtype.
    FBGEMM_FP16: packed in float16 for FBGEMM, which multiplies in float32: half the
        memory traffic of float32, for CPUs without bfloat16 arithmetic.
    ONEDNN_AND_FP16: both forms. For a few rows FBGEMM streams its weights about twice as
        fast as oneDNN; for many rows oneDNN's bfloat16 arithmetic wins (bench/linears.py).
    FBGEMM_INT8: quantized to int8 and packed for FBGEMM (quantized_layers.py).
    """

    DENSE = "dense"
    ONEDNN = "onednn"
    FBGEMM_FP16 = "fbgemm-fp16"
    ONEDNN_AND_FP16 = "onednn-and-fp16"
    FBGEMM_INT8 = "fbgemm-int8"


# In these forms a pass over at most so many tokens has float32 activations, which FBGEMM takes. For
# more tokens all operations but FBGEMM's are faster in bfloat16.
FEW_ROWS = 4
FEW_IN_FLOAT32 = (WeightFormat.ONEDNN_AND_FP16, WeightFormat.FBGEMM_INT8)


@dataclass(frozen=True, slots=True)
class WeightPlacement:
    """The device of a model's weights, and the form in which they are kept.

    Attributes:
        device: device of weights and activations.
        dtype: dtype of activations and KV.
        weight_dtype: dtype to which embeddings and, unless quantized, linear weights are rounded.
        format: form in which linear weights are kept.
        fused: true if norms and activations are fused kernels, for which Triton must run on the
            device.
        packed: true if linear weights that are quantized in files stay packed, and are multiplied
            by kernels; Triton must run on the device.
    """

    device: torch.device
    dtype: torch.dtype
    weight_dtype: torch.dtype
    format: WeightFormat
    fused: bool = False
    packed: bool = False

    @classmethod
    def choose(
        cls,
        device: torch.device,
        dtype: str,
        fused: bool = False,
        *,
        twice: bool = False,
        quantization: str = "none",
    ) -> WeightPlacement:
        """Return the fastest placement for a dtype name (``auto`` included) on a device.

        ``float16`` on a CPU means weights in float16 and arithmetic in float32.

        Args:
            fused: as in the class's attributes.
            twice: true if memory suffices for two forms of the weights, in case that is faster.
            quantization: quantization of linear weights, ``none`` or ``int8``.

        Raises:
            ConfigError: if the device cannot run quantized weights.
        """
        if quantization == "int8":
            if device.type != "cpu" or not int8_is_supported():
                raise ConfigError(
                    "quantization int8 runs on x86 CPUs with AVX2 or newer alone: add --device "
                    "cpu, or leave --quantization out"
                )
            plain = cls.choose(device, dtype, fused)
            return replace(plain, format=WeightFormat.FBGEMM_INT8)
        if device.type != "cpu":
            if dtype == "auto":
                dtype = "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
            chosen = getattr(torch, dtype)
            return cls(device, chosen, chosen, WeightFormat.DENSE, fused, packed=fused)
        fast_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if dtype == "auto":
            dtype = "bfloat16" if fast_bf16 else "float16"
        has_fbgemm = "fbgemm" in torch.backends.quantized.supported_engines
        if dtype == "float16":
            form = WeightFormat.FBGEMM_FP16 if has_fbgemm else WeightFormat.DENSE
            return cls(device, torch.float32, torch.float16, form, fused)
        chosen = getattr(torch, dtype)
        packable = torch.backends.mkldnn.is_available() and (
            chosen is torch.float32 or (chosen is torch.bfloat16 and fast_bf16)
        )
        form = WeightFormat.ONEDNN if packable else WeightFormat.DENSE
        if twice and packable and has_fbgemm and chosen is torch.bfloat16:
            form = WeightFormat.ONEDNN_AND_FP16
        return cls(device, chosen, chosen, form, fused)

    def pass_dtype(self, num_tokens: int) -> torch.dtype:
        """Return the activations' dtype in a pass over so many tokens; it selects the linears'
        form.
        """
        few = self.format in FEW_IN_FLOAT32 and num_tokens <= FEW_ROWS
        return torch.float32 if few else self.dtype

    @property
    def has_two_forms(self) -> bool:
        """True if linear weights are kept in two forms."""
        return self.format is WeightFormat.ONEDNN_AND_FP16

    @property
    def linear_dtype(self) -> torch.dtype:
        """The dtype of linear weights."""
        return torch.int8 if self.format is WeightFormat.FBGEMM_INT8 else self.weight_dtype

    @property
    def read_dtype(self) -> torch.dtype:
        """The dtype in which a quantized file's weights are wanted: that to which they would be
        rounded next, or float32 if they are quantized anew.
        """
        return torch.float32 if self.linear_dtype is torch.int8 else self.weight_dtype

    def tensor(self, tensor: Tensor) -> Tensor:
        """Return a parameter that is not a linear's weight, in the activations' dtype."""
        return tensor.to(self.device, self.dtype).contiguous()

    def embedding(self, tensor: Tensor) -> Tensor:
        """Return a table of embeddings in the dtype that it is kept in."""
        return tensor.to(self.device, self.weight_dtype).contiguous()

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """Return a linear layer for a ``[out, in]`` weight of any float dtype."""
        if self.has_two_forms:
            return self._twice(lambda one: one.linear(weight, bias), weight)
        bias = self._maybe(bias)
        if self.packed and isinstance(weight, PackedTensor):
            from minserve.models.packed_layers import PackedLinear

            return PackedLinear(weight.rows.matrix(self.device), bias)
        if self.format is WeightFormat.FBGEMM_INT8:
            return Int8Linear(weight, bias)
        weight = weight.to(self.device, self.weight_dtype)
        if self.format is WeightFormat.FBGEMM_FP16:
            return Fp16Linear(weight, bias)
        if self.format is WeightFormat.ONEDNN:
            return OneDnnLinear(weight, bias)
        return DenseLinear(weight.to(self.dtype), bias)

    def glu(
        self,
        gate: Tensor,
        up: Tensor,
        biases: tuple[Tensor, Tensor] | None = None,
        activation: str = "silu",
    ) -> Linear:
        """Return ``activation(gate(x)) * up(x)`` as a function of ``x`` (Shazeer, 2020).

        Args:
            activation: ``silu`` (SwiGLU), or ``gelu_tanh``: GELU by tanh (GeGLU).
        """
        if self.has_two_forms:
            return self._twice(lambda one: one.glu(gate, up, biases, activation), gate, up)
        if self.format is WeightFormat.ONEDNN:
            gate_bias, up_bias = map(self.tensor, biases) if biases else (None, None)
            gated = OneDnnLinear(gate.to(self.weight_dtype), gate_bias, activation)
            factor = OneDnnLinear(up.to(self.weight_dtype), up_bias)
            return lambda x: factor.times(x, gated(x))
        bias = None if biases is None else torch.cat(biases)
        both, gate_up = self.linear(torch.cat((gate, up)), bias), self.gate(activation)
        return lambda x: gate_up(both(x))

    def activated_linear(
        self, weight: Tensor, bias: Tensor | None, activation: Activation
    ) -> Linear:
        """Return `linear` with an activation after it. A ReLU is part of the matmul if possible."""
        if self.has_two_forms:
            return self._twice(lambda one: one.activated_linear(weight, bias, activation), weight)
        is_relu = activation is torch.relu_
        if self.format is WeightFormat.ONEDNN and is_relu:
            return OneDnnLinear(weight.to(self.weight_dtype), self._maybe(bias), "relu")
        linear = self.linear(weight, bias)
        if self.fused and is_relu and isinstance(linear, DenseLinear) and linear.bias is not None:
            return DenseReluLinear(linear.weight, linear.bias)
        return lambda x: activation(linear(x))

    def _twice(self, make: Callable[[WeightPlacement], Linear], *weights: Tensor) -> Linear:
        """Return a linear in both forms; the dtype of its input selects one (`pass_dtype`)."""
        many = make(replace(self, format=WeightFormat.ONEDNN))
        if any(weight.abs().max() > FLOAT16_MAX for weight in weights):
            return lambda x: many(x.to(self.dtype)).to(x.dtype)
        few = make(replace(self, format=WeightFormat.FBGEMM_FP16))
        return lambda x: few(x) if x.dtype is torch.float32 else many(x)

    def _maybe(self, tensor: Tensor | None) -> Tensor | None:
        """Return `tensor` of a tensor that may be absent."""
        return None if tensor is None else self.tensor(tensor)

    def rms_norm(self, weight: Tensor, eps: float) -> Norm:
        """Return an RMSNorm with a weight of any float dtype.

        The weight is ``[hidden]``, or ``[rows, hidden]`` for tokens of several rows with a weight
        of its own for each.
        """
        if not self.fused:
            return RMSNorm(weight.to(self.device, torch.float32), eps)
        # A weight in float32 may have been computed, and must not be rounded.
        wide = weight.dtype is torch.float32
        weight = weight.to(self.device, weight.dtype if wide else self.dtype).contiguous()
        from minserve.models.fused_layers import fused_rms_norm

        return fused_rms_norm(weight, eps)

    def layer_norm(self, size: int, weight: Tensor | None, bias: Tensor | None) -> Norm:
        """Return a LayerNorm over ``size``; weight and bias, of any float dtype, may be absent."""
        if self.device.type == "cpu":  # its layer norm takes float32 weights with any input
            wide = replace(self, dtype=torch.float32)
            return LayerNorm(size, wide._maybe(weight), wide._maybe(bias))
        weight, bias = self._maybe(weight), self._maybe(bias)
        if not self.fused:
            return LayerNorm(size, weight, bias)
        from minserve.models.fused_layers import fused_layer_norm

        return fused_layer_norm(weight, bias)

    def gate(self, activation: str) -> Activation:
        """Return the function ``activation(gate) * up`` of ``[tokens, 2 * n]``: gate, then up.

        ``activation`` is as for `glu`.
        """
        if not self.fused:
            return silu_mul if activation == "silu" else gelu_tanh_mul
        from minserve.kernels.triton.gate import gelu_tanh_mul as fused_gelu_tanh_mul
        from minserve.kernels.triton.gate import silu_mul as fused_silu_mul

        return fused_silu_mul if activation == "silu" else fused_gelu_tanh_mul


class DenseLinear:
    """``x W^T + b`` with the plain weight."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight.contiguous()
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class DenseReluLinear:
    """``relu(x W^T + b)`` with the plain weight; cuBLASLt adds and clamps within the matmul."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return torch._addmm_activation(self.bias, x, self.weight.t(), use_gelu=False)


# oneDNN's names of activations, and of their algorithms.
_ONEDNN_ACTIVATIONS = {
    "none": ("none", ""),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
    "gelu_tanh": ("gelu", "tanh"),
}


class OneDnnLinear:
    """``x W^T + b`` with a weight prepacked for oneDNN."""

    __slots__ = ("activation", "algorithm", "bias", "packed")

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "none") -> None:
        """``activation``: none, relu, silu or gelu_tanh; applied before sums are rounded."""
        self.bias = bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)
        self.activation, self.algorithm = _ONEDNN_ACTIVATIONS[activation]

    def __call__(self, x: Tensor) -> Tensor:
        return _onednn(x, self.packed, self.bias, self.activation, [], self.algorithm)

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        """Return ``(x W^T + b) * factor`` with one rounding; ``factor``: ``[rows, out]``."""
        return _onednn_binary(x, factor, self.packed, self.bias, "mul")


class Fp16Linear:
    """``x W^T + b`` with the weight in float16 and everything else in float32 (FBGEMM)."""

    __slots__ = ("packed",)

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        bias = None if bias is None else bias.float()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float().contiguous(), bias)

    def __call__(self, x: Tensor) -> Tensor:
        return _fbgemm_fp16(x, self.packed)


class Norm(ABC):
    """A norm over the last dimension, alone or after a residual addition."""

    __slots__ = ()

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Return the norm of ``[tokens, hidden]``, in its dtype."""

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the norm of ``x + residual``, and that sum.

        Either argument may be overwritten with the sum. ``residual`` is ``None`` if the
        residual stream begins with ``x``.
        """
        residual = x if residual is None else x.add_(residual)
        return self(residual), residual

    def replace(self, x: Tensor) -> None:
        """Put the norm of ``x`` in its place; its rows need not be adjacent."""
        x.copy_(self(x))


class RMSNorm(Norm):
    """``x / rms(x) * w`` over the last dimension, computed in float32 and rounded once.

    It is a few small operations, since torch's own `rms_norm` consists of more on a CPU.
    """

    __slots__ = ("eps", "scale", "weight")

    def __init__(self, weight: Tensor, eps: float) -> None:
        """``weight``: float32 ``[hidden]``, or ``[rows, hidden]``: one for each row of a token."""
        self.weight = weight
        self.eps = torch.tensor([eps], device=weight.device)
        self.scale = 1.0 / weight.shape[-1]

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype is torch.float32:
            return (x * self._inverse(x)).mul_(self.weight)
        wide = x.float()
        return wide.mul_(self._inverse(wide)).mul_(self.weight).to(x.dtype)

    def _inverse(self, x: Tensor) -> Tensor:
        """Return ``1 / rms(x)`` as ``[tokens, 1]``, for float32 ``[tokens, hidden]``."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return torch.addcmul(self.eps, norm, norm, value=self.scale).rsqrt_()


class LayerNorm(Norm):
    """Layer norm over the last dimension; weight and bias may be absent."""

    __slots__ = ("bias", "size", "weight")

    def __init__(self, size: int, weight: Tensor | None, bias: Tensor | None) -> None:
        self.size = (size,)
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.size, self.weight, self.bias, LAYER_NORM_EPS)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return ``silu(gate) * up`` of ``[tokens, 2 * n]``, which holds gate, then up."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gelu_tanh_mul(gate_up: Tensor) -> Tensor:
    """Return ``gelu(gate) * up``, GELU by tanh, of ``[tokens, 2 * n]``: gate, then up."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh").mul_(up)
