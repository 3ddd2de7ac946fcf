"""The sides of the comparison: the native stack and what else computes such layers.

Each converts weights, input and mask to the form that suits it before anything is measured.

Shapes: T tokens that are computed, C candidates of all users, D model width.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from gr_core.stack import Stack
from gr_kernels.benchmark.dense import (
    DenseStack,
    causal_mask,
    dense_mask,
    padded,
    stack_tokens,
)
from gr_kernels.benchmark.transformer import CausalTransformer, User
from gr_kernels.benchmark.work import Work
from gr_kernels.engine.scratch import Scratch
from gr_kernels.ops.hstu_stack import BLOCK_TOKENS, HSTUStack, Rows, Segment, make_stack
from gr_kernels.ops.hstu_stack.reference import TorchStack

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
NATIVE = {FLOAT32: "native-fp32", BFLOAT16: "native-bf16"}
"""Which side others are compared with, by their precision."""


class Side(ABC):
    """Computes the work of one point, again and again."""

    name: ClassVar[str]
    dtype: ClassVar[torch.dtype]
    limit: ClassVar[float | None]
    """Largest error relative to float32 at which it counts as right; None where it computes
    another function."""
    all_rows: ClassVar[bool] = True
    """Whether it computes the last layer for history tokens too, whose rows nobody reads."""
    recomputes: ClassVar[bool] = False
    """Whether it computes cached tokens anew; such sides are of interest at cached points only."""
    compiles: ClassVar[bool] = False
    """Whether the first run compiles, which takes memory that later ones do not."""

    def __init__(self, work: Work, threads: int) -> None:
        self.work = work.recomputed if self.recomputes else work
        self.threads = threads

    @classmethod
    def unavailable(cls) -> str:
        """Why this machine cannot run it; empty where it can."""
        return ""

    @property
    def implementation(self) -> str:
        """What runs, where the name does not say it."""
        return ""

    def before(self) -> None:
        """What each run needs and what is not measured, e.g. a fresh input."""
        return

    @abstractmethod
    def run(self) -> None:
        """What is measured."""

    @abstractmethod
    def rows(self) -> Tensor:
        """The candidates' rows that the last run gave, user after user: (C, D)."""

    def close(self) -> None:
        """Frees what outlives the object."""
        return


# ── Stacks over jagged tokens ────────────────────────────────────────────────────────────────────


