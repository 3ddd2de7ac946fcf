"""Small bundles with random weights, to test engines and exporters with: every kind of model.

The weights are large enough that a leak between tokens shows well above any tolerance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from gr_core import Candidates, History, RecommendRequest, Task
from gr_core.contracts import Artifact, EncodedRequest, EngineOptions
from gr_core.repository import Bundle, Catalogue, write_bundle
from gr_core.types import item_id_array
from gr_hstu.config import HSTUConfig, MTGRConfig, SemanticIdConfig
from gr_hstu.engine import TorchEngine
from gr_hstu.features import Feature, FeatureSchema
from gr_hstu.model import HSTUModel, load_hstu, load_mtgr
from gr_hstu.models import build_model
from gr_hstu.models.semantic_ids import HSTUSemanticIds
from gr_hstu.semantic_ids import SemanticIdModel, load_semantic_ids

ITEMS = 60
IDS = tuple(range(1000, 1000 + ITEMS))
NOW_MS = 1_700_000_000_000
SCHEMA = FeatureSchema(
    signals=(Feature("is_liked", "binary"), Feature("watched", "bucket", boundaries=(0.1, 0.9))),
    max_history=24,
    truncate_step=4,
)
FULL_SCHEMA = dataclasses.replace(
    SCHEMA,
    user=(Feature("gender", "categorical", values=("m", "f")),),
    context=(Feature("hour", "bucket", boundaries=(6.0, 18.0)),),
    candidate=(Feature("price", "bucket", boundaries=(1.0, 10.0)),),
    realtime_window_s=600,
    max_realtime=5,
)
FULL: dict[str, Any] = {
    "signal_cardinalities": (3, 4),
    "user_cardinalities": (3,),
    "context_cardinalities": (4,),
    "candidate_cardinalities": (4,),
    "heads": ("recommendation", "engagement"),
}
SMALL: dict[str, Any] = {"num_items": ITEMS, "d_model": 16, "num_layers": 2, "num_heads": 2}
CONFIGS: dict[str, HSTUConfig | MTGRConfig] = {
    "research": HSTUConfig(
        variant="research", d_qk=4, d_v=6, max_seq_len=32, signal_cardinalities=(3, 4), **SMALL
    ),
    "ranking": HSTUConfig(
        variant="ranking", d_qk=4, d_v=6, max_seq_len=32, mlp_dim=16, **SMALL, **FULL
    ),
    "mtgr": MTGRConfig(max_seq_len=32, embedding_dim=8, mlp_dim=16, **SMALL, **FULL),
}
KINDS = tuple(CONFIGS)
CASES = [("research", Task.RETRIEVE), ("research", Task.RANK)] + [
    (kind, Task.RANK) for kind in ("ranking", "mtgr")
]
"""What each kind of model can do."""
SID = "sid"
"""The kind of a model that generates; it can do nothing else, and so is none of `KINDS`."""
SID_CONFIG = SemanticIdConfig(
    code_sizes=(5, 4, 6), max_behaviours=24, d_qk=4, d_v=6, beam_width=8, **SMALL
)
SID_SCHEMA = FeatureSchema(max_history=24, truncate_step=4)


def random_module(config: HSTUConfig | MTGRConfig | SemanticIdConfig, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        if isinstance(config, SemanticIdConfig):
            module: nn.Module = HSTUSemanticIds(config)
            # Fewer combinations than items on the first levels, and some items share all codes.
            for level, size in enumerate(config.code_sizes):
                codes = torch.randint(size, (config.num_items,))
                module.get_buffer("item_codes")[1:, level] = codes
        else:
            module = build_model(config)
        for name, parameter in module.named_parameters():
            scale = 0.15 if parameter.dim() > 1 else 0.1
            parameter.add_(scale * torch.randn(parameter.shape))
            if name in ("items.weight", "decoder.items.weight"):
                parameter[0] = 0.0
    return module


def write(
    folder: Path, kind: str, *, state: dict[str, torch.Tensor] | None = None, **changes: Any
) -> Bundle:
    """Writes ``folder/<kind>/<version>``; ``changes`` are arguments of `write_bundle`.

    The kind is one of `KINDS`, or `SID`.
    """
    config = SID_CONFIG if kind == SID else CONFIGS[kind]
    weights = random_module(config).state_dict() if state is None else state
    facts: dict[str, Any] = {
        "name": kind,
        "version": "1",
        "architecture": {"mtgr": "mtgr", SID: "hstu-sid"}.get(kind, "hstu"),
        "tasks": [task for k, task in [*CASES, (SID, Task.GENERATE)] if k == kind],
        "config": config.to_dict(),
        "features": {"research": SCHEMA, SID: SID_SCHEMA}.get(kind, FULL_SCHEMA).to_dict(),
        "catalogue": Catalogue(list(IDS), [f"title {i}" for i in IDS]),
        "weights": lambda path: save_file({k: v.contiguous() for k, v in weights.items()}, path),
        "overwrite": True,
    }
    facts |= changes
    return write_bundle(folder / kind / facts["version"], **facts)


def load(bundle: Bundle) -> HSTUModel:
    return load_mtgr(bundle) if bundle.architecture == "mtgr" else load_hstu(bundle)


def load_sid(bundle: Bundle) -> SemanticIdModel:
    return load_semantic_ids(bundle)


def engine_of(model: HSTUModel | SemanticIdModel, **options: Any) -> TorchEngine:
    engine = TorchEngine()
    artifact = Artifact("torch", model.bundle.path)
    engine.load(artifact, model, model.tasks, EngineOptions(**options))
    return engine


def a_request(
    seed: int = 0, length: int = 10, candidates: int | Sequence[int] = 5, **fields: Any
) -> RecommendRequest:
    """Random behaviours, minutes apart, the last ones in real time; candidates with prices."""
    random = np.random.default_rng(seed)
    ages_s = np.cumsum(random.integers(20, 400, length))[::-1]
    ids: Any = candidates
    if isinstance(candidates, int):
        assert candidates <= ITEMS
        ids = random.permutation(IDS)[:candidates]
    history = History(
        random.choice(IDS, length),
        NOW_MS - 1000 * ages_s,
        {
            "is_liked": random.integers(0, 2, length).astype(np.float32),
            "watched": random.choice([np.nan, 0.0, 0.5, 1.0], length).astype(np.float32),
        },
    )
    facts: dict[str, Any] = {
        "user_features": {"gender": "f" if seed % 2 else "m"},
        "context_features": {"hour": seed % 24},
        "request_time_ms": NOW_MS,
        "candidates": Candidates(
            item_id_array([int(i) for i in ids]),
            {"price": random.uniform(0, 20, len(ids)).astype(np.float32)},
        ),
    }
    return RecommendRequest(history, **(facts | fields))


def encode(
    model: HSTUModel | SemanticIdModel, task: Task, request: RecommendRequest, k: int = 10
) -> EncodedRequest:
    return dataclasses.replace(model.encode(request, task).request, k=k)


class Users:
    """Histories that grow, are edited, reordered and cut, as users' do and should not."""

    def __init__(self, seed: int, users: int) -> None:
        self.random = np.random.default_rng(seed)
        self.now = NOW_MS
        self.rows: list[list[tuple[int, int, float]]] = [[] for _ in range(users)]

    def request(self) -> RecommendRequest:
        """The next request of one of them."""
        random = self.random
        user = int(random.integers(len(self.rows)))
        rows = self.rows[user]
        match random.choice(
            ["grow", "same", "edit", "reorder", "drop_oldest", "drop_newest", "copy"],
            p=[0.5, 0.2, 0.06, 0.06, 0.06, 0.06, 0.06],
        ):
            case "grow":
                for _ in range(int(random.integers(1, 6))):
                    self.now += int(random.integers(1, 300_000))
                    item = int(random.choice(IDS))
                    rows.append((item, self.now, float(random.integers(0, 2))))
                del rows[:-40]
            case "edit" if rows:
                place = int(random.integers(len(rows)))
                rows[place] = (int(random.choice(IDS)), *rows[place][1:])
            case "reorder" if len(rows) > 1:
                one, other = random.choice(len(rows), 2, replace=False)
                rows[one], rows[other] = (
                    (rows[other][0], *rows[one][1:]),
                    (rows[one][0], *rows[other][1:]),
                )
            case "drop_oldest":
                del rows[: int(random.integers(1, 4))]
            case "drop_newest":
                del rows[len(rows) - int(random.integers(0, 4)) :]
            case "copy":
                self.rows[user] = list(self.rows[int(random.integers(len(self.rows)))])
                rows = self.rows[user]
        items, times, liked = (list(c) for c in zip(*rows, strict=True)) if rows else ([], [], [])
        count = int(random.integers(1, 12))
        return RecommendRequest(
            History(
                np.array(items, np.int64),
                np.array(times, np.int64),
                {"is_liked": np.array(liked, np.float32)},
            ),
            user_id=f"user {user}",
            user_features={"gender": "f" if user % 2 else "m"},
            context_features={"hour": int(random.integers(24))},
            request_time_ms=self.now + int(random.choice([0, 1000, 400_000])),
            candidates=Candidates(item_id_array(random.choice(IDS, count, replace=False).tolist())),
        )
