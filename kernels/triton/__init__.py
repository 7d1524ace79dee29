"""Triton kernels, one op per file: the kernel, and its wrapper on tensors."""

import os

# Multiply-adds in one instruction: Triton 3.9 asks whether, and 3.10 no longer does so by itself.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
