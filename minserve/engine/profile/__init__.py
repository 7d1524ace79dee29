"""How fast a model is on this device: measured, kept, refined."""
