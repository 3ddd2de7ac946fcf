"""What the tests of `hstu_projection` and `hstu_output` share.

Shapes: T tokens, R rows of them that are wanted, D model width, F columns, G groups.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gr_core.testing.kernels import outputs, relative_error

from .triton_kernels import Launches

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Random:
    """Tensors of a seed. What is not to be read lies beside them and is NaN."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, around: float = 0.0) -> Tensor:
        return torch.randn(*shape, generator=self._generator) * scale + around

    def groups(self, tokens: int, groups: int, dtype: torch.dtype = torch.uint8) -> Tensor | None:
        if groups == 1:
            return None
        return torch.randint(groups, (tokens,), generator=self._generator).to(dtype)

    def rows(self, tokens: int, wanted: str) -> Tensor | None:
        """None for ``all``; ``some`` of the tokens in any order; ``padded``: and rows of none."""
        if wanted == "all":
            return None
        rows_R = torch.randperm(tokens, generator=self._generator)[: -(-tokens * 2 // 3)]
        if wanted == "padded":
            rows_R = torch.cat([rows_R[:1], torch.tensor([-1]), rows_R[1:], torch.tensor([-1, -1])])
        return rows_R


def within_poison(x: Tensor, before: int = 3, after: int = 5) -> Tensor:
    """A matrix whose rows lie in longer ones, the rest of which is NaN."""
    wide = x.new_full((len(x), before + x.shape[1] + after), math.nan)
    inside = wide[:, before : before + x.shape[1]]
    return inside.copy_(x)


def array(x: Tensor) -> npt.NDArray[np.float64]:
    return x.cpu().double().numpy()


def error(found: Tensor, right: Tensor) -> float:
    return relative_error(outputs(found), outputs(right))


def launch(norm: int, m: int = 16, n: int = 16, k: int = 32) -> dict[str, int]:
    """Tiles so small that a call has several."""
    return {"M": m, "N": n, "K": k, "GROUP": 2, "NORM": norm, "num_warps": 4, "num_stages": 2}


def specializations(launches: Launches) -> set[str]:
    """What Triton would compile a kernel for, in order to run what was launched."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel = launches.kernel
    bind = create_function_from_signature(
        kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32))
    )
    return {str(bind(*args, **keywords)[1]) for args, keywords in launches.given}
