"""Stacks of the ranking variant of Meta's generative-recommenders (`STUStack`, as in DLRMv3).

Layout of its state dict, per layer `_stu_layers.{i}`: `_uvqk_weight` (d, 2·h·d_v + 2·h·d_qk),
`_uvqk_beta`, `_input_norm_weight` and `_bias`, `_output_weight` (3·h·d_v, d), and
`_output_norm_weight` and `_bias`, of h·d_v entries, or of h with group norm.
"""

from __future__ import annotations

from pathlib import Path

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
from gr_hstu.modules.hstu import HSTUStack
from gr_hstu.modules.skeleton import skeleton

_LAYERS = "_stu_layers."
_LAYER_NAMES = {
    "_uvqk_weight": "uvqk.weight",
    "_uvqk_beta": "uvqk.bias",
    "_input_norm_weight": "input_norm.weight",
    "_input_norm_bias": "input_norm.bias",
    "_output_weight": "output.weight",
    "_output_norm_weight": "attention_norm.weight",
    "_output_norm_bias": "attention_norm.bias",
}


def import_checkpoint(
    path: str | Path,
    *,
    max_seq_len: int,
    num_heads: int | None = None,
    alpha: float | None = None,
    max_attn_len: int = 0,
    contextual_mask: bool = False,
    dropout: float = 0.0,
) -> ImportedModel:
    """The stack of a checkpoint, for `HSTUStack`; embeddings and heads are not part of it.

    `max_seq_len` is the attention's divisor. `num_heads` is needed unless the stack has group norm,
    whose shape tells it. `contextual_mask` stands for a `contextual_seq_len` above 0. Raises
    ValueError for an unreadable file and for names and shapes that do not fit.
    """
    loaded = load_tensors(path)
    state: dict[str, Tensor] = without_prefix(loaded.get("model_state_dict", loaded), _LAYERS)
    first = f"{_LAYERS}0."
    require(state, *(first + name for name in _LAYER_NAMES))
    d_model, projected = state[first + "_uvqk_weight"].shape
    concatenated = state[first + "_output_weight"].shape[0]
    norm_width = state[first + "_output_norm_weight"].shape[0]
    v_columns = concatenated // 3
    qk_columns = projected // 2 - v_columns
    if concatenated % 3 or projected % 2 or qk_columns < 1:
        raise ValueError(
            f"{first}_output_weight of {concatenated} rows and {first}_uvqk_weight of {projected} "
            "columns are not 3·h·d_v and 2·h·d_v + 2·h·d_qk"
        )
    group_norm = norm_width != v_columns
    if group_norm:
        if num_heads not in (None, norm_width):
            raise ValueError(f"num_heads is {num_heads}, but the group norm has {norm_width} heads")
        num_heads = norm_width
    elif num_heads is None:
        raise ValueError(
            f"shapes do not tell the number of heads ({v_columns} columns of V, {qk_columns} of "
            "Q): give num_heads"
        )
    config = HSTUConfig(
        variant="ranking",
        num_items=0,
        d_model=d_model,
        num_layers=num_layers(state, _LAYERS),
        num_heads=num_heads,
        d_qk=split_heads(qk_columns, num_heads, "columns of Q"),
        d_v=split_heads(v_columns, num_heads, "columns of V"),
        max_seq_len=max_seq_len,
        alpha=alpha,
        dropout=dropout,
        group_norm=group_norm,
        max_attn_len=max_attn_len,
        contextual_mask=contextual_mask,
    )
    names = {
        f"layers.{i}.{ours}": f"{_LAYERS}{i}.{theirs}"
        for i in range(config.num_layers)
        for theirs, ours in _LAYER_NAMES.items()
    }
    ours_of = {theirs: ours for ours, theirs in names.items()}
    translated = {}
    for theirs, tensor in state.items():
        tensor = tensor.float()
        if theirs.endswith(("._uvqk_weight", "._output_weight")):
            tensor = tensor.T
        translated[ours_of.get(theirs, theirs)] = tensor.contiguous()
    with skeleton():
        check_state(HSTUStack(config), translated, names)
    notes = (f"imported from {Path(path).name}, a ranking stack of generative-recommenders",)
    return ImportedModel(config, translated, 0, max_seq_len, notes)
