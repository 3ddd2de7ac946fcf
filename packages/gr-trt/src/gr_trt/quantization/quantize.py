"""One prepared graph in 8 bits, as Q/DQ pairs with fixed ranges, by onnxruntime.quantization."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

Feeds = Sequence[Mapping[str, Any]]


class _Reader:
    """Batches for the calibrator, each once."""

    def __init__(self, feeds: Feeds) -> None:
        self._rest = iter(feeds)

    def get_next(self) -> Mapping[str, Any] | None:
        return next(self._rest, None)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return self._rest

    def __next__(self) -> Mapping[str, Any]:
        return next(self._rest)


def quantize(
    model: onnx.ModelProto | Path,
    out: Path,
    names: Sequence[str],
    feeds: Feeds,
    *,
    activations: str,
    external_data: bool,
) -> None:
    """Writes the graph with the products ``names`` in 8 bits.

    Weights are int8, symmetric, a scale a column; what they are multiplied with has one range for
    a tensor, found on ``feeds``, the arrays of batches by input. Products themselves stay float32.
    """
    from onnxruntime.quantization import (
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    symmetric = activations == "int8"
    kinds = ["MatMul", "Gemm"]
    options: dict[str, Any] = {
        "ActivationSymmetric": symmetric,
        "WeightSymmetric": True,
        # An integer bias is what CPUs add inside of the product, and what TensorRT cannot read.
        "QuantizeBias": not symmetric,
        # What follows a product is no product, so its output would be rounded for nothing.
        "OpTypesToExcludeOutputQuantization": kinds,
    }
    with _quiet():
        quantize_static(
            model,
            out,
            _Reader(feeds),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=kinds,
            nodes_to_quantize=list(names),
            per_channel=True,
            activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            # The others gather values in one array, which those of different lengths do not fit
            # in; averages of extremes cut off what only some requests have.
            calibrate_method=CalibrationMethod.MinMax,
            calibration_providers=["CPUExecutionProvider"],
            use_external_data_format=external_data,
            extra_options=options,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without advice for the command line of the quantizer, which it logs to the root logger."""
    root = logging.getLogger()
    level = root.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root.setLevel(logging.ERROR)
        try:
            yield
        finally:
            root.setLevel(level)
