"""Speculative decoding: proposers draft tokens, and the target model verifies them."""
