"""What vLLM calls in each of its processes, by its entry point ``vllm.general_plugins``."""

from __future__ import annotations

from gr_vllm import front
from gr_vllm.checkpoint import ARCHITECTURES, MODEL_TYPE


def register() -> None:
    """Makes the model classes and their configuration known. May be called again.

    Classes are given by name, so nothing heavy is imported in processes that do not need it.
    """
    front.attend()
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from gr_vllm.worker.config import GrHSTUConfig

    AutoConfig.register(MODEL_TYPE, GrHSTUConfig, exist_ok=True)
    known = ModelRegistry.get_supported_archs()
    for name in ARCHITECTURES.values():
        if name not in known:
            ModelRegistry.register_model(name, f"gr_vllm.worker.model:{name}")
