"""torch → vllm: bundles as model directories that vLLM loads."""
