"""Whether a library computes on a device what it should: asked once after each build.

`failure_of` asks in a process of its own, which a kernel that hangs or reads where it must not does
not outlive.

Small calls with all masks, jagged lengths, keys in blocks, every dtype and size of heads, against
the reference in float64. What must not be read is NaN.

Shapes: T queries, S keys, B sequences, M blocks of a sequence, L layers, C K and V, H heads,
P tokens of a block, K columns of a head.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from gr_core.errors import GrError
from gr_kernels.cuda.library import Library, load
from gr_kernels.ops.hstu_attention import reference
from gr_kernels.ops.hstu_attention.cutlass import COLUMNS, DTYPES, attend_with
from gr_kernels.ops.hstu_attention.intervals import Intervals, causal, joined, mtgr
from gr_kernels.ops.hstu_attention.on_device import CachedKeys

PAGE = 32
SLACK, FLOOR = 2.0, 1e-6
"""As for every kernel: twice the error that plain PyTorch makes in that dtype may be made."""


LONGEST = 300.0
"""Seconds that a test may take."""


def failure_of(file: Path, device: str, longest: float = LONGEST) -> str:
    """What is wrong with what a library computes on a device; an empty string where nothing is."""
    command = [sys.executable, "-m", "gr_kernels.cuda.self_test", str(file), device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=longest)
    except subprocess.TimeoutExpired:
        return f"it did not end within {longest:g} s"
    if done.returncode == 0:
        return ""
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[-1] if lines else f"it ended with {done.returncode}"


def check(found: Library, device: str) -> str:
    """As `failure_of`, in this process."""
    for dtype in DTYPES:
        for columns in COLUMNS:
            for is_cached, splits in ((False, 1), (True, 1), (True, 3)):
                try:
                    allowed, error = _errors(found, device, dtype, columns, is_cached, splits)
                except (GrError, RuntimeError) as failure:
                    return str(failure).splitlines()[0]
                if not error <= allowed:
                    return (
                        f"{str(dtype).removeprefix('torch.')}, {columns} columns, "
                        f"{'with' if is_cached else 'without'} keys in blocks, in {splits} splits: "
                        f"the error is {error:.3g}; expected at most {allowed:.3g}"
                    )
    return ""


def _masks() -> list[tuple[int, Intervals]]:
    """Sequences of that many keys, and what their last tokens see."""
    groups = [0] * 30 + [1] * 90 + [2] * 30 + [3] * 9
    times = [0] * 120 + sorted(range(100, 130)) + [120] * 9
    return [
        (259, causal(250, 9)),
        (0, causal(0)),
        (150, causal(150, window=20)),
        (1, causal(1)),
        (140, causal(133, 7, contextual=3, start=60)),
        (159, mtgr(groups, times)),
        (135, _arbitrary(70, 135)),
    ]


def _arbitrary(queries: int, keys: int) -> Intervals:
    """Intervals, many of them empty, and own keys anywhere, many apart, some in blocks."""
    generator = torch.Generator().manual_seed(0)
    low, high, own = (
        torch.randint(least, most, (queries,), generator=generator, dtype=torch.int32)
        for least, most in ((0, keys + 1), (0, keys + 1), (-1, keys))
    )
    return Intervals(low, high, own)


def _errors(
    found: Library,
    device: str,
    dtype: torch.dtype,
    columns: int,
    is_cached: bool,
    splits: int,
) -> tuple[float, float]:
    """The relative error that may be made, and that is."""
    generator = torch.Generator().manual_seed(columns)
    masks = _masks()
    heads, padding = 2, 3
    keys = torch.tensor([0, *(count for count, _ in masks)]).cumsum(0)
    queries = torch.tensor([0, *(len(one.low_T) for _, one in masks)]).cumsum(0)
    rows = {"q": int(queries[-1]), "k": int(keys[-1]), "v": int(keys[-1])}
    q, k, v = (torch.randn(n, heads, columns, generator=generator).to(dtype) for n in rows.values())
    places = joined([one for _, one in masks])
    numbers = (columns**-0.5, 100.0)
    given = (queries, keys, *places, *numbers)
    right = reference.hstu_attention(q.double(), k.double(), v.double(), *given)
    plain = reference.hstu_attention(q, k, v, *given).double()

    def padded(x: Tensor, value: float) -> Tensor:
        fill = torch.full((padding, *x.shape[1:]), value).to(x.dtype)
        return torch.cat([fill, x, fill]).to(device)

    counts = torch.tensor([count // 2 if is_cached else 0 for count, _ in masks])
    # What is in blocks is not among the rows.
    stays = torch.cat(
        [torch.arange(int(keys[b]) + int(counts[b]), int(keys[b + 1])) for b in range(len(masks))]
    )
    blocks = _Blocks(k, v, keys, counts, device)
    left = torch.cat([torch.zeros(1, dtype=torch.int64), (keys.diff() - counts).cumsum(0)])
    low, high, own = (padded(column, 0) for column in places)
    out = torch.full((rows["q"] + 2 * padding, heads, columns), float("nan"), dtype=dtype)
    call_out = out.to(device)
    attend_with(
        found,
        padded(q, float("nan")),
        padded(k[stays], float("nan")),
        padded(v[stays], float("nan")),
        (queries + padding).to(device),
        (left + padding).to(device),
        low,
        high,
        own,
        *numbers,
        int(queries.diff().max()),
        blocks.cached if is_cached else None,
        out_THV=call_out,
        splits=splits,
    )
    computed = call_out.cpu().double()
    inside = computed[padding:-padding]
    outside = torch.cat([computed[:padding], computed[-padding:]])
    scale = float(right.norm())
    error = float((inside - right).norm()) / scale + float(outside.abs().max())
    return SLACK * float((plain - right).norm()) / scale + FLOOR, error


class _Blocks:
    """Blocks of two layers, of which the second is used; the rest of each is NaN."""

    def __init__(
        self, k_SHK: Tensor, v_SHK: Tensor, keys: Tensor, counts: Tensor, device: str
    ) -> None:
        heads, columns = k_SHK.shape[1:]
        most = max(1, -(-int(counts.max()) // PAGE))
        block_BMLCHPK = torch.full(
            (len(counts), most, 2, 2, heads, PAGE, columns), float("nan"), dtype=k_SHK.dtype
        )
        for b, count in enumerate(counts.tolist()):
            for i in range(0, count, PAGE):
                page = slice(int(keys[b]) + i, int(keys[b]) + min(i + PAGE, count))
                for c, x in enumerate((k_SHK, v_SHK)):
                    part = x[page].transpose(0, 1)
                    block_BMLCHPK[b, i // PAGE, 1, c, :, : part.shape[1]] = part
        self.memory = block_BMLCHPK.to(device)  # kept, as only addresses point there
        layer = heads * PAGE * columns * 2 * k_SHK.element_size()
        address_BM = torch.arange(len(counts) * most).view(-1, most) * (2 * layer)
        self.cached = CachedKeys(
            (self.memory.data_ptr() + address_BM).to(device),
            counts.int().to(device),
            layer,
        )


if __name__ == "__main__":
    failure = check(load(Path(sys.argv[1])), sys.argv[2])
    print(failure)
    sys.exit(1 if failure else 0)
