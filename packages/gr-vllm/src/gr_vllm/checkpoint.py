"""A model directory for vLLM: what its config.json says, and what its tensors are called.

The exporter writes it, the engine reads it before vLLM does, and vLLM's workers build the model
from it. Shapes: D model width, H heads, K columns of Q and K per head, V columns of U and V per
head, G groups of tokens with norms of their own, m parts that a layer's gate concatenates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from gr_core.errors import BundleError
from gr_core.stack import Gate
from gr_core.tokens import Norm
from gr_vllm import weights
from gr_vllm.quantization import Quantization, quantization_config

MODEL_TYPE = "gr_hstu"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
FORMAT_VERSION = 1

Role = Literal["retrieval", "ranking", "generation"]
ARCHITECTURES: Mapping[Role, str] = {
    "retrieval": "GrHSTUForRetrieval",
    "ranking": "GrHSTUForRanking",
    "generation": "GrHSTUForGeneration",
}
"""Names of the model classes in vLLM's registry."""

Tokens = Literal["ids", "columns", "rows"]
"""What stands in a prompt, see `gr_vllm.prompts`."""

Dtype = Literal["float32", "bfloat16", "float16"]

_PARTS: Mapping[Gate, int] = {
    "u*norm(a)": 1,
    "u,norm(a),u*norm(a)": 3,
    "u,a,u*norm(a)": 3,
    "norm(a*u)": 1,
}


@dataclass(frozen=True, slots=True)
class Layers:
    """The stack, in the terms of `gr_core.stack.Stack`."""

    d_model: int
    num_layers: int
    num_heads: int
    d_qk: int
    d_v: int
    alpha: float
    divisor: float
    norm_eps: float
    projection_silu: Literal["none", "u", "all"]
    gate: Gate
    head_norm: bool
    groups: int
    norms: bool
    """Whether norms scale and shift."""
    projection_bias: bool
    output_bias: bool
    positions: int
    """P of the position bias (2·P - 1,); 0 for none."""
    time_buckets: int
    """Rows of the time bias; 0 for none."""

    @property
    def parts(self) -> int:
        """m."""
        return _PARTS[self.gate]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What config.json says under ``gr_hstu``."""

    format_version: int
    role: Role
    tokens: Tokens
    name: str
    version: str
    identity: str
    """Of the bundle, hexadecimal."""
    dtype: Dtype
    """What is computed in, and what the columns of a prompt's rows are."""
    quantization: Quantization
    """Of the layers' projections."""
    layers: Layers
    tables: tuple[int, ...]
    """Rows of the tables whose rows a token is the sum of; none where prompts have ``rows``."""
    places: int
    """Rows of the table of places; 0 for none."""
    answers: int
    """Rows of the readout's table; 0 for ranking, whose heads the platform computes."""
    readout_norm: Norm
    readout_eps: float
    levels: tuple[tuple[int, int], ...]
    """First and last + 1 token of each level, for generation."""
    max_history: int
    """Tokens of the longest history."""
    causal: bool
    """Whether no token sees a later one, so that prompts may be computed in chunks."""

    def write(self, folder: Path) -> None:
        """config.json, in the terms of Hugging Face, so that vLLM can size its memory."""
        (folder / CONFIG).write_text(json.dumps(self._config(), indent=2) + "\n", "utf-8")

    def _config(self) -> dict[str, Any]:
        layers = self.layers
        config: dict[str, Any] = {
            "architectures": [ARCHITECTURES[self.role]],
            "model_type": MODEL_TYPE,
            "dtype": self.dtype,
            "vocab_size": self.vocabulary,
            "hidden_size": layers.d_model,
            "num_hidden_layers": layers.num_layers,
            "num_attention_heads": layers.num_heads,
            "num_key_value_heads": layers.num_heads,
            "head_dim": layers.d_qk,
            MODEL_TYPE: asdict(self),
        }
        if self.quantization != "none":
            config["quantization_config"] = quantization_config(self.quantization)
        return config

    @property
    def vocabulary(self) -> int:
        """Ids that vLLM may be given, and logits that it samples from."""
        ids = self.tables[0] if self.tokens == "ids" else 1
        return max(ids, self.answers, 1)

    @staticmethod
    def read(folder: Path) -> Checkpoint:
        """Raises `BundleError` for what is not such a folder, is of another format version, or is
        damaged: not what `write` wrote, or without the very tensors that it calls for."""
        file = folder / CONFIG
        try:
            config = json.loads(file.read_text("utf-8"))
            values = config[MODEL_TYPE]
            found = values["format_version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BundleError(f"{file}: not a model directory of gr-vllm: {error!r}") from None
        if found != FORMAT_VERSION:
            raise BundleError(
                f"{file}: format_version is {found!r}, this gr-vllm reads {FORMAT_VERSION}; "
                "export the bundle again"
            )
        checkpoint = Checkpoint.of(values, str(file))
        if config != json.loads(json.dumps(checkpoint._config())):
            raise BundleError(f"{file}: it is not as it was written; export the bundle again")
        weights.check(folder / WEIGHTS, checkpoint)
        return checkpoint

    @staticmethod
    def of(values: Mapping[str, Any], where: str) -> Checkpoint:
        """From plain JSON values. Raises `BundleError` for fields that are missing or unknown."""
        try:
            checkpoint = Checkpoint(
                **{
                    **values,
                    "layers": Layers(**values["layers"]),
                    "tables": tuple(values["tables"]),
                    "levels": tuple((start, stop) for start, stop in values["levels"]),
                }
            )
        except (TypeError, KeyError, ValueError) as error:
            known = ", ".join(field.name for field in fields(Checkpoint))
            raise BundleError(f"{where}: {error}; expected the fields {known}") from None
        for name, choices in _CHOICES.items():
            if (value := getattr(checkpoint, name)) not in choices:
                raise BundleError(
                    f"{where}: {name} is {value!r}; expected one of {', '.join(choices)}"
                )
        if checkpoint.layers.gate not in _PARTS:
            raise BundleError(
                f"{where}: layers.gate is {checkpoint.layers.gate!r}; expected one of "
                f"{', '.join(_PARTS)}"
            )
        return checkpoint


_CHOICES: Mapping[str, tuple[str, ...]] = {
    "role": get_args(Role),
    "tokens": get_args(Tokens),
    "dtype": get_args(Dtype),
    "quantization": get_args(Quantization),
    "readout_norm": get_args(Norm),
}
