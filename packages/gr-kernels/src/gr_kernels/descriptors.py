"""The kernels that there are, as plain data: the plugin registers them, `choose` chooses."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.util import find_spec

from gr_core import KernelDescriptor
from gr_core.devices import machine
from gr_kernels import native


def probe_torch() -> tuple[bool, str]:
    if find_spec("torch") is None:
        return False, "torch is not installed; pip install torch"
    return True, "torch is installed"


def probe_triton() -> tuple[bool, str]:
    if find_spec("triton") is None:
        return False, "Triton is not installed; pip install gr-kernels[triton]"
    ok, reason = machine().available("cuda")
    if not ok:
        return False, reason
    import torch

    if not torch.cuda.is_available():
        return False, f"torch {torch.__version__} cannot use CUDA; install a build that can"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return False, f"the CUDA device has the capability {major}.{minor}; expected 8.0 or more"
    return True, f"Triton is installed; {torch.cuda.get_device_name()}"


def narrow_heads(sizes: Mapping[str, int]) -> tuple[bool, str]:
    widest = max(sizes.get("d_qk", 0), sizes.get("d_v", 0))
    return widest <= 256, f"heads have {widest} columns; expected at most 256"


def even_heads(sizes: Mapping[str, int]) -> tuple[bool, str]:
    if sizes.get("biased"):
        return False, "it computes no biases"
    columns = sizes.get("d_qk", 0), sizes.get("d_v", 0)
    fitting = columns[0] == columns[1] and columns[0] in (64, 128, 256)
    return fitting, f"heads have {columns[0]} and {columns[1]} columns; expected 64, 128 or 256"


def probe_cutlass() -> tuple[bool, str]:
    from gr_kernels.cuda import library

    return library.probe()


GPU_DTYPES = ("float32", "bfloat16", "float16")

KERNELS = (
    KernelDescriptor(
        name="hstu_attention-reference",
        op="hstu_attention",
        factory="gr_kernels.ops.hstu_attention.reference:hstu_attention",
        device="any",
        dtypes=("float32", "bfloat16", "float16", "float64"),
        priority=0,
        summary="all pairs of queries and keys, then a mask: the definition",
        probe=probe_torch,
    ),
    KernelDescriptor(
        name="hstu_attention-blocked",
        op="hstu_attention",
        factory="gr_kernels.ops.hstu_attention.blocked:hstu_attention",
        device="cpu",
        dtypes=("float32", "bfloat16", "float64"),
        priority=10,
        summary="torch, blocks of queries against the keys that they see",
        probe=probe_torch,
    ),
    KernelDescriptor(
        name="hstu_attention-cpu",
        op="hstu_attention",
        factory="gr_kernels.ops.hstu_attention.cpu:hstu_attention",
        device="cpu",
        dtypes=("float32", "bfloat16"),
        priority=20,
        summary="C++ for AVX2 and AVX-512, and bfloat16 products where there are any",
        probe=functools.partial(native.probe, "float32"),
    ),
    KernelDescriptor(
        name="hstu_paged_attention-reference",
        op="hstu_paged_attention",
        factory="gr_kernels.ops.hstu_paged_attention.reference:TorchPagedAttention",
        device="any",
        dtypes=("float32", "bfloat16", "float16", "float64"),
        priority=0,
        summary="torch, K and V gathered from plain pages",
        probe=probe_torch,
    ),
    KernelDescriptor(
        name="hstu_paged_attention-cpu",
        op="hstu_paged_attention",
        factory="gr_kernels.ops.hstu_paged_attention.cpu:CpuPagedAttention",
        device="cpu",
        dtypes=("float32", "bfloat16"),
        priority=20,
        summary="C++ for AVX2, AVX-512 and AMX, in place on pages of K and V in tiles",
        probe=functools.partial(native.probe, "float32"),
    ),
    KernelDescriptor(
        name="hstu_paged_attention-triton",
        op="hstu_paged_attention",
        factory="gr_kernels.ops.hstu_paged_attention.triton:TritonPagedAttention",
        device="cuda",
        dtypes=("float32", "bfloat16", "float16"),
        supports="heads of up to 256 columns",
        priority=20,
        summary="Triton, in place on plain pages; no wait for the device",
        probe=probe_triton,
    ),
    KernelDescriptor(
        name="hstu_stack-cpu-bfloat16",
        op="hstu_stack",
        factory="gr_kernels.ops.hstu_stack.cpu:CpuStack",
        device="cpu",
        dtypes=("bfloat16",),
        priority=20,
        summary="all layers in C++ on bfloat16 products, K and V in tiles",
        probe=functools.partial(native.probe, "bfloat16"),
    ),
    KernelDescriptor(
        name="hstu_stack-cpu-float32",
        op="hstu_stack",
        factory="gr_kernels.ops.hstu_stack.cpu:CpuStack",
        device="cpu",
        dtypes=("float32",),
        priority=20,
        summary="all layers in C++ for AVX2 and AVX-512, K and V in tiles",
        probe=functools.partial(native.probe, "float32"),
    ),
    KernelDescriptor(
        name="hstu_attention-triton",
        op="hstu_attention",
        factory="gr_kernels.ops.hstu_attention.triton:hstu_attention",
        device="cuda",
        dtypes=GPU_DTYPES,
        supports="heads of up to 256 columns",
        accepts=narrow_heads,
        priority=20,
        summary="Triton, without padding",
        probe=probe_triton,
    ),
    KernelDescriptor(
        name="hstu_cached_attention-triton",
        op="hstu_cached_attention",
        factory="gr_kernels.ops.hstu_attention.triton:attend",
        device="cuda",
        dtypes=GPU_DTYPES,
        supports="heads of up to 256 columns",
        accepts=narrow_heads,
        priority=20,
        summary="Triton, without padding, a part of K and V in blocks",
        probe=probe_triton,
    ),
    KernelDescriptor(
        name="hstu_attention-cutlass",
        op="hstu_attention",
        factory="gr_kernels.ops.hstu_attention.cutlass:hstu_attention",
        device="cuda",
        dtypes=("bfloat16", "float16"),
        supports="heads of 64, 128 and 256 columns, K as V, no bias",
        accepts=even_heads,
        priority=10,
        summary="CUDA C++ with CUTLASS; see gr kernels build",
        probe=probe_cutlass,
    ),
    KernelDescriptor(
        name="hstu_cached_attention-cutlass",
        op="hstu_cached_attention",
        factory="gr_kernels.ops.hstu_attention.cutlass:attend",
        device="cuda",
        dtypes=("bfloat16", "float16"),
        supports="heads of 64, 128 and 256 columns, K as V, no bias",
        accepts=even_heads,
        priority=10,
        summary="CUDA C++ with CUTLASS, a part of K and V in blocks; see gr kernels build",
        probe=probe_cutlass,
    ),
    KernelDescriptor(
        name="hstu_projection-reference",
        op="hstu_projection",
        factory="gr_kernels.ops.hstu_projection.reference:hstu_projection",
        device="any",
        dtypes=("float32", "bfloat16", "float16", "float64"),
        summary="torch: the definition",
        probe=probe_torch,
    ),
    KernelDescriptor(
        name="hstu_projection-triton",
        op="hstu_projection",
        factory="gr_kernels.ops.hstu_projection.triton:hstu_projection_fused",
        device="cuda",
        dtypes=GPU_DTYPES,
        priority=10,
        summary="norm, product and SiLU in one kernel in Triton",
        probe=probe_triton,
    ),
    KernelDescriptor(
        name="hstu_projection-cublas",
        op="hstu_projection",
        factory="gr_kernels.ops.hstu_projection.triton:hstu_projection_product",
        device="cuda",
        dtypes=GPU_DTYPES,
        priority=20,
        summary="norm in Triton, then cuBLAS",
        probe=probe_triton,
    ),
    KernelDescriptor(
        name="hstu_output-reference",
        op="hstu_output",
        factory="gr_kernels.ops.hstu_output.reference:hstu_output",
        device="any",
        dtypes=("float32", "bfloat16", "float16", "float64"),
        summary="torch: the definition",
        probe=probe_torch,
    ),
    KernelDescriptor(
        name="hstu_output-triton",
        op="hstu_output",
        factory="gr_kernels.ops.hstu_output.triton:hstu_output_fused",
        device="cuda",
        dtypes=GPU_DTYPES,
        priority=20,
        summary="norm, gate, product and residual in one kernel in Triton",
        probe=probe_triton,
    ),
    KernelDescriptor(
        name="hstu_output-cublas",
        op="hstu_output",
        factory="gr_kernels.ops.hstu_output.triton:hstu_output_product",
        device="cuda",
        dtypes=GPU_DTYPES,
        priority=10,
        summary="norm and gate in Triton, then cuBLAS, then the residual",
        probe=probe_triton,
    ),
    KernelDescriptor(
        name="embedding_gather-reference",
        op="embedding_gather",
        factory="gr_kernels.ops.embedding_gather.reference:TorchEmbeddingGather",
        device="any",
        dtypes=GPU_DTYPES,
        summary="torch, table after table",
        probe=probe_torch,
    ),
    KernelDescriptor(
        name="embedding_gather-triton",
        op="embedding_gather",
        factory="gr_kernels.ops.embedding_gather.triton:TritonEmbeddingGather",
        device="cuda",
        dtypes=GPU_DTYPES,
        priority=20,
        summary="Triton, all tables in one launch",
        probe=probe_triton,
    ),
    KernelDescriptor(
        name="item_topk-reference",
        op="item_topk",
        factory="gr_kernels.ops.item_topk.reference:item_topk",
        device="any",
        dtypes=GPU_DTYPES,
        summary="torch, block by block",
        probe=probe_torch,
    ),
    KernelDescriptor(
        name="item_topk-triton",
        op="item_topk",
        factory="gr_kernels.ops.item_topk.triton:item_topk",
        device="cuda",
        dtypes=GPU_DTYPES,
        priority=20,
        summary="Triton, without keeping the scores of all items",
        probe=probe_triton,
    ),
    KernelDescriptor(
        name="hstu_stack-cuda",
        op="hstu_stack",
        factory="gr_kernels.ops.hstu_stack.cuda:CudaStack",
        device="cuda",
        dtypes=GPU_DTYPES,
        supports="heads of up to 256 columns",
        priority=20,
        summary="all layers on a GPU, K and V in blocks, CUDA graphs for small batches",
        probe=probe_triton,
    ),
    KernelDescriptor(
        name="hstu_stack-torch",
        op="hstu_stack",
        factory="gr_kernels.ops.hstu_stack.reference:TorchStack",
        device="cpu",
        dtypes=("float32", "bfloat16", "float64"),
        priority=10,
        summary="all layers in torch, on K and V in blocks",
        probe=probe_torch,
    ),
)

NATIVE = frozenset(
    {
        "hstu_attention-cpu",
        "hstu_paged_attention-cpu",
        "hstu_stack-cpu-bfloat16",
        "hstu_stack-cpu-float32",
    }
)
"""Names of those in C++, which know instruction sets."""