class JaggedSide(Side):
    """An implementation of the op `hstu_stack`."""

    all_rows = False

    def __init__(self, work: Work, threads: int) -> None:
        super().__init__(work, threads)
        point = self.work.point
        self._stack = self.make(self.work.stack)
        scratch = Scratch(BLOCK_TOKENS, self._stack.block_bytes)
        self._leases = [scratch.lease(point.cached + new) for new in point.lengths]
        self._scratch = scratch
        self._input_TD = torch.cat([tokens_SD[point.cached :] for tokens_SD in self.work.users])
        self._x_TD = torch.empty_like(self._input_TD)
        self._segments = [
            self._segment(user, point.cached, new, point.candidates)
            for user, new in enumerate(point.lengths)
        ]
        if point.cached:
            cached_TD = torch.cat([tokens_SD[: point.cached] for tokens_SD in self.work.users])
            self._stack.run(
                cached_TD, [self._segment(user, 0, point.cached, 0) for user in range(point.users)]
            )
            # One that has not grown by that.
            self._stack.close()
            self._stack = self.make(self.work.stack)

    @abstractmethod
    def make(self, stack: Stack) -> HSTUStack: ...

    @property
    def implementation(self) -> str:
        return self._stack.name

    def before(self) -> None:
        self._x_TD.copy_(self._input_TD)

    def run(self) -> None:
        self._stack.run(self._x_TD, self._segments)

    def rows(self) -> Tensor:
        parts, row = [], 0
        for segment in self._segments:
            parts.append(self._x_TD[row + segment.new :][: segment.candidates])
            row += segment.new + segment.candidates
        return torch.cat(parts)

    def close(self) -> None:
        self._stack.close()

    def _segment(self, user: int, cached: int, new: int, candidates: int) -> Segment:
        keys = cached + new
        high = np.concatenate([np.arange(cached, keys) + 1, np.full(candidates, keys)])
        return Segment(
            blocks=self._leases[user].blocks[: -(-keys // BLOCK_TOKENS)],
            cached=cached,
            new=new,
            candidates=candidates,
            low=np.zeros(new + candidates, np.int32),
            high=high.astype(np.int32),
            rows=Rows.ALL if self.all_rows else Rows.CANDIDATES,
        )


class NativeFloat32(JaggedSide):
    """The kernels of this package that suit the processor best."""

    name, dtype, limit = "native-fp32", FLOAT32, 1e-5

    def make(self, stack: Stack) -> HSTUStack:
        dtype = "bfloat16" if self.dtype is BFLOAT16 else "float32"
        return make_stack(stack, dtype, threads=self.threads, isa="auto")


class NativeBFloat16(NativeFloat32):
    name, dtype, limit = "native-bf16", BFLOAT16, 0.006


class NativeAllRows(NativeBFloat16):
    """Leaves nothing out, so that what leaving out gains can be seen."""

    name, all_rows = "native-bf16-all", True


class NativeRecomputing(NativeBFloat16):
    name, recomputes = "native-bf16-anew", True


class BlockedBFloat16(JaggedSide):
    """The fallback of this package: torch, without padding, block by block."""

    name, dtype, limit = "blocked-bf16", BFLOAT16, 0.02

    def make(self, stack: Stack) -> HSTUStack:
        return TorchStack(stack, "bfloat16")


# ── Plain PyTorch, and what starts from it ───────────────────────────────────────────────────────


class DenseFloat32(Side):
    """`DenseStack` in eager mode."""

    name, dtype, limit = "dense-fp32", FLOAT32, 1e-5

    def __init__(self, work: Work, threads: int) -> None:
        super().__init__(work, threads)
        point = self.work.point
        self.model: Any = DenseStack(self.work.stack).to(self.dtype)
        self.model.eval().requires_grad_(False)
        inputs = [padded(self.work), dense_mask(self.work)]
        if point.cached:
            cached_BPD = stack_tokens(self.work.users, point.cached).to(self.dtype)
            mask_BPP = causal_mask(point.cached).to(self.dtype)
            with torch.no_grad():
                inputs += self.model.cache(cached_BPD, mask_BPP)
        self.inputs = [tensor.to(self.dtype) for tensor in inputs]
        self.output_BTD: Any = None

    def run(self) -> None:
        with torch.no_grad():
            self.output_BTD = self.model(*self.inputs)

    def rows(self) -> Tensor:
        point = self.work.point
        output_BTD = torch.as_tensor(self.output_BTD)
        return output_BTD[:, point.new :].reshape(-1, point.width).float()


class DenseBFloat16(DenseFloat32):
    name, dtype, limit = "dense-bf16", BFLOAT16, 0.02


class DenseRecomputing(DenseBFloat16):
    name, recomputes = "dense-bf16-anew", True


class InductorBFloat16(DenseBFloat16):
    """`DenseStack` compiled for the point's shapes, weights frozen."""

    name, compiles = "inductor-bf16", True

    def __init__(self, work: Work, threads: int) -> None:
        super().__init__(work, threads)
        torch._dynamo.reset()
        self.model = torch.compile(
            self.model, fullgraph=True, dynamic=False, options={"freezing": True}
        )

    @classmethod
    def unavailable(cls) -> str:
        compiler = os.environ.get("CXX", "g++")
        return "" if shutil.which(compiler) else f"there is no C++ compiler {compiler!r}"

    def close(self) -> None:
        torch._dynamo.reset()


class OnnxFloat32(DenseFloat32):
    """`DenseStack` exported, in ONNX Runtime with all its optimizations."""

    name = "onnx-fp32"

    def __init__(self, work: Work, threads: int) -> None:
        super().__init__(work, threads)
        import onnxruntime

        names = [f"input{i}" for i in range(len(self.inputs))]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # It warns of operators of torchvision, and of deprecations within torch.
        logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            file = str(Path(folder) / "stack.onnx")
            torch.onnx.export(
                self.model, tuple(self.inputs), file, input_names=names, dynamo=True, verbose=False
            )
            self._session = onnxruntime.InferenceSession(
                file, options, providers=["CPUExecutionProvider"]
            )
        # What the optimizer folded away, e.g. an unused input, is no input any more.
        taken = {taken.name for taken in self._session.get_inputs()}
        self._feed = {
            name: tensor.numpy()
            for name, tensor in zip(names, self.inputs, strict=True)
            if name in taken
        }

    @classmethod
    def unavailable(cls) -> str:
        missing = [
            module
            for module in ("onnx", "onnxruntime", "onnxscript")
            if importlib.util.find_spec(module) is None
        ]
        return f"not installed: {', '.join(missing)}" if missing else ""

    def run(self) -> None:
        (self.output_BTD,) = self._session.run(None, self._feed)


# ── The opponent that is no HSTU ─────────────────────────────────────────────────────────────────


class TransformerBFloat16(Side):
    """See `gr_kernels.benchmark.transformer`."""

    name, dtype, limit = "sdpa-bf16", BFLOAT16, None

    def __init__(self, work: Work, threads: int) -> None:
        super().__init__(work, threads)
        point = self.work.point
        torch.manual_seed(0)
        self.model = CausalTransformer(point.layers, point.width, self.dtype)
        self.model.eval().requires_grad_(False)
        self._users, row = [], 0
        for tokens_SD, new in zip(self.work.users, point.lengths, strict=True):
            user = User.of(row, point.cached, new, point.candidates, self.model)
            if point.cached:
                self._fill(user, tokens_SD[: point.cached])
            self._users.append(user)
            row += new + point.candidates
        tokens_TD = torch.cat([tokens_SD[point.cached :] for tokens_SD in self.work.users])
        self._x_TD = tokens_TD.to(self.dtype)
        self._output_TD = torch.empty(0)

    def _fill(self, user: User, cached_PD: Tensor) -> None:
        """Computes K and V of cached tokens."""
        past = User.of(0, 0, user.cached, 0, self.model)
        with torch.no_grad():
            self.model(cached_PD.to(self.dtype), [past])
        for here, there in ((user.keys, past.keys), (user.values, past.values)):
            for mine, computed in zip(here, there, strict=True):
                mine[:, :, : user.cached] = computed

    def run(self) -> None:
        with torch.no_grad():
            self._output_TD = self.model(self._x_TD, self._users)

    def rows(self) -> Tensor:
        return torch.cat(
            [
                self._output_TD[user.start + user.new :][: user.candidates].float()
                for user in self._users
            ]
        )


SIDES: tuple[type[Side], ...] = (
    NativeBFloat16,
    NativeFloat32,
    NativeAllRows,
    NativeRecomputing,
    BlockedBFloat16,
    DenseFloat32,
    DenseBFloat16,
    DenseRecomputing,
    InductorBFloat16,
    TransformerBFloat16,
    OnnxFloat32,
)


def reference_rows(work: Work) -> Tensor:
    """The candidates' rows (C, D) by the op's definition, in float32, nothing cached."""

    class Reference(JaggedSide):
        name, dtype, limit = "reference", FLOAT32, None

        def make(self, stack: Stack) -> HSTUStack:
            return TorchStack(stack, "float32")

    side = Reference(work.recomputed, 1)
    side.before()
    side.run()
    return side.rows()
