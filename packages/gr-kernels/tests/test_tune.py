"""Tables of launches: what files say, and how they are measured (on Triton's interpreter)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from click.testing import CliRunner

from gr_core import KernelDescriptor
from gr_core.devices import Machine
from gr_core.errors import GrError, PlanError
from gr_kernels import choice, tune, tune_command, tuning
from gr_kernels.descriptors import KERNELS
from gr_kernels.tune import Run, best, cases
from gr_kernels.tuning import Entry

from .stacks import random_stack
from .test_stack_reference import VARIANTS
from .triton_kernels import (
    INTERPRETED,
    needs_triton,
    not_interpreted,
    run_on_the_interpreter,
)

ENTRY = Entry("a-triton", "float32", {"rows": 64, "width": 8}, {"M": 32, "num_warps": 4}, 12.5)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("GR_CACHE_DIR", str(tmp_path))
    tuning.forget()
    yield tmp_path / "kernels"
    tuning.forget()


def found(sizes: Mapping[str, int], device: str = "a-gpu") -> Mapping[str, int]:
    return tuning.configuration("a-triton", "float32", sizes, {"M": 1}, device)


def test_what_was_measured_is_used_and_nothing_else(folder: Path):
    assert found(ENTRY.sizes) == {"M": 1}
    tuning.write(folder / "a-gpu.json", [ENTRY])
    assert found(ENTRY.sizes) == {"M": 1}  # as it was when the process first asked
    tuning.forget()
    assert found({"width": 8, "rows": 64}) == ENTRY.config
    assert tuning.measured("a-triton", "float32", ENTRY.sizes, "a-gpu") == 12.5
    assert found({"rows": 128, "width": 8}) == {"M": 1}
    assert found(ENTRY.sizes, "another-gpu") == {"M": 1}
    assert tuning.parse((folder / "a-gpu.json").read_text()) == [ENTRY]
    assert [path.name for path in folder.iterdir()] == ["a-gpu.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[]", "version 1"),
        ('{"version": 2, "entries": []}', "version 1"),
        ('{"version": 1, "entries": [{"kernel": "a"}]}', "an entry is {'kernel': 'a'}; expected"),
        ('{"version": 1, "entries": [7]}', "an entry is 7"),
        (tuning.dump([ENTRY]).replace("32,", "-1,"), "an entry is"),
    ],
)
def test_a_damaged_file_is_passed_over(
    text: str, message: str, folder: Path, caplog: pytest.LogCaptureFixture
):
    folder.mkdir(parents=True)
    (folder / "a-gpu.json").write_text(text)
    with pytest.raises(GrError, match=message):
        tuning.parse(text)
    assert found(ENTRY.sizes) == {"M": 1}
    assert "passed over" in caplog.text


def test_devices_have_files_by_their_names():
    assert tuning.file_name("NVIDIA H200") == "nvidia-h200"
    assert tuning.file_name("Tesla/../V100 (32 GB)") == "tesla-v100-32-gb"


class TestChoice:
    """On a GPU the table decides, then the priority; names may be asked for."""

    SIZES: ClassVar = {"rows": 64, "columns": 8, "width": 8}

    @pytest.fixture(autouse=True)
    def _as_if_there_were_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        def kernel(name: str, priority: int, device: str = "cuda", **more: Any) -> KernelDescriptor:
            return KernelDescriptor(
                name=name,
                op="op",
                factory="m:f",
                device=device,
                dtypes=("float32",),
                priority=priority,
                **more,
            )

        def narrow(sizes: Mapping[str, int]) -> tuple[bool, str]:
            return sizes["width"] < 100, "too wide"

        kernels = (
            kernel("a-reference", 0, "any"),
            kernel("a-triton", 10),
            kernel("a-cublas", 20, accepts=narrow),
            kernel("a-cpu", 30, "cpu"),
        )
        monkeypatch.setattr(choice, "KERNELS", kernels)
        monkeypatch.setattr(tuning, "device_name", lambda: "a-gpu")
        choice._choose.cache_clear()
        yield
        choice._choose.cache_clear()

    def chosen(self, **more: Any) -> str:
        return choice.choose("op", "float32", device="cuda", sizes=self.SIZES, **more).name

    def test_without_a_table_the_priority_decides(self):
        assert self.chosen() == "a-cublas"

    def test_what_was_measured_to_be_fastest_is_taken(
        self, folder: Path, caplog: pytest.LogCaptureFixture
    ):
        entries = [
            Entry(name, "float32", self.SIZES, {}, took)
            for name, took in (("a-triton", 3.0), ("a-cublas", 4.0))
        ]
        tuning.write(folder / "a-gpu.json", entries)
        tuning.forget()
        with caplog.at_level(logging.INFO):
            assert self.chosen() == "a-triton"
        assert caplog.messages == [
            "op op in float32 on cuda, columns 8, rows 64, width 8: a-triton (measured: 3 µs)"
        ]

    def test_what_does_not_compute_it_is_passed_over(self, caplog: pytest.LogCaptureFixture):
        with caplog.at_level(logging.INFO):
            wide = {**self.SIZES, "width": 200}
            assert choice.choose("op", "float32", device="cuda", sizes=wide).name == "a-triton"
        assert "passed over: a-cublas: too wide" in caplog.text

    def test_names_are_asked_for(self, monkeypatch: pytest.MonkeyPatch):
        assert self.chosen(kernels=["a-reference"]) == "a-reference"
        monkeypatch.setenv(choice.KERNELS_VARIABLE, "a-triton")
        assert self.chosen() == "a-triton"
        with pytest.raises(PlanError, match="there is no kernel 'b'; there are: a-cpu, a-cublas"):
            self.chosen(kernels=["b"])

    def test_of_another_device_it_is_not_to_be_had(self):
        with pytest.raises(PlanError, match="op op in float32 on cuda is not to be had"):
            self.chosen(kernels=["a-cpu"])


# ── Measuring ─────────────────────────────────────────────────────────────────────────────────


def measured_here(kernel: KernelDescriptor) -> bool:
    return not kernel.name.endswith("-cutlass")


@needs_triton
@pytest.mark.skipif(not INTERPRETED, reason="test_on_the_interpreter runs it")
def test_every_kernel_of_a_layer_is_measured(monkeypatch: pytest.MonkeyPatch):
    offered = tune.Case.configurations
    monkeypatch.setattr(tune.Case, "configurations", lambda case: offered(case)[:3])
    stack = random_stack(**VARIANTS["mtgr"])
    names = set()
    times = iter(range(100, 0, -1))

    def timer(run: Run) -> float:
        return float(next(times))

    for case in cases(stack, "float32", "cpu", rows=(16,), queries=(4,), usable=measured_here):
        entry = best(case, timer)
        assert entry is not None
        assert entry.config in case.configurations()
        names.add(entry.kernel)
    assert names == {
        kernel.name
        for kernel in KERNELS
        if kernel.device == "cuda"
        and kernel.op in ("hstu_cached_attention", "hstu_projection", "hstu_output")
        and measured_here(kernel)
    }


@pytest.mark.slow
@not_interpreted
@needs_triton
@pytest.mark.timeout(600)
def test_on_the_interpreter():
    run_on_the_interpreter(__file__)


def test_what_differs_from_the_default_is_never_the_best(caplog: pytest.LogCaptureFixture):
    """One launch is quicker and wrong, one quicker and right, one does not run."""
    given: dict[str, Any] = {}

    class OutOfResources(Exception):
        pass

    def run() -> torch.Tensor:
        launch = tuning.configuration("a-triton", "float32", {}, {}, "none")
        given["launch"] = launch["M"]
        if launch["M"] == 4:
            raise OutOfResources
        return torch.full((3,), 2.0 if launch["M"] == 2 else 1.0)

    class Case:
        kernel = KernelDescriptor(
            name="a-triton", op="a", factory="m:f", device="cuda", dtypes=("float32",)
        )
        dtype = "float32"
        sizes: ClassVar = {"rows": 1}

        def make(self, kernel: KernelDescriptor) -> Run:
            return run

        def configurations(self) -> list[dict[str, int]]:
            return [{"M": m} for m in (1, 2, 3, 4)]

    entry = best(Case(), lambda run: float(10 - run().sum() - given["launch"]))  # type: ignore[arg-type]
    assert entry is not None
    assert entry.config == {"M": 3}
    assert "with {'M': 2} differs by 1 from its default: passed over" in caplog.text


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tune_command, "machine", lambda: Machine((), "there is no GPU"))
    result = CliRunner().invoke(tune_command.tune, [], standalone_mode=False)
    assert isinstance(result.exception, PlanError)
    assert str(result.exception) == "there is no GPU; launches can only be measured on a GPU"
