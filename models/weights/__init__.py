"""Weights in Hugging Face folders: files of tensors, and quantized tensors in them."""
