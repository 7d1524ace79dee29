"""``x W^T + b`` on a weight that stays packed in a GPU's memory: the kernel is chosen by rows."""

from __future__ import annotations

import torch
from torch import Tensor

from minserve.kernels import triton_backend
from minserve.kernels.packed_matrix import PackedMatrix
from minserve.kernels.triton.packed_dequantize import packed_dequantize
from minserve.kernels.triton.packed_gemv import packed_gemv
from minserve.kernels.triton.packed_matmul import packed_matmul

# For more rows than this a weight is unpacked first, for cuBLAS: that costs as much as some hundred
# rows' product, and cuBLAS multiplies faster.
MOST_PACKED_ROWS = 256


def packed_linear(x: Tensor, matrix: PackedMatrix, bias: Tensor | None = None) -> Tensor:
    """Return ``x W^T + bias``.

    Args:
        x: ``[rows, in]``, float16, bfloat16 or float32, on the matrix's device.
        bias: ``[out]``, of the dtype of ``x``.

    Returns:
        ``[rows, out]``, of the dtype of ``x``.
    """
    # An odd order of inputs (GPTQ's desc_act) would keep loads of ``x`` from being pipelined.
    x = x.contiguous() if matrix.order is None else x[:, matrix.order]
    device = triton_backend.describe(x.device)
    if len(x) > MOST_PACKED_ROWS:
        weight = packed_dequantize(matrix, x.dtype, capability=device.capability)
        return x @ weight if bias is None else torch.addmm(bias, x, weight)
    kernel = packed_gemv if len(x) == 1 else packed_matmul
    return kernel(x, matrix, bias, capability=device.capability, num_sms=device.multiprocessors)
