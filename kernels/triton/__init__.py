"""Triton kernels, one operation per file: the kernel, and its wrapper on tensors."""

import os

from minserve.kernels.triton.assembler import use_newer_assembler

# Multiply and add in one instruction: Triton 3.9 reads this setting, and Triton 3.10 no longer does
# so by default.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
use_newer_assembler()
