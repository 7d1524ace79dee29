"""Replicas on a virtual clock: the real planner and block pool, without a device."""
