"""What every kernel must do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest

from gr_core.plugins.registry import Registry
from gr_core.testing.suite import Suite

SLACK = 2.0
"""How much larger than the reference's own error in this precision a kernel's may be."""
FLOOR = 1e-6
"""Relative error that is nobody's fault: the reference may be exact by chance."""


@dataclass(frozen=True, slots=True)
class KernelCase:
    """One call: the arguments in the kernel's precision, and the same in the highest."""

    name: str
    args: tuple[Any, ...]
    exact: tuple[Any, ...]


class KernelSuite(Suite):
    """Subclass it with the names of a ``kernel`` and its ``reference``, and a fixture ``cases``.

    Cases should hold odd lengths, lengths of 0 and 1, and poisoned padding. A kernel is allowed
    twice the error that the reference itself makes in the same precision, both measured against
    the reference in the highest precision; there is no constant to be tuned.
    """

    kernel: ClassVar[str]
    reference: ClassVar[str]

    @pytest.fixture
    def cases(self) -> Sequence[KernelCase]:
        raise NotImplementedError("give a fixture `cases`: calls of the op")

    def test_it_implements_the_op_of_its_reference(self, registry: Registry) -> None:
        assert registry.kernels[self.kernel].op == registry.kernels[self.reference].op
        assert callable(registry.kernels[self.kernel].resolve())

    def test_its_error_is_that_of_its_precision(
        self, registry: Registry, cases: Sequence[KernelCase]
    ) -> None:
        kernel = registry.kernels[self.kernel].resolve()
        reference = registry.kernels[self.reference].resolve()
        assert cases
        for case in cases:
            right = outputs(reference(*case.exact))
            theirs = relative_error(outputs(reference(*case.args)), right)
            mine = relative_error(outputs(kernel(*case.args)), right)
            allowed = SLACK * theirs + FLOOR
            assert mine <= allowed, f"{case.name}: {mine:.3g}, allowed {allowed:.3g}"

    def test_it_leaves_its_inputs_alone(
        self, registry: Registry, cases: Sequence[KernelCase]
    ) -> None:
        kernel = registry.kernels[self.kernel].resolve()
        for case in cases:
            before = outputs(case.args)
            kernel(*case.args)
            for one, other in zip(outputs(case.args), before, strict=True):
                np.testing.assert_array_equal(one, other, err_msg=case.name)

    def test_its_outputs_are_its_own(self, registry: Registry, cases: Sequence[KernelCase]) -> None:
        """A second call does not overwrite what the first one returned."""
        kernel = registry.kernels[self.kernel].resolve()
        for case in cases:
            first = kernel(*case.args)
            kept = outputs(first)
            kernel(*case.args)
            for one, other in zip(outputs(first), kept, strict=True):
                np.testing.assert_array_equal(one, other, err_msg=case.name)


def outputs(value: Any) -> list[npt.NDArray[np.float64]]:
    """Copies of all arrays or tensors of a result or an argument list, as float64."""
    if isinstance(value, tuple | list):
        return [array for part in value for array in outputs(part)]
    if hasattr(value, "detach"):  # a torch tensor, on any device
        return [value.detach().to("cpu", copy=True).double().numpy()]
    if isinstance(value, np.ndarray):
        return [value.astype(np.float64)]
    return []


def relative_error(
    found: Sequence[npt.NDArray[np.float64]], right: Sequence[npt.NDArray[np.float64]]
) -> float:
    """Largest of the arrays' errors in the Euclidean norm, relative to what is right."""
    assert len(found) == len(right)
    worst = 0.0
    for one, other in zip(found, right, strict=True):
        if one.shape != other.shape or not np.isfinite(one).all():
            return float("inf")
        scale = float(np.linalg.norm(other)) or 1.0
        worst = max(worst, float(np.linalg.norm(one - other)) / scale)
    return worst
