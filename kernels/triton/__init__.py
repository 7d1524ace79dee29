"""Triton kernels, one op per file: the kernel, and its wrapper on tensors."""
