"""A group of ranks that run one model: processes, what they tell each other, sums in shared memory."""
