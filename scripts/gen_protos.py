"""Generates the Python code of proto/gr/v1, lints the protos and finds breaking changes.

    python scripts/gen_protos.py                   write the generated code
    python scripts/gen_protos.py --check           change nothing; fail if anything is out of order
    python scripts/gen_protos.py --accept-breaking write the code and make today's API the baseline

Generated code refuses a protobuf runtime older than its generator, therefore it is made by the
oldest supported one: ``pip install 'grpcio-tools==1.67.1' 'setuptools<81'
googleapis-common-protos``. The imports are rewritten to live below `gr_serve_grpc._gen`, because a
top-level module ``gr`` belongs to a plotting library.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FLOOR = "1.67.1"
ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "proto"
BASELINE = PROTOS / "baseline.binpb"
PACKAGE = "gr_serve_grpc._gen"
GENERATED = ROOT / "packages/gr-serve-grpc/src/gr_serve_grpc/_gen"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="change nothing, fail on any difference")
    mode.add_argument(
        "--accept-breaking", action="store_true", help="make today's API the baseline"
    )
    arguments = parser.parse_args()

    installed = importlib.metadata.version("grpcio-tools")
    if installed != FLOOR:
        print(
            f"grpcio-tools {installed} is installed, {FLOOR} is needed: the oldest supported one."
        )
        return 2

    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch) / "_gen"
        descriptors = generate(fresh)
        problems = [f"lint: {p}" for p in lint(descriptors)]
        if BASELINE.exists() and not arguments.accept_breaking:
            baseline = type(descriptors).FromString(BASELINE.read_bytes())
            problems += [f"breaking: {p}" for p in breaking(baseline, descriptors)]
        if arguments.check:
            problems += [f"stale: {p}" for p in differences(fresh, GENERATED)]
        elif not problems:
            shutil.rmtree(GENERATED, ignore_errors=True)
            shutil.copytree(fresh, GENERATED)
        if (
            not arguments.check
            and not problems
            and (arguments.accept_breaking or not BASELINE.exists())
        ):
            BASELINE.write_bytes(
                without_comments(descriptors).SerializeToString(deterministic=True)
            )
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def generate(out: Path) -> Any:
    """Writes the code of all protos to ``out`` and returns their FileDescriptorSet."""
    import google.rpc  # type: ignore[import-untyped]
    import grpc_tools
    from google.protobuf import descriptor_pb2
    from grpc_tools import protoc

    sources = sorted(str(p.relative_to(PROTOS)) for p in PROTOS.rglob("*.proto"))
    out.mkdir()
    image = out / "image"
    status = protoc.main(
        [
            "protoc",
            f"-I{PROTOS}",
            f"-I{Path(next(iter(google.rpc.__path__))).parents[1]}",
            f"-I{Path(grpc_tools.__path__[0]) / '_proto'}",
            f"--python_out={out}",
            f"--pyi_out={out}",
            f"--grpc_python_out={out}",
            f"--descriptor_set_out={image}",
            "--include_source_info",
            *sources,
        ]
    )
    if status:
        raise SystemExit(status)
    descriptors = descriptor_pb2.FileDescriptorSet.FromString(image.read_bytes())
    image.unlink()
    for path in [*out.rglob("*.py"), *out.rglob("*.pyi")]:
        path.write_text(re.sub(r"^from gr\.", f"from {PACKAGE}.gr.", path.read_text(), flags=re.M))
        services = any(f.service for f in descriptors.file if f.name == proto_of(path, out))
        if path.name.endswith("_pb2_grpc.py") and not services:
            path.unlink()
    for folder in [out, *(p for p in out.rglob("*") if p.is_dir())]:
        (folder / "__init__.py").write_text("")
    return descriptors


def proto_of(path: Path, out: Path) -> str:
    return re.sub(r"_pb2(_grpc)?\.pyi?$", ".proto", str(path.relative_to(out)))


def without_comments(descriptors: Any) -> Any:
    plain = type(descriptors)()
    plain.CopyFrom(descriptors)
    for file in plain.file:
        file.ClearField("source_code_info")
    return plain


def differences(fresh: Path, committed: Path) -> Iterator[str]:
    def files(root: Path) -> dict[str, str]:
        found = (p for p in root.rglob("*") if p.is_file() and p.suffix in {".py", ".pyi"})
        return {str(p.relative_to(root)): p.read_text() for p in found}

    new, old = files(fresh), files(committed)
    for name in sorted(new.keys() | old.keys()):
        if new.get(name) != old.get(name):
            diff = difflib.unified_diff(
                old.get(name, "").splitlines(), new.get(name, "").splitlines(), lineterm="", n=1
            )
            yield f"{name}: run scripts/gen_protos.py\n" + "\n".join(list(diff)[:20])


# ── Lint: the rules of buf's STANDARD category that apply, and a comment on everything ───────────

PASCAL = re.compile(r"[A-Z][A-Za-z0-9]*$")
SNAKE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*$")


def lint(descriptors: Any) -> Iterator[str]:
    seen: dict[str, str] = {}
    for file in descriptors.file:
        folder = "/".join(file.package.split("."))
        if not file.name.startswith(folder + "/") or not re.search(r"\.v\d+$", file.package):
            yield f"{file.name}: package {file.package} does not match its versioned folder"
        commented = {
            tuple(location.path)
            for location in file.source_code_info.location
            if location.leading_comments.strip()
        }
        for path, name in elements(file):
            if path not in commented:
                yield f"{file.name}: {name} has no comment"
        for message in messages(file.message_type):
            if not PASCAL.match(message.name):
                yield f"{file.name}: message {message.name} is not PascalCase"
            for item in [*message.field, *message.oneof_decl]:
                if not SNAKE.match(item.name.removeprefix("_")):
                    yield f"{file.name}: {message.name}.{item.name} is not lower_snake_case"
        for enum in file.enum_type:
            prefix = re.sub(r"(?<!^)([A-Z])", r"_\1", enum.name).upper() + "_"
            if enum.value[0].name != prefix + "UNSPECIFIED" or enum.value[0].number != 0:
                yield f"{file.name}: {enum.name} does not start with {prefix}UNSPECIFIED = 0"
            for value in enum.value:
                if not value.name.startswith(prefix):
                    yield f"{file.name}: {value.name} does not start with {prefix}"
        for service in file.service:
            if not service.name.endswith("Service"):
                yield f"{file.name}: service {service.name} does not end in Service"
            for method in service.method:
                for actual, wanted in (
                    (method.input_type, method.name + "Request"),
                    (method.output_type, method.name + "Response"),
                ):
                    if actual != f".{file.package}.{wanted}":
                        yield f"{file.name}: {method.name} uses {actual}, not its own {wanted}"
                    if seen.setdefault(actual, method.name) != method.name:
                        yield f"{file.name}: {actual} is shared by {seen[actual]} and {method.name}"


def messages(roots: Any) -> Iterator[Any]:
    """All messages, nested ones too, without the entries of maps."""
    for message in roots:
        if not message.options.map_entry:
            yield message
            yield from messages(message.nested_type)


def elements(file: Any) -> Iterator[tuple[tuple[int, ...], str]]:
    """Path within the file (see SourceCodeInfo) and name of all that must have a comment."""

    def of_message(path: tuple[int, ...], message: Any) -> Iterator[tuple[tuple[int, ...], str]]:
        if message.options.map_entry:
            return
        yield path, message.name
        synthetic = {f.oneof_index for f in message.field if f.proto3_optional}
        for i, field in enumerate(message.field):
            yield (*path, 2, i), f"{message.name}.{field.name}"
        for i, oneof in enumerate(message.oneof_decl):
            if i not in synthetic:
                yield (*path, 8, i), f"{message.name}.{oneof.name}"
        for i, nested in enumerate(message.nested_type):
            yield from of_message((*path, 3, i), nested)

    for i, message in enumerate(file.message_type):
        yield from of_message((4, i), message)
    for i, enum in enumerate(file.enum_type):
        yield (5, i), enum.name
        for j, value in enumerate(enum.value):
            yield (5, i, 2, j), value.name
    for i, service in enumerate(file.service):
        yield (6, i), service.name
        for j, method in enumerate(service.method):
            yield (6, i, 2, j), f"{service.name}.{method.name}"


# ── Breaking changes: what an old client or server on the wire, or old code, would trip over ─────


def breaking(old: Any, new: Any) -> Iterator[str]:
    before, after = facts(old), facts(new)
    for name, value in before.items():
        if name not in after:
            yield f"{name} was removed"
        elif after[name] != value:
            yield f"{name} changed from {value} to {after[name]}"


def facts(descriptors: Any) -> dict[str, Any]:
    """Everything that must stay, by name. Fields are named by their number."""
    found: dict[str, Any] = {}

    def of_message(prefix: str, message: Any) -> None:
        name = f"{prefix}.{message.name}"
        found[f"message {name}"] = None
        for field in message.field:
            oneof = (
                message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else ""
            )
            found[f"field {name} = {field.number}"] = (
                field.name,
                field.type,
                field.type_name,
                field.label,
                oneof,
                field.proto3_optional,
            )
        for nested in message.nested_type:
            of_message(name, nested)
        for enum in message.enum_type:
            of_enum(name, enum)

    def of_enum(prefix: str, enum: Any) -> None:
        for value in enum.value:
            found[f"enum {prefix}.{enum.name} = {value.number}"] = value.name

    for file in descriptors.file:
        for message in file.message_type:
            of_message(file.package, message)
        for enum in file.enum_type:
            of_enum(file.package, enum)
        for service in file.service:
            for method in service.method:
                found[f"rpc {file.package}.{service.name}.{method.name}"] = (
                    method.input_type,
                    method.output_type,
                    method.client_streaming,
                    method.server_streaming,
                )
    return found


if __name__ == "__main__":
    sys.exit(main())
