"""What one iteration runs: batches under construction, by deadline, with drafts."""
