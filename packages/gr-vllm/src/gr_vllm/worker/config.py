"""The configuration that vLLM reads from config.json."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig

from gr_vllm.checkpoint import MODEL_TYPE, Checkpoint
from gr_vllm.rows import RowLayout


class GrHSTUConfig(PretrainedConfig):  # type: ignore[misc]
    """A `Checkpoint`, in the terms of Hugging Face."""

    model_type = MODEL_TYPE

    def __init__(self, gr_hstu: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.gr_hstu = gr_hstu
        super().__init__(**kwargs)
        if gr_hstu is not None and self.checkpoint.tokens != "ids":
            # vLLM's word for the width of a prompt's embeddings, where it is not hidden_size.
            dtype = getattr(torch, self.checkpoint.dtype)
            self.projection_size = RowLayout.of(self.checkpoint).width(dtype)

    @property
    def checkpoint(self) -> Checkpoint:
        assert self.gr_hstu is not None
        return Checkpoint.of(self.gr_hstu, "config.json")
