"""The parts of each program of `bench/`, in a folder of the program's name."""
