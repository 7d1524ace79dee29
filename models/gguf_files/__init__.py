"""Models in GGUF files: header, configuration, tensors."""
