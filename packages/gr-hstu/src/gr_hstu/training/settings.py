"""What is trained on which dataset: sizes, features, splits and hyperparameters in one place.

They were chosen on validation data alone. A folder of one's own gets the general ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from gr_hstu.data import amazon
from gr_hstu.data.interactions import BoolArray, Interactions, Table
from gr_hstu.data.kuairand import UTC_OFFSET_MS
from gr_hstu.evaluation import protocols
from gr_hstu.evaluation.protocols import Split, beijing_midnight_ms
from gr_hstu.features import Feature
from gr_hstu.training.loop import Options

DAY_MS = 86_400_000

# KuaiRand-Pure: fitted on the days before, chosen on two days, tested on the last two.
KUAIRAND_VALIDATION_MS = beijing_midnight_ms("2022-05-05")
KUAIRAND_TEST_MS = beijing_midnight_ms("2022-05-07")


@dataclass(frozen=True)
class CoOccurrenceSettings:
    """Parameters of `CoOccurrence`, found by a grid on validation cases."""

    window: int | None = None
    last: int | None = None
    discount: float = 0.0
    powers: tuple[float, float] = (0.5, 0.25)
    recency: float = 0.0


@dataclass(frozen=True)
class RetrievalSettings:
    """Training of retrieval. SASRec has the same sizes, data, loop and evaluator."""

    d_model: int = 64
    num_layers: int = 2
    num_heads: int = 2
    max_history: int = 64
    truncate_step: int = 16
    dropout: float = 0.2
    sasrec_dropout: float = 0.2
    loss: str = "full"
    negatives: int = 128
    batch_size: int = 64
    normalised: bool = True
    """Cosines over ``temperature`` as scores; else dot products with items of free length."""
    temperature: float = 0.05
    warm_start: float = 0.0
    """Mean length of item vectors from co-occurrence counts to start from; 0 starts at random."""
    relative_bias: bool = True
    """Learned bias by position and time differences; without it the model reads no times."""
    positive: str | None = None
    """Signal that makes a row worth predicting in the evaluation; None: every row is."""
    other_weight: float = 1.0
    """Weight in training of the targets that are not positive; 0 trains on positives alone."""
    signals: tuple[Feature, ...] = ()
    options: Options = field(default_factory=Options)
    co_occurrence: Mapping[str, CoOccurrenceSettings] = field(
        default_factory=lambda: {
            "item co-occurrence, cosine, whole history": CoOccurrenceSettings(),
            "item co-occurrence, directed, window 10, last 5": CoOccurrenceSettings(10, 5),
        }
    )


@dataclass(frozen=True)
class GenerationSettings:
    """Training of semantic-id generation."""

    d_model: int = 64
    num_layers: int = 2
    num_heads: int = 2
    max_history: int = 32
    truncate_step: int = 8
    beam_width: int = 20
    dropout: float = 0.3
    batch_size: int = 64
    normalised: bool = True
    """Cosines over ``temperature`` as logits; else dot products with embeddings of free length."""
    temperature: float = 0.05
    options: Options = field(default_factory=Options)
    co_occurrence: Mapping[str, CoOccurrenceSettings] = field(
        default_factory=lambda: dict(RetrievalSettings().co_occurrence)
    )


@dataclass(frozen=True)
class RankingSettings:
    """Training of ranking."""

    model: str = "mtgr"
    d_model: int = 64
    embedding_dim: int = 16
    num_layers: int = 2
    num_heads: int = 2
    mlp_dim: int = 128
    max_history: int = 32
    truncate_step: int = 8
    realtime_window_s: int = 0
    dropout: float = 0.1
    warm_start: float = 0.4
    """Mean length of item vectors from co-occurrence counts to start from; 0 starts at random."""
    batch_size: int = 256
    within_user: float = 0.3
    """Weight of the contrast between impressions of the same user."""
    heads: Mapping[str, str] = field(default_factory=dict)
    """Head -> label: the name of a binary signal, or ``returns_next_day``."""
    head_weights: Mapping[str, float] = field(default_factory=dict)
    signals: tuple[Feature, ...] = ()
    user_columns: tuple[str, ...] = ()
    item_columns: tuple[str, ...] = ()
    options: Options = field(default_factory=Options)
    logistic_regression_strength: float = 0.1


_KUAIRAND_SIGNALS = (Feature("is_long_view", "binary"), Feature("is_liked", "binary"))

RETRIEVAL: Mapping[str, RetrievalSettings] = {
    "ml-100k": RetrievalSettings(
        max_history=50,
        truncate_step=1,
        dropout=0.5,
        sasrec_dropout=0.5,
        batch_size=32,
        options=Options(max_epochs=60, patience=20),
        co_occurrence={
            "item co-occurrence, cosine, whole history": CoOccurrenceSettings(),
            "item co-occurrence, directed, window 10, last 5": CoOccurrenceSettings(10, 5),
            "item co-occurrence, directed, tuned on validation": CoOccurrenceSettings(
                10, 5, recency=0.5
            ),
        },
    ),
    "kuairand-pure": RetrievalSettings(
        d_model=128,
        dropout=0.3,
        sasrec_dropout=0.3,
        loss="shared",
        negatives=2048,
        normalised=False,
        warm_start=0.3,
        # Most behaviours have no time of their own, so there is nothing to learn from gaps.
        relative_bias=False,
        other_weight=0.0,
        positive="is_long_view",
        signals=_KUAIRAND_SIGNALS,
        options=Options(max_epochs=12, patience=2, average_decay=0.998),
        co_occurrence={
            "item co-occurrence, cosine, whole history": CoOccurrenceSettings(),
            "item co-occurrence, directed, window 10, last 5": CoOccurrenceSettings(10, 5),
            "item co-occurrence, directed, tuned on validation": CoOccurrenceSettings(
                50, 50, powers=(0.5, 0.5), recency=0.5
            ),
        },
    ),
    "amazon-industrial-sid": RetrievalSettings(
        max_history=amazon.HISTORY,
        truncate_step=1,
        # The data has an order and no times.
        relative_bias=False,
    ),
}

RANKING: Mapping[str, RankingSettings] = {
    "kuairand-pure": RankingSettings(
        heads={
            "recommendation": "is_clicked",
            "engagement": "is_long_view",
            "like": "is_liked",
            "retention": "returns_next_day",
        },
        head_weights={"recommendation": 0.4, "engagement": 0.4, "like": 0.1, "retention": 0.1},
        signals=(
            *_KUAIRAND_SIGNALS,
            Feature("is_clicked", "binary"),
            Feature(
                "watch_percentage", "bucket", boundaries=(0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
            ),
        ),
        user_columns=(
            "user_active_degree",
            "follow_user_num_range",
            "fans_user_num_range",
            "friend_user_num_range",
            "register_days_range",
            "onehot_feat1",
            "onehot_feat7",
            "onehot_feat8",
        ),
        item_columns=(
            "duration",
            "tag",
            "upload_type",
            "music_type",
            "earlier_impressions",
            "earlier_long_view_rate",
            "earlier_like_rate",
        ),
        options=Options(max_epochs=4, patience=1, weight_decay=0.01, average_decay=0.998),
    ),
}


GENERATION: Mapping[str, GenerationSettings] = {
    "amazon-industrial-sid": GenerationSettings(max_history=amazon.HISTORY, truncate_step=1),
}


def generation_settings(data: Interactions) -> GenerationSettings:
    return GENERATION.get(data.name, GenerationSettings())


def retrieval_settings(data: Interactions) -> RetrievalSettings:
    return RETRIEVAL.get(data.name, RetrievalSettings())


def retrieval_split(data: Interactions, settings: RetrievalSettings) -> Split:
    """As the dataset is known to allow, else the last event of each user."""
    if data.name == "amazon-industrial-sid":
        return protocols.held_out_users(data, "part", amazon.TARGET, amazon.HISTORY)
    if data.name != "kuairand-pure":
        return protocols.leave_last_out(data)
    return protocols.retrieval_by_time(
        data, KUAIRAND_VALIDATION_MS, KUAIRAND_TEST_MS, positives(data, settings.positive)
    )


def positives(data: Interactions, signal: str | None) -> BoolArray:
    """Rows whose ``signal`` is set, (N,) bool; all rows without one."""
    if signal is None:
        return np.ones(len(data), dtype=bool)
    if signal not in data.signals:
        raise ValueError(f"no signal {signal!r}; the data has {', '.join(data.signals) or 'none'}")
    return data.signals[signal] == 1


def ranking_settings(data: Interactions, heads: Mapping[str, str]) -> RankingSettings:
    """Settings of a dataset; ``heads`` (head -> binary signal) are needed for one's own."""
    if data.name in RANKING:
        return replace(RANKING[data.name], heads=heads) if heads else RANKING[data.name]
    if not heads:
        raise ValueError(
            "ranking needs heads: give --head NAME=SIGNAL for each; the data's signals are "
            f"{', '.join(data.signals) or 'none'}"
        )
    signals = tuple(
        Feature(name, "binary")
        if set(np.unique(column[~np.isnan(column)])) <= {0.0, 1.0}
        else quantile_feature(name, column, 8)
        for name, column in data.signals.items()
        if np.isfinite(column).any()
    )
    return RankingSettings(
        heads=heads,
        head_weights={head: 1 / len(heads) for head in heads},
        signals=signals,
        user_columns=tuple(data.users.features),
        item_columns=tuple(data.items.features),
    )


