"""The importers, against outputs of the public code, and their messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gr_hstu.importers import import_checkpoint
from gr_hstu.importers.gin import read_gin
from gr_hstu.models import HSTURetrieval
from gr_hstu.modules.hstu import HSTUStack
from gr_hstu.modules.masks import HSTUTokens, candidate_tokens, history_tokens, hstu_mask

PUBLIC = dict(np.load(Path(__file__).parent / "fixtures" / "public_variants.npz"))
TOLERANCE = 1e-5


def public_state(kind: str, variant: str) -> dict[str, Tensor]:
    state = {}
    for source in ("plain", variant):
        prefix = f"{kind}/{source}/state/"
        for name, array in PUBLIC.items():
            if name.startswith(prefix):
                tensor = torch.from_numpy(array)
                state[name.removeprefix(prefix)] = (
                    tensor.float() if tensor.is_floating_point() else tensor
                )
    return state


RESEARCH: dict[str, dict[str, Any]] = {
    "plain": {},
    "concat_ua": {"concat_ua": True},
    "linear": {"linear_activation": "none"},
    "layer_norm_output": {"user_norm": "layer_norm"},
    "softmax": {"normalization": "softmax_rel_bias"},
    "softmax_no_bias": {"normalization": "softmax_rel_bias"},
    "categories": {},
}


def research_state(variant: str) -> dict[str, Tensor]:
    state = public_state("research", variant)
    if variant == "softmax_no_bias":
        state = {name: t for name, t in state.items() if "_rel_attn_bias" not in name}
    return state


@pytest.mark.parametrize("variant", RESEARCH)
def test_research_variants(tmp_path: Path, variant: str) -> None:
    state = {f"module.{name}": tensor for name, tensor in research_state(variant).items()}
    state["module._attn_mask"] = torch.ones(10, 10, dtype=torch.bool).triu(1)
    path = tmp_path / "trained_ep100"
    torch.save({"epoch": 100, "model_state_dict": state, "optimizer_state_dict": {}}, path)
    imported = import_checkpoint(
        path, importer="meta-research", num_heads=2, output_length=2, **RESEARCH[variant]
    )
    assert (imported.item_count, imported.max_history) == (10, 7)
    model = HSTURetrieval(imported.config).eval()
    model.load_state_dict(imported.state_dict)
    inputs = (
        torch.from_numpy(PUBLIC[f"research/{name}"])
        for name in ("ids", "timestamps", "lengths", "request_time")
    )
    with torch.no_grad():
        user = model(*inputs)
    np.testing.assert_allclose(user, PUBLIC[f"research/{variant}/user"], rtol=0, atol=TOLERANCE)


def test_every_variant_differs() -> None:
    """Else a variant's option could be ignored unnoticed."""
    users = [PUBLIC[f"research/{variant}/user"] for variant in RESEARCH]
    for i, a in enumerate(users):
        for b in users[i + 1 :]:
            assert np.abs(a - b).max() > 1e-3


RANKING: dict[str, dict[str, Any]] = {
    "plain": {},
    "group_norm": {"num_heads": None},
    "window": {"max_attn_len": 4},
    "alpha": {"alpha": 0.7},
    "contextual": {"contextual_mask": True},
    "contextual_window": {"contextual_mask": True, "max_attn_len": 4, "num_heads": None},
    "not_target_aware": {},
}


@pytest.mark.parametrize("variant", RANKING)
def test_ranking_variants(tmp_path: Path, variant: str) -> None:
    path = tmp_path / "stack.pt"
    torch.save(public_state("ranking", variant), path)
    options = {"num_heads": 2, **RANKING[variant]}
    imported = import_checkpoint(path, importer="meta-ranking", max_seq_len=24, **options)
    config = imported.config
    stack = HSTUStack(config).eval()
    stack.load_state_dict(imported.state_dict)

    prefix = 2 if config.contextual_mask else 0
    history_B, targets_B = (
        torch.from_numpy(PUBLIC[f"ranking/{name}"]) for name in ("history", "targets")
    )
    batch, longest, most = len(history_B), int(history_B.max()), int(targets_B.max())
    history = history_tokens(
        prefix, torch.zeros(batch, longest), history_B, contextual=config.contextual_mask
    )
    targets = candidate_tokens(
        prefix,
        torch.zeros(batch, most),
        targets_B,
        history_B,
        contextual=config.contextual_mask,
    )
    if variant == "not_target_aware":
        # Candidates are further behaviours, one after another.
        targets = HSTUTokens(
            targets.rank_BT + torch.arange(most),
            targets.valid_BT,
            torch.zeros_like(targets.target_BT),
        )
    tokens = HSTUTokens(*(torch.cat(parts, 1) for parts in zip(history, targets, strict=True)))
    x_BTD = torch.zeros(batch, prefix + longest + most, 8)
    x_BTD[tokens.valid_BT] = torch.from_numpy(PUBLIC[f"ranking/{variant}/x"]).float()
    mask = hstu_mask(tokens, tokens, window=config.max_attn_len, contextual=config.contextual_mask)
    with torch.no_grad():
        y_BTD, _, _ = stack(x_BTD, mask)
    np.testing.assert_allclose(
        y_BTD[tokens.valid_BT], PUBLIC[f"ranking/{variant}/y"], rtol=0, atol=TOLERANCE
    )


