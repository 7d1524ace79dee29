"""Runs what the planner decides. torch lives here and below."""
