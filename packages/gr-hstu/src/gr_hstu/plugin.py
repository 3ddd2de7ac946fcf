"""What gr-hstu registers. Imports gr_core alone; torch loads inside the factories."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from gr_core import (
    CommandDescriptor,
    EngineDescriptor,
    ModelDescriptor,
    Task,
    hookimpl,
)
from gr_hstu._version import __version__


def _probe_torch() -> tuple[bool, str]:
    if find_spec("torch") is None:
        return False, "torch is not installed; pip install torch"
    return True, "torch is installed"


def _probe_device(device: str) -> tuple[bool, str]:
    if device == "cpu":
        return True, "every build of torch computes on the CPU"
    import torch

    if torch.cuda.is_available():
        return True, f"torch {torch.__version__} can use CUDA"
    return False, f"torch {torch.__version__} cannot use CUDA; install a build of torch that can"


@hookimpl
def gr_register_models() -> Iterable[ModelDescriptor]:
    return [
        ModelDescriptor(
            name="hstu",
            factory="gr_hstu.model:load_hstu",
            tasks=(Task.RETRIEVE, Task.RANK),
            revision=__version__,
            summary="HSTU (arXiv 2402.17152), research and ranking variants",
            probe=_probe_torch,
        ),
        ModelDescriptor(
            name="mtgr",
            factory="gr_hstu.model:load_mtgr",
            tasks=(Task.RANK,),
            revision=__version__,
            summary="MTGR (arXiv 2505.18654), ranking with cross features",
            probe=_probe_torch,
        ),
        ModelDescriptor(
            name="hstu-sid",
            factory="gr_hstu.semantic_ids:load_semantic_ids",
            tasks=(Task.GENERATE,),
            revision=__version__,
            summary="HSTU over semantic ids (TIGER, arXiv 2305.05065), generates items' codes",
            probe=_probe_torch,
        ),
    ]


@hookimpl
def gr_register_engines() -> Iterable[EngineDescriptor]:
    return [
        EngineDescriptor(
            name="torch",
            factory="gr_hstu.engine:TorchEngine",
            formats=("torch",),
            tasks=(Task.RETRIEVE, Task.RANK, Task.GENERATE),
            devices=("cpu", "cuda"),
            dtypes=("float32", "bfloat16"),
            priority=10,
            summary="PyTorch eager, the reference that every other engine is compared with",
            probe=_probe_torch,
            device_probe=_probe_device,
        )
    ]


@hookimpl
def gr_register_commands() -> Iterable[CommandDescriptor]:
    return [
        CommandDescriptor(
            name="hstu",
            factory="gr_hstu.cli:hstu",
            summary="Train, evaluate and import HSTU and MTGR models, count their parameters",
        )
    ]
