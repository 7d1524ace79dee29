"""Code that several programs of `bench/` use. It imports nothing of a program or its parts."""
