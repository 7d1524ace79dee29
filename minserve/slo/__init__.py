"""What is promised: objectives, the fields that people write, and whether they were kept."""
