"""Whether what this package stands on is there. Each answers (usable, why) and never raises."""

from __future__ import annotations

from importlib.util import find_spec

from gr_vllm import compat


def torch() -> tuple[bool, str]:
    if find_spec("torch") is None:
        return False, "torch is not installed; pip install torch"
    return True, "torch is installed"


def vllm() -> tuple[bool, str]:
    """vLLM, of whatever build, of a version that this package was made for, beside its torch."""
    return compat.usable()


def vllm_device(device: str) -> tuple[bool, str]:
    """Whether the installed build is one for a device."""
    return compat.fits(device)
