"""Checkpoints of the research trainer of Meta's generative-recommenders (ML-1M, ML-20M, Amazon).

Layout of its state dict: `_embedding_module._item_emb.weight`, learned positions in
`_input_features_preproc._pos_emb.weight`, and per block `_hstu._attention_layers.{i}` the fused
projection `_uvqk` (d, 2·h·d_v + 2·h·d_qk), the output projection `_o`, and the relative bias.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gr_hstu.config import HSTUConfig
from gr_hstu.importers.common import (
    ImportedModel,
    check_state,
    load_tensors,
    num_layers,
    require,
    split_heads,
    without_prefix,
)
from gr_hstu.importers.gin import read_gin
from gr_hstu.models.retrieval import HSTURetrieval
from gr_hstu.modules.skeleton import skeleton

_ITEMS = "_embedding_module._item_emb.weight"
_CATEGORIES = "_embedding_module._item_id_to_category_id"
_POSITIONS = "_input_features_preproc._pos_emb.weight"
_LAYERS = "_hstu._attention_layers."
_LAYER_NAMES = {
    "_uvqk": "uvqk.weight",
    "_o.weight": "output.weight",
    "_o.bias": "output.bias",
    "_rel_attn_bias._ts_w": "relative_bias.time_weight",
    "_rel_attn_bias._pos_w": "relative_bias.position_weight",
}
_NORMALIZATIONS = {"rel_bias": "silu", "hstu_rel_bias": "silu", "softmax_rel_bias": "softmax"}

# What a hyperparameter is called in the gin file, and the trainer's default. Without a gin file,
# `item_l2_norm` is that of all published configurations instead.
_GIN: dict[str, tuple[str, Any]] = {
    "num_heads": ("hstu_encoder.num_heads", 1),
    "d_qk": ("hstu_encoder.dqk", 64),
    "d_v": ("hstu_encoder.dv", 64),
    "concat_ua": ("hstu_encoder.concat_ua", False),
    "normalization": ("hstu_encoder.normalization", "rel_bias"),
    "linear_activation": ("hstu_encoder.linear_activation", "silu"),
    "dropout": ("hstu_encoder.linear_dropout_rate", 0.0),
    "input_dropout": ("train_fn.dropout_rate", 0.2),
    "user_norm": ("train_fn.user_embedding_norm", "l2_norm"),
    "item_l2_norm": ("train_fn.item_l2_norm", False),
    "temperature": ("train_fn.temperature", 0.05),
    "output_length": ("train_fn.gr_output_length", 10),
}
_WITHOUT_GIN = {"item_l2_norm": True, "num_heads": None, "d_qk": None, "d_v": None}


def import_checkpoint(
    path: str | Path,
    *,
    gin: str | Path | None = None,
    num_heads: int | None = None,
    d_qk: int | None = None,
    d_v: int | None = None,
    concat_ua: bool | None = None,
    normalization: str | None = None,
    linear_activation: str | None = None,
    user_norm: str | None = None,
    item_l2_norm: bool | None = None,
    temperature: float | None = None,
    output_length: int | None = None,
    dropout: float | None = None,
    input_dropout: float | None = None,
) -> ImportedModel:
    """The model of a checkpoint, for `HSTURetrieval`.

    Shapes tell most; each hyperparameter that they do not tell is the argument, else the line of
    the `gin` file, else the trainer's default. At least one of `num_heads`, `d_qk`, `d_v` and
    `gin` has to be given. `output_length` is the trainer's `gr_output_length`; `normalization`,
    `linear_activation` and `user_norm` take its words ("rel_bias", "silu", "l2_norm", ...).

    Raises ValueError for an unreadable file, for names and shapes that do not fit, and for
    variants that this package does not have.
    """
    bindings = None if gin is None else read_gin(gin)
    if bindings is not None:
        _check_supported(bindings)
    given = {
        "num_heads": num_heads,
        "d_qk": d_qk,
        "d_v": d_v,
        "concat_ua": concat_ua,
        "normalization": normalization,
        "linear_activation": linear_activation,
        "user_norm": user_norm,
        "item_l2_norm": item_l2_norm,
        "temperature": temperature,
        "output_length": output_length,
        "dropout": dropout,
        "input_dropout": input_dropout,
    }
    hyper: dict[str, Any] = {}
    assumed = []
    for name, (binding, default) in _GIN.items():
        if given[name] is not None:
            hyper[name] = given[name]
        elif bindings is not None:
            hyper[name] = bindings.get(binding, default)
        else:
            hyper[name] = _WITHOUT_GIN.get(name, default)
            if hyper[name] is not None:
                assumed.append(f"{name} = {hyper[name]!r}")

    state = _read_state(path)
    config, max_history = _configuration(state, hyper)
    translated, names = _translate(state, config)
    with skeleton():
        check_state(HSTURetrieval(config), translated, names)
    notes = [f"imported from {Path(path).name}, a research checkpoint of generative-recommenders"]
    if assumed:
        notes.append("assumed, as nothing told: " + ", ".join(assumed))
    return ImportedModel(config, translated, config.num_items, max_history, tuple(notes))


def _check_supported(bindings: dict[str, Any]) -> None:
    for name, supported in (
        ("train_fn.main_module", "HSTU"),
        ("train_fn.interaction_module_type", "DotProduct"),
        ("train_fn.embedding_module_type", "local"),
        ("hstu_encoder.linear_config", "uvqk"),
    ):
        if bindings.get(name, supported) != supported:
            raise ValueError(f"{name} is {bindings[name]!r}; only {supported!r} can be imported")


def _read_state(path: str | Path) -> dict[str, Tensor]:
    loaded = load_tensors(path)
    loaded = loaded.get("model_state_dict", loaded)
    state = without_prefix(loaded, "_embedding_module.")
    if any(name.startswith("_ndp_module.") for name in state):
        raise ValueError(
            f"{path} has a learned similarity (MoL, {_first(state, '_ndp_module.')}); "
            "only dot products can be imported"
        )
    if any(name.startswith("_input_features_preproc._rating_emb") for name in state):
        raise ValueError(f"{path} embeds ratings; only item sequences can be imported")
    require(state, _ITEMS, _POSITIONS, f"{_LAYERS}0._uvqk", f"{_LAYERS}0._o.weight")
    # The mask is implied by the architecture.
    state.pop("_attn_mask", None)
    return state


def _first(state: dict[str, Any], prefix: str) -> str:
    return next(name for name in state if name.startswith(prefix))


def _configuration(state: dict[str, Tensor], hyper: dict[str, Any]) -> tuple[HSTUConfig, int]:
    positions, d_model = state[_POSITIONS].shape
    items = state[_CATEGORIES].shape[0] if _CATEGORIES in state else state[_ITEMS].shape[0] - 1
    projected = state[f"{_LAYERS}0._uvqk"].shape[1]
    gated = state[f"{_LAYERS}0._o.weight"].shape[1]
    # U and V take part of the projection; Q and K the rest.
    v_columns = gated // 3 if hyper["concat_ua"] else gated
    qk_columns = projected // 2 - v_columns
    if gated % (3 if hyper["concat_ua"] else 1) or projected % 2 or qk_columns < 1:
        raise ValueError(
            f"concat_ua={hyper['concat_ua']} does not fit an output projection of {gated} "
            f"columns with a fused projection of {projected}; try the other"
        )
    num_heads = _num_heads(hyper, v_columns, qk_columns)
    bias = f"{_LAYERS}0._rel_attn_bias._ts_w"
    if hyper["normalization"] not in _NORMALIZATIONS:
        raise ValueError(
            f"normalization is {hyper['normalization']!r}; expected {', '.join(_NORMALIZATIONS)}"
        )
    if hyper["user_norm"] not in ("l2_norm", "layer_norm"):
        raise ValueError(f"user_norm is {hyper['user_norm']!r}; expected l2_norm or layer_norm")
    config = HSTUConfig(
        variant="research",
        num_items=items,
        d_model=d_model,
        num_layers=num_layers(state, _LAYERS),
        num_heads=num_heads,
        d_qk=split_heads(qk_columns, num_heads, "columns of Q"),
        d_v=split_heads(v_columns, num_heads, "columns of V"),
        max_seq_len=positions,
        dropout=hyper["dropout"],
        input_dropout=hyper["input_dropout"],
        projection_activation=hyper["linear_activation"],
        attention_activation=_NORMALIZATIONS[hyper["normalization"]],  # type: ignore[arg-type]
        relative_bias=bias in state,
        time_bias_buckets=state[bias].shape[0] - 1 if bias in state else 128,
        concat_ua=hyper["concat_ua"],
        user_norm="l2" if hyper["user_norm"] == "l2_norm" else "layer_norm",
        item_l2_norm=hyper["item_l2_norm"],
        temperature=hyper["temperature"],
    )
    # The trainer reserves gr_output_length + 1 positions.
    max_history = positions - hyper["output_length"] - 1
    if max_history < 1:
        raise ValueError(
            f"output_length is {hyper['output_length']}, which leaves no history of the "
            f"{positions} positions of {_POSITIONS}"
        )
    return config, max_history


def _num_heads(hyper: dict[str, Any], v_columns: int, qk_columns: int) -> int:
    """From what was given; all that was given has to agree."""
    told = {
        "num_heads": hyper["num_heads"],
        "d_v": hyper["d_v"] and split_heads(v_columns, hyper["d_v"], "columns of V by d_v"),
        "d_qk": hyper["d_qk"] and split_heads(qk_columns, hyper["d_qk"], "columns of Q by d_qk"),
    }
    told = {name: heads for name, heads in told.items() if heads is not None}
    if not told:
        raise ValueError(
            f"shapes do not tell the number of heads ({v_columns} columns of V, {qk_columns} of "
            "Q): give num_heads, d_qk or d_v, or the gin file"
        )
    if len(set(told.values())) > 1:
        raise ValueError(
            f"{', '.join(f'{name} means {heads} heads' for name, heads in told.items())}, for "
            f"{v_columns} columns of V and {qk_columns} of Q; they have to agree"
        )
    return int(next(iter(told.values())))


def _translate(
    state: dict[str, Tensor], config: HSTUConfig
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under our names, and the checkpoint's name of each of ours."""
    names = {"items.weight": _ITEMS, "positions.weight": _POSITIONS}
    for i in range(config.num_layers):
        for theirs, ours in _LAYER_NAMES.items():
            names[f"stack.layers.{i}.{ours}"] = f"{_LAYERS}{i}.{theirs}"
    ours_of = {theirs: ours for ours, theirs in names.items()}
    translated = {}
    for theirs, tensor in state.items():
        if theirs == _CATEGORIES:
            continue
        tensor = tensor.float()
        if theirs.endswith("._uvqk"):
            tensor = tensor.T
        translated[ours_of.get(theirs, theirs)] = tensor.contiguous()
    items = translated["items.weight"]
    if _CATEGORIES in state:
        # Items share their category's row: here each has its own copy.
        items = torch.cat([items[:1], items[state[_CATEGORIES].long() + 1]])
    translated["items.weight"] = items.clone()
    # Padding; the public code never reads this row.
    translated["items.weight"][0] = 0.0
    return translated, names
