"""The device's side of an iteration: tensors, KV memory, forward passes."""