def ranking_split(data: Interactions) -> Split:
    """KuaiRand-Pure by its days; other data at 80 % and 90 % of its events in time."""
    if data.name == "kuairand-pure":
        return protocols.ranking_by_time(data, KUAIRAND_VALIDATION_MS, KUAIRAND_TEST_MS)
    validation_ms, test_ms = np.quantile(data.timestamp_ms_N, [0.8, 0.9])
    if int(test_ms) <= int(validation_ms):
        raise ValueError(
            f"{data.name}: 80 % and 90 % of its events end at the same time, so that it cannot be "
            "split by time; ranking needs events spread over time"
        )
    return protocols.ranking_by_time(data, int(validation_ms), int(test_ms))


def labels(data: Interactions, heads: Mapping[str, str]) -> np.ndarray:
    """Outcomes (N, H) float32 of each head, nan where not observed."""
    columns = []
    for head, label in heads.items():
        if label == "returns_next_day":
            columns.append(returns_next_day(data))
        elif label in data.signals:
            columns.append(data.signals[label])
        else:
            raise ValueError(
                f"head {head!r}: no signal {label!r}; the data has "
                f"{', '.join([*data.signals, 'returns_next_day'])}"
            )
    return np.stack(columns, axis=1).astype(np.float32)


def returns_next_day(data: Interactions) -> np.ndarray:
    """1 where the user has a timed event on the next calendar day (Beijing), 0 where not, (N,).

    nan on the last day of the data, whose next day is not recorded, and for events without a time.
    The log is a sample, so 0 means "not seen in the sample", and the rate is a lower bound.
    """
    timed_N = np.ones(len(data), bool) if data.timed_N is None else data.timed_N
    day_N = calendar_day(data)
    last = int(day_N[timed_N].max())
    key_N = data.user_N * (last + 2) + day_N
    out = np.isin(key_N + 1, key_N[timed_N]).astype(np.float32)
    out[~timed_N | (day_N >= last)] = np.nan
    return out


