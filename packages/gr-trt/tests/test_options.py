"""Options: each part takes its own, nobody's are refused, wrong values are explained."""

from __future__ import annotations

import pytest

from gr_core.errors import PlanError
from gr_trt.export.options import OnnxOptions
from gr_trt.onnx_runtime.options import OnnxRuntimeOptions
from gr_trt.options import own_options


def test_each_part_takes_its_own() -> None:
    extra = {"opset": 21, "workspace_bytes": 1 << 22}
    assert own_options(OnnxOptions, extra, "exporter onnx") == OnnxOptions(opset=21)
    assert own_options(OnnxRuntimeOptions, extra, "engine onnxruntime") == OnnxRuntimeOptions(
        workspace_bytes=1 << 22
    )


@pytest.mark.parametrize(
    ("kind", "extra", "message"),
    [
        (OnnxOptions, {"opste": 20}, "who has no option 'opste'; there are: opset, tasks"),
        (OnnxOptions, {"opset": "x"}, "who: option opset is 'x'; expected 18 to 23"),
        (OnnxOptions, {"steps": 1}, "steps is 1; expected true or false"),
        (OnnxOptions, {"max_candidates": 0}, "max_candidates is 0; expected at least 1"),
        (OnnxOptions, {"inline_bytes": -1}, "inline_bytes is -1; expected at least 0"),
        (OnnxOptions, {"tasks": ["dance"]}, "tasks is .'dance'.; expected a list of retrieve"),
        (OnnxRuntimeOptions, {"reuse": "yes"}, "reuse is 'yes'; expected true or false"),
        (OnnxRuntimeOptions, {"workspace_bytes": 5}, "workspace_bytes is 5; expected at least"),
        (OnnxRuntimeOptions, {"provider": 3}, "provider is 3; expected a name or 'auto'"),
    ],
)
def test_wrong_ones(kind: type, extra: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        own_options(kind, extra, "who")
