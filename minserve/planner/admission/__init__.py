"""The decision which requests are promised their SLO, in rounds of admission."""
