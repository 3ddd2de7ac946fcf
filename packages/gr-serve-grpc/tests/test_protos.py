"""The checks of the API's definition find what they are for; the generated code is in order."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf import descriptor_pb2

import gr_serve_grpc
from gr_serve_grpc._gen.gr.v1 import cache_service_pb2, recommender_service_pb2, types_pb2

SCRIPT = Path(__file__).parents[3] / "scripts" / "gen_protos.py"
FIELD = descriptor_pb2.FieldDescriptorProto


@pytest.fixture(scope="module")
def checks() -> ModuleType:
    if not SCRIPT.exists():
        pytest.skip("scripts/gen_protos.py belongs to the repository, not to the package")
    spec = importlib.util.spec_from_file_location("gen_protos", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_api() -> descriptor_pb2.FileDescriptorSet:
    """A service with one method, in order, with a comment on everything."""
    file = descriptor_pb2.FileDescriptorProto(name="a/v1/a.proto", package="a.v1")
    for name in ("PingRequest", "PingResponse"):
        message = file.message_type.add(name=name)
        message.field.add(name="count", number=1, type=FIELD.TYPE_INT32, label=FIELD.LABEL_OPTIONAL)
    colour = file.enum_type.add(name="Colour")
    colour.value.add(name="COLOUR_UNSPECIFIED", number=0)
    service = file.service.add(name="PingService")
    service.method.add(
        name="Ping", input_type=".a.v1.PingRequest", output_type=".a.v1.PingResponse"
    )
    for element in ((4, 0), (4, 1), (5, 0), (6, 0)):
        for path in (element, (*element, 2, 0)):
            file.source_code_info.location.add(path=path, leading_comments=" Why.")
    return descriptor_pb2.FileDescriptorSet(file=[file])


def test_an_api_in_order_has_no_problems(checks: ModuleType):
    assert list(checks.lint(small_api())) == []
    assert list(checks.breaking(small_api(), small_api())) == []


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda f: f.source_code_info.location.pop(1), "PingRequest.count has no comment"),
        (lambda f: setattr(f, "package", "a.v2"), "does not match its versioned folder"),
        (lambda f: setattr(f.message_type[0].field[0], "name", "Count"), "not lower_snake_case"),
        (lambda f: setattr(f.message_type[1], "name", "pong"), "not PascalCase"),
        (lambda f: setattr(f.enum_type[0].value[0], "name", "RED"), "does not start with COLOUR_"),
        (lambda f: setattr(f.service[0], "name", "Pinger"), "does not end in Service"),
        (
            lambda f: setattr(f.service[0].method[0], "input_type", ".a.v1.PingResponse"),
            "not its own PingRequest",
        ),
    ],
)
def test_lint_finds(checks: ModuleType, spoil, problem: str):
    api = small_api()
    spoil(api.file[0])
    assert any(problem in found for found in checks.lint(api))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda f: f.message_type[0].field.pop(), "field a.v1.PingRequest = 1 was removed"),
        (lambda f: setattr(f.message_type[0].field[0], "number", 2), "= 1 was removed"),
        (lambda f: setattr(f.message_type[0].field[0], "type", FIELD.TYPE_INT64), "changed from"),
        (lambda f: setattr(f.message_type[0].field[0], "name", "number"), "changed from"),
        (lambda f: f.enum_type[0].value.pop(), "enum a.v1.Colour = 0 was removed"),
        (lambda f: f.service[0].method.pop(), "rpc a.v1.PingService.Ping was removed"),
        (lambda f: setattr(f.service[0].method[0], "server_streaming", True), "changed from"),
    ],
)
def test_breaking_changes_are_found(checks: ModuleType, change, problem: str):
    api = small_api()
    change(api.file[0])
    assert any(problem in found for found in checks.breaking(small_api(), api))


def test_additions_break_nothing(checks: ModuleType):
    api = small_api()
    api.file[0].message_type[0].field.add(name="more", number=2, type=FIELD.TYPE_STRING)
    api.file[0].enum_type[0].value.add(name="COLOUR_RED", number=1)
    assert list(checks.breaking(small_api(), api)) == []


def test_the_generated_code_keeps_what_was_promised(checks: ModuleType):
    baseline = descriptor_pb2.FileDescriptorSet.FromString(checks.BASELINE.read_bytes())
    now = descriptor_pb2.FileDescriptorSet()
    for module in (cache_service_pb2, recommender_service_pb2, types_pb2):
        module.DESCRIPTOR.CopyToProto(now.file.add())
    assert list(checks.breaking(baseline, now)) == []


def test_no_module_gr_is_installed():
    """A plotting library owns that name."""
    assert "gr" not in sys.modules
    generated = Path(gr_serve_grpc.__file__).parent / "_gen"
    for path in generated.rglob("*.py*"):
        if path.suffix in (".py", ".pyi"):
            assert "\nfrom gr." not in path.read_text()
            assert "\nimport gr." not in path.read_text()
