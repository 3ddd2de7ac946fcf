"""Tables of quality, in Markdown for people and as plain values for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gr_hstu.evaluation.bootstrap import Interval
from gr_hstu.evaluation.ranking import RankingResult, auc_difference, evaluate_ranking
from gr_hstu.evaluation.retrieval import RetrievalResult, paired_difference

METRICS = ("hr@10", "ndcg@10", "hr@50")


@dataclass(frozen=True)
class Table:
    """A title, a header, rows of cells, and the same as JSON values."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    values: Mapping[str, Any]
    not_above: tuple[str, ...] = ()
    """Comparisons that ours does not win with an interval clear of zero."""

    def markdown(self) -> str:
        lines = [f"**{self.title}**", "", _line(self.header), _line(["---"] * len(self.header))]
        return "\n".join(lines + [_line(row) for row in self.rows])


def retrieval_table(
    title: str, results: Mapping[str, Sequence[RetrievalResult]], ours: str
) -> Table:
    """Rows of several seeds a model; differences are ours minus theirs, paired over users."""
    seeds = {name: len(several) for name, several in results.items()}
    header = (
        "model",
        "seeds",
        *(f"{m.upper()}, seen removed" for m in METRICS),
        "NDCG@10, seen kept",
        f"NDCG@10 (seen removed): {ours} minus it, 95 % interval",
    )
    rows: list[tuple[str, ...]] = []
    values: dict[str, Any] = {}
    not_above: list[str] = []
    for name, several in results.items():
        cells = [name, str(seeds[name])]
        value: dict[str, Any] = {"seeds": seeds[name]}
        for metric in METRICS:
            mean, text = _over_seeds([r.mean(metric) for r in several])
            cells.append(text)
            value[metric] = mean
        mean, text = _over_seeds([r.mean("ndcg@10", "kept") for r in several])
        cells.append(text)
        value["ndcg@10, seen kept"] = mean
        value["ndcg@10 by seed"] = [r.mean("ndcg@10") for r in several]
        if name == ours:
            cells.append("")
        else:
            difference = paired_difference(results[ours], several)
            cells.append(_signed(difference))
            if not difference.low > 0:
                not_above.append(f"NDCG@10 of {name}")
            value["ours minus it"] = asdict(difference)
        rows.append(tuple(cells))
        values[name] = value
    return Table(title, header, tuple(rows), values, tuple(not_above))


def ranking_table(
    title: str,
    label_CH: np.ndarray,
    user_C: np.ndarray,
    heads: Mapping[str, str],
    predictions: Mapping[str, np.ndarray],
    ours: str,
) -> Table:
    """AUC, GAUC, normalised entropy of every head and model, with paired differences."""
    header = (
        "head (label)",
        "model",
        "AUC",
        "GAUC",
        "NE",
        f"AUC: {ours} minus it, 95 % interval",
        "GAUC: the same",
    )
    rows: list[tuple[str, ...]] = []
    values: dict[str, Any] = {}
    not_above: list[str] = []
    for h, (head, label) in enumerate(heads.items()):
        for name, probability_CH in predictions.items():
            result = evaluate_ranking(label_CH[:, h], probability_CH[:, h], user_C)
            cells = [
                f"{head} ({label})",
                name,
                f"{result.auc.value:.4f}",
                _plain(result.gauc.value),
                f"{result.normalised_entropy:.4f}",
            ]
            value: dict[str, Any] = asdict(result)
            if name == ours:
                cells += ["", ""]
            else:
                differences = auc_difference(
                    label_CH[:, h], predictions[ours][:, h], probability_CH[:, h], user_C
                )
                cells += [_signed(d) for d in differences]
                for metric, difference in zip(("AUC", "GAUC"), differences, strict=True):
                    if difference.low <= 0:
                        not_above.append(f"{metric} of {name}, {head}")
                value["ours minus it"] = dict(
                    zip(("auc", "gauc"), map(asdict, differences), strict=True)
                )
            rows.append(tuple(cells))
            values[f"{head}: {name}"] = value
    return Table(title, header, tuple(rows), values, tuple(not_above))


def describe(result: RankingResult) -> str:
    """One line about the cases of a head."""
    return f"{result.rows} impressions, {result.users} users, {result.positive_rate:.2%} positive"


def _over_seeds(values: Sequence[float]) -> tuple[float, str]:
    mean = float(np.mean(values))
    if len(values) == 1:
        return mean, f"{mean:.4f}"
    return mean, f"{mean:.4f} ± {np.std(values, ddof=1):.4f}"


def _plain(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.4f}"


def _signed(difference: Interval) -> str:
    if np.isnan(difference.value):
        return "–"
    return f"{difference.value:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