def calendar_day(data: Interactions) -> np.ndarray:
    """Days since 1970 in Beijing, (N,) int64."""
    return (data.timestamp_ms_N + UTC_OFFSET_MS) // DAY_MS


def with_earlier_rates(data: Interactions) -> Interactions:
    """Adds item features counted in the untimed events, all of which precede every timed one.

    ``earlier_impressions`` (log1p of the count), ``earlier_long_view_rate`` and
    ``earlier_like_rate``, smoothed towards the mean with the weight of 20 and 50 impressions.
    They never see a label of a timed event, so they are the same in training, test and serving.
    """
    if data.timed_N is None or data.timed_N.all():
        return data
    rows = ~data.timed_N
    size = len(data.items) + 1
    shown = np.bincount(data.item_N[rows], minlength=size)[1:]

    def rate(signal: str, strength: float) -> np.ndarray:
        value = data.signals[signal][rows].astype(np.float64)
        positive = np.bincount(data.item_N[rows], weights=value, minlength=size)[1:]
        smoothed = (positive + strength * value.mean()) / (shown + strength)
        return smoothed.astype(np.float32)

    features = {
        **data.items.features,
        "earlier_impressions": np.log1p(shown).astype(np.float32),
        "earlier_long_view_rate": rate("is_long_view", 20),
        "earlier_like_rate": rate("is_liked", 50),
    }
    return replace(data, items=replace(data.items, features=features))


def side_features(table: Table, names: tuple[str, ...], most: int = 1000) -> tuple[Feature, ...]:
    """Features of a table's columns: numbers by quantile, the ``most`` frequent categories."""
    out = []
    for name in names:
        column = table.features[name]
        if column.dtype.kind == "f":
            out.append(quantile_feature(name, column, 16))
            continue
        values, count = np.unique(column[column != ""], return_counts=True)
        frequent = values[np.argsort(-count, kind="stable")][:most]
        out.append(Feature(name, "categorical", values=tuple(sorted(map(str, frequent)))))
    return tuple(out)


def quantile_feature(name: str, column: np.ndarray, buckets: int) -> Feature:
    inner = np.linspace(0, 1, buckets + 1)[1:-1]
    boundaries = np.unique(np.nanquantile(column.astype(np.float64), inner))
    return Feature(name, "bucket", boundaries=tuple(float(b) for b in boundaries))


def category_feature(name: str, column: np.ndarray) -> Feature:
    """An integer column of the context as categories; negative values mean unknown."""
    values = np.unique(column[column >= 0])
    return Feature(name, "categorical", values=tuple(str(v) for v in values))
