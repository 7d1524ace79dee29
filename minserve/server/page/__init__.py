"""The page at ``/``: what it is made of, and the feed that keeps it live."""
