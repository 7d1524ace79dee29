"""The decision which requests run in each iteration: no torch, no clock, no I/O."""
