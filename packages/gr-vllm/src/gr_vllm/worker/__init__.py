"""What runs in vLLM's processes: configuration, model classes, attention on vLLM's pages."""