GIN = """
# A comment, and a call over several lines.
import some.module
train_fn.dataset_name = "ml-1m"
train_fn.max_sequence_length = 200  # as published
train_fn.main_module = "HSTU"
train_fn.user_embedding_norm = "layer_norm"
train_fn.item_l2_norm = True
hstu_encoder.num_heads = 2
generative_recommenders.encoders/hstu_encoder.dqk = 3
hstu_encoder.dv = 2
hstu_encoder.linear_dropout_rate = 0.2
train_fn.loss_weights = {
    "a": 1.0,
    "b": 2.0,
}
train_fn.optimizer = @adam()
train_fn.gr_output_length = 2
"""


def save(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save({"model_state_dict": state}, path)
    return path


def test_gin(tmp_path: Path) -> None:
    gin = tmp_path / "config.gin"
    gin.write_text(GIN)
    bindings = read_gin(gin)
    assert bindings["hstu_encoder.dqk"] == 3
    assert bindings["train_fn.loss_weights"] == {"a": 1.0, "b": 2.0}
    assert bindings["train_fn.max_sequence_length"] == 200
    assert "train_fn.optimizer" not in bindings

    path = save(tmp_path / "c.ckpt", research_state("plain"))
    imported = import_checkpoint(path, importer="meta-research", gin=gin)
    config = imported.config
    assert (config.num_heads, config.d_qk, config.d_v) == (2, 3, 2)
    assert (config.user_norm, config.dropout, config.item_l2_norm) == ("layer_norm", 0.2, True)
    assert imported.max_history == 7
    # Arguments win over the file.
    assert (
        import_checkpoint(
            path, importer="meta-research", gin=gin, user_norm="l2_norm"
        ).config.user_norm
        == "l2"
    )

    gin.write_text('train_fn.main_module = "SASRec"\n')
    with pytest.raises(ValueError, match="only 'HSTU' can be imported"):
        import_checkpoint(path, importer="meta-research", gin=gin)
    gin.write_text("hstu_encoder.num_heads\n")
    with pytest.raises(ValueError, match=r"line 1: 'hstu_encoder\.num_heads' is not"):
        read_gin(gin)


def test_messages_of_the_research_importer(tmp_path: Path) -> None:
    state = research_state("plain")
    path = save(tmp_path / "c.ckpt", state)

    def refused(match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            import_checkpoint(path, importer="meta-research", output_length=2, **options)

    refused("do not tell the number of heads")
    refused("num_heads is 3, which does not divide", num_heads=3)
    refused("they have to agree", num_heads=2, d_qk=6)
    refused("concat_ua=True does not fit", num_heads=2, concat_ua=True)
    refused("normalization is 'softmax'; expected rel_bias", num_heads=2, normalization="softmax")
    refused("has no option heads; it has gin, num_heads", heads=2)
    with pytest.raises(ValueError, match="leaves no history of the 10 positions"):
        import_checkpoint(path, importer="meta-research", num_heads=2, output_length=9)
    with pytest.raises(ValueError, match="no importer 'meta'; there are meta-research, meta-rank"):
        import_checkpoint(path, importer="meta")

    layer = "_hstu._attention_layers.1."
    missing = {name: t for name, t in state.items() if name != f"{layer}_o.bias"}
    missing[f"{layer}_o.scale"] = torch.ones(8)
    missing[f"{layer}_uvqk"] = torch.ones(8, 19)
    save(path, missing)
    refused(rf"missing {layer}_o\.bias; unexpected {layer}_o\.scale; {layer}_uvqk becomes", d_v=2)
    save(path, {"weight": torch.ones(2)})
    refused("lacks _embedding_module._item_emb.weight", num_heads=2)
    save(path, {**state, "_ndp_module._temperature": torch.ones(1)})
    refused("learned similarity", num_heads=2)


def test_messages_of_the_ranking_importer(tmp_path: Path) -> None:
    path = tmp_path / "stack.pt"
    torch.save(public_state("ranking", "plain"), path)
    with pytest.raises(ValueError, match="give num_heads"):
        import_checkpoint(path, importer="meta-ranking", max_seq_len=24)
    torch.save(public_state("ranking", "group_norm"), path)
    with pytest.raises(ValueError, match="num_heads is 4, but the group norm has 2 heads"):
        import_checkpoint(path, importer="meta-ranking", max_seq_len=24, num_heads=4)
    state = public_state("ranking", "plain")
    del state["_stu_layers.0._uvqk_beta"]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"lacks _stu_layers\.0\._uvqk_beta"):
        import_checkpoint(path, importer="meta-ranking", max_seq_len=24, num_heads=2)


class Payload:
    def __reduce__(self) -> Any:
        return (print, ("run",))


@pytest.mark.parametrize("importer", ["meta-research", "meta-ranking"])
def test_nothing_in_a_file_is_run(
    tmp_path: Path, importer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"max_seq_len": 4} if importer == "meta-ranking" else {}
    path = tmp_path / "evil.ckpt"
    torch.save({"model_state_dict": {"a": Payload()}}, path)
    with pytest.raises(ValueError, match="not a file of tensors and plain values"):
        import_checkpoint(path, importer=importer, **options)
    assert capsys.readouterr().out == ""
    path.write_bytes(b"no checkpoint at all")
    with pytest.raises(ValueError, match=r"not a checkpoint that torch|not a file of tensors"):
        import_checkpoint(path, importer=importer, **options)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="holds a list"):
        import_checkpoint(path, importer=importer, **options)
    with pytest.raises(FileNotFoundError):
        import_checkpoint(tmp_path / "absent", importer=importer, **options)
