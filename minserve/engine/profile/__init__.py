"""Measures, keeps and refines how fast a model is on this device."""
