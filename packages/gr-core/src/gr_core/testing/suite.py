"""What all suites share: the installed plugins, and opting out of a case with a reason."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pytest

from gr_core.plugins.host import PluginHost
from gr_core.plugins.registry import Registry

_PREFIX = "test_"
_SHORTEST_REASON = 10


@functools.cache
def installed() -> Registry:
    """What the installed plugins offer, discovered once."""
    return PluginHost.discover().registry


class Suite:
    """Base of the suites. The cases are its methods ``test_<case>``."""

    skip: ClassVar[Mapping[str, str]] = {}
    """Cases left out, by name without ``test_``, each with its reason."""
    artifacts: ClassVar[str] = ""
    """Suites that give the same name share what they export; else each class has its own."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cases = {
            name.removeprefix(_PREFIX)
            for base in cls.__mro__[1:]
            if base.__module__.startswith("gr_core.testing")
            for name in vars(base)
            if name.startswith(_PREFIX)
        }
        for case, reason in cls.skip.items():
            if case not in cases:
                raise TypeError(f"{cls.__name__}.skip: {case!r}, expected one of {sorted(cases)}")
            if len(reason.strip()) < _SHORTEST_REASON:
                raise TypeError(f"{cls.__name__}.skip[{case!r}]: {reason!r}, expected a reason")
        if cls.__module__.startswith("gr_core.testing"):
            return
        if overridden := [name for name in vars(cls) if name.removeprefix(_PREFIX) in cases]:
            raise TypeError(
                f"{cls.__name__} overrides {overridden[0]}; to leave a case out, name it in `skip`"
            )

    @pytest.fixture(autouse=True)
    def _leave_out(self, request: pytest.FixtureRequest) -> None:
        case = request.function.__name__.removeprefix(_PREFIX)
        if reason := self.skip.get(case):
            pytest.skip(reason)

    @pytest.fixture(autouse=True)
    def _cache_folder(
        self, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Artifacts are kept for the tests of a class or of several, never in the user's cache."""
        name = self.artifacts or type(self).__qualname__
        folder = tmp_path_factory.getbasetemp() / "gr-cache" / name
        monkeypatch.setenv("GR_CACHE_DIR", str(folder))

    @pytest.fixture
    def registry(self) -> Registry:
        """The plugins tested; override it for some that are not installed."""
        return installed()


def cases_of(suite: type[Suite]) -> Sequence[str]:
    """Names of a suite's cases."""
    members = inspect.getmembers(suite, inspect.isfunction)
    return [name.removeprefix(_PREFIX) for name, _ in members if name.startswith(_PREFIX)]


def assert_same_arrays(
    one: Mapping[str, npt.NDArray[np.generic]], other: Mapping[str, npt.NDArray[np.generic]]
) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)
