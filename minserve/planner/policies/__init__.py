"""Scheduling policies, one file each, behind the `Planner` interface."""
