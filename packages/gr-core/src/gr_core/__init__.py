"""gr-core: the frame of a serving platform for generative recommenders.

Plugin authors need `hookimpl` and the descriptors; callers need the vocabulary of `gr_core.types`.
Heavy libraries load only when a factory of a plugin is resolved.
"""

from gr_core._version import __version__
from gr_core.plugins.descriptors import (
    API_VERSION,
    CacheDescriptor,
    CommandDescriptor,
    EngineDescriptor,
    ExporterDescriptor,
    KernelDescriptor,
    ModelDescriptor,
    ObserverDescriptor,
    ServerDescriptor,
)
from gr_core.plugins.hooks import hookimpl
from gr_core.types import (
    Behaviour,
    Candidates,
    History,
    RankedItem,
    Recommendation,
    RecommendRequest,
    StageReport,
    Task,
)

__all__ = [
    "API_VERSION",
    "Behaviour",
    "CacheDescriptor",
    "Candidates",
    "CommandDescriptor",
    "EngineDescriptor",
    "ExporterDescriptor",
    "History",
    "KernelDescriptor",
    "ModelDescriptor",
    "ObserverDescriptor",
    "RankedItem",
    "RecommendRequest",
    "Recommendation",
    "ServerDescriptor",
    "StageReport",
    "Task",
    "__version__",
    "hookimpl",
]
