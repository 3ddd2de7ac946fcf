"""Both ends of the stack, opened: sums of table rows in, a table times the last token out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gr_core import Task
from gr_core.errors import PlanError
from gr_core.tokens import Readout, TokenModel
from gr_hstu.testing import CONFIGS, a_request, encode, load, random_module, write


@pytest.mark.parametrize("norm", ["l2", "layer_norm"])
@pytest.mark.parametrize("item_l2", [True, False])
def test_the_ends_are_the_models(tmp_path: Path, norm: str, item_l2: bool) -> None:
    config = replace(CONFIGS["research"], user_norm=norm, item_l2_norm=item_l2)
    state = random_module(config).state_dict()
    model = load(write(tmp_path, "research", config=config.to_dict(), state=state))
    assert isinstance(model, TokenModel)
    request = encode(model, Task.RETRIEVE, a_request(3, 9))
    sequence = model.sequence(request)
    ids, tables = torch.from_numpy(model.token_ids(sequence)), model.token_tables()
    summed: Tensor = sum(table[ids[:, w]] for w, table in enumerate(tables.tables))
    assert tables.places is not None
    x = summed + tables.places[: len(ids)]
    torch.testing.assert_close(x, model.embed([request], [sequence], [0]))
    (user,) = model.outputs(Task.RETRIEVE, [request], x[-1:])
    readout = model.readout()
    torch.testing.assert_close(
        readout.table @ normalized(x[-1], readout), model.item_table() @ user
    )
    assert not np.any(readout.table[0].numpy())


def normalized(x: Tensor, readout: Readout) -> Tensor:
    if readout.norm == "l2":
        return functional.normalize(x, dim=-1, eps=readout.eps)
    return functional.layer_norm(x, x.shape, eps=readout.eps)


@pytest.mark.parametrize("kind", ["ranking", "mtgr"])
def test_other_models_say_so(tmp_path: Path, kind: str) -> None:
    model = load(write(tmp_path, kind))
    with pytest.raises(PlanError, match="only models for retrieval"):
        model.token_tables()
    with pytest.raises(PlanError, match="only models for retrieval"):
        model.readout()


def test_given_items_are_rows_of_the_readout(tmp_path: Path) -> None:
    model = load(write(tmp_path, "research"))
    request = encode(model, Task.RANK, a_request(3, 9, candidates=5))
    rows = model.answer_ids(request)
    x = torch.randn(1, CONFIGS["research"].d_model)
    (scores,) = model.outputs(Task.RANK, [request], x)
    readout = model.readout()
    torch.testing.assert_close(scores[:, 0], readout.table[rows] @ normalized(x[0], readout))
