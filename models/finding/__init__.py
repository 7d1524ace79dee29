"""Where a model is: folders, files, the hub and its cache, Ollama; and what is no model."""
