"""What a model's text says: thinking, answer and calls of tools, told apart while it comes."""
