"""Who runs what in each iteration. Pure: no torch, no clock, no I/O."""
