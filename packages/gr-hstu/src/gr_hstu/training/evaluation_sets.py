"""Evaluation sets that a bundle brings: held-out cases of a dataset as labelled requests.

They are cases of the protocol of the model's own card, each the request that a server would get:
the history as of the case, and what came of it. See `gr_core.labelled`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from gr_core.labelled import EVALUATION
from gr_core.repository import Bundle, Catalogue, with_files
from gr_core.repository.bundle import CARD
from gr_hstu.data.interactions import Interactions
from gr_hstu.evaluation.protocols import Cases
from gr_hstu.features import FeatureSchema
from gr_hstu.training import settings
from gr_hstu.training.batches import HistoryEncoder, catalogue_of
from gr_hstu.training.samples import request_of_rows

_HEADING = "## Evaluation set"


def evaluation_set(
    bundle: Bundle,
    data: Interactions,
    *,
    users: int,
    min_candidates: int,
    heads: Mapping[str, str],
    seed: int = 0,
) -> tuple[str, str]:
    """JSON lines of up to ``users`` random users of the test period, and what they are, in words.

    Where items are to be found, one random case a user. For ranking all impressions of a user in
    one context of which there are at least ``min_candidates``, since a list of one or two says
    nothing of order.
    Raises ValueError for a bundle that is not of this dataset.
    """
    rows = _Rows(bundle, data)
    rng = np.random.default_rng(seed)
    if finds_items(bundle):
        requests, words = _retrieval(rows, users, rng)
    else:
        requests, words = _ranking(rows, users, min_candidates, heads, rng)
    if not requests:
        raise ValueError(f"{data.name}: the test period has no such case; lower --min-candidates")
    text = "".join(json.dumps(r, separators=(",", ":")) + "\n" for r in requests)
    return text, words


def finds_items(bundle: Bundle) -> bool:
    """Whether the model finds items, and does not only rank them."""
    return any(task.finds_items for task in bundle.tasks)


def add_to_bundle(bundle: Bundle, text: str, words: str, command: str) -> Bundle:
    """Makes the set part of a bundle, and its card say so."""
    path = bundle.path / CARD
    card = path.read_text(encoding="utf-8") if path.is_file() else f"# {bundle.name}\n"
    before, _, rest = card.partition(f"\n{_HEADING}\n")
    # A section ends where the next begins; the data's terms stay last.
    _, found, after = rest.partition("\n## ") if rest else before.partition("\n## Data and licence")
    head = "## " if rest else "## Data and licence"
    if not rest:
        before = before.partition("\n## Data and licence")[0]
    section = f"\n{_HEADING}\n\n`{EVALUATION}`: {words}\n\n    {command}\n"
    card = before.rstrip("\n") + "\n" + section + (f"\n{head}{after}" if found else "")
    return with_files(bundle, {EVALUATION: text.encode(), CARD: card.encode()})


class _Rows:
    """A dataset's rows as the requests that a bundle's model reads."""

    def __init__(self, bundle: Bundle, data: Interactions) -> None:
        self.bundle, self.data = bundle, data
        self.catalogue: Catalogue = catalogue_of(data)
        if list(bundle.catalogue().ids) != list(self.catalogue.ids):
            raise ValueError(f"{bundle.path}: its catalogue is not that of {data.name}")
        self.schema = FeatureSchema.from_dict(bundle.features)
        self._encoder = HistoryEncoder(data, self.schema, self.catalogue)
        self._signals = [feature.name for feature in self.schema.signals]

    def request(self, row: int, start: int, end: int) -> dict[str, Any]:
        """The request with the behaviours that the model keeps of a history, and no others."""
        history = self._encoder.history(start, end)
        kept = len(self.schema.history(history, self.catalogue)[0])
        window = range(end - kept, end)
        request = request_of_rows(self.data, self.catalogue, row, window, self._signals)
        for name, features in (("user", self.schema.user), ("context", self.schema.context)):
            read = {feature.name for feature in features}
            values = request.pop(f"{name}_features", {})
            if read:
                request[f"{name}_features"] = {n: v for n, v in values.items() if n in read}
        for column in request["history"]["signals"].values():
            # 0 and 1 are shorter than 0.0 and 1.0, of which a set holds very many.
            column[:] = [v if v is None or v % 1 else int(v) for v in column]
        return request

    def older(self, request: Mapping[str, Any], start: int, end: int) -> list[Any]:
        """Ids of the items of a history that its request does not hold."""
        ids = self.catalogue.ids_of(np.unique(self.data.item_N[start:end])).tolist()
        return sorted(set(ids) - set(request["history"]["item_ids"]))


def _retrieval(
    rows: _Rows, users: int, rng: np.random.Generator
) -> tuple[list[dict[str, Any]], str]:
    data = rows.data
    split = settings.retrieval_split(data, settings.retrieval_settings(data))
    shuffled = split.test.take(rng.permutation(len(split.test)))
    _, first = np.unique(data.user_N[shuffled.row_C], return_index=True)
    chosen = rng.permutation(first)[:users]
    requests = []
    for row, start, end in _each(shuffled.take(np.sort(chosen))):
        request = rows.request(row, start, end)
        if older := rows.older(request, start, end):
            request["exclude_item_ids"] = older
        request["relevant"] = rows.catalogue.ids_of(data.item_N[row : row + 1]).tolist()
        requests.append(request)
    return requests, (
        f"{len(requests)} of the {len(split.test):,} test cases above, one of each of as many "
        "random users: the history as of the case, older items that the user has seen, and the "
        "item that is to be found."
    )


def _ranking(
    rows: _Rows,
    users: int,
    min_candidates: int,
    heads: Mapping[str, str],
    rng: np.random.Generator,
) -> tuple[list[dict[str, Any]], str]:
    data = settings.with_earlier_rates(rows.data)
    labels = settings.ranking_settings(data, heads).heads
    if list(labels) != list(rows.bundle.config.get("heads", ())):
        raise ValueError(
            f"{rows.bundle.path}: its heads are {', '.join(rows.bundle.config.get('heads', ()))}, "
            f"not {', '.join(labels)}; name the signal of each with --head"
        )
    test = settings.ranking_split(data).test
    label_NH = settings.labels(data, labels)
    # What a user is shown in one context is one request, the context being a feature of it.
    keys = np.stack([data.user_N, *(c.astype(np.int64) for c in data.context.values())], axis=1)
    _, group_C = np.unique(keys[test.row_C], axis=0, return_inverse=True)
    order = np.argsort(group_C.reshape(-1), kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(group_C.reshape(-1)[order])) + 1)
    large = [group for group in groups if len(group) >= min_candidates]
    requests = []
    for number in np.sort(rng.permutation(len(large))[:users]):
        cases = test.take(large[number])
        row, start, end = next(_each(cases))
        request = rows.request(row, start, end)
        request["candidates"] = rows.catalogue.ids_of(data.item_N[cases.row_C]).tolist()
        request["labels"] = {
            head: [None if np.isnan(v) else int(v) for v in label_NH[cases.row_C, column]]
            for column, head in enumerate(labels)
        }
        requests.append(request)
    count = sum(len(request["candidates"]) for request in requests)
    return requests, (
        f"{count:,} of the {len(test):,} test cases above as {len(requests)} requests of random "
        f"users, each all that a user was shown in one context if it was at least "
        f"{min_candidates} items, with the labels of all heads."
    )


def _each(cases: Cases) -> Any:
    return zip(cases.row_C.tolist(), cases.start_C.tolist(), cases.end_C.tolist(), strict=True)
