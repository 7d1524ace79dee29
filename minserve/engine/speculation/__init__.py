"""Speculative decoding: who drafts tokens, and how they are verified."""
