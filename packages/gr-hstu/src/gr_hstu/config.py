"""Configurations of the models: frozen, checked when made, and JSON in and out.

A feature's *cardinality* is the number of rows of its embedding table: its ids run from 0 to
cardinality - 1, and 0 stands for missing or unknown.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal, Self

from gr_core.generation import MAX_BEAM_WIDTH

Variant = Literal["research", "ranking"]


def _matches(value: Any, hint: Any) -> bool:
    """Whether `value` is of the annotated type; an int is a float, but a bool is no int."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin is tuple:
        element = typing.get_args(hint)[0]
        return isinstance(value, tuple) and all(_matches(v, element) for v in value)
    if origin in (types.UnionType, typing.Union):
        return any(_matches(value, arm) for arm in typing.get_args(hint))
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    if origin is tuple:
        return f"a list of {_describe(typing.get_args(hint)[0])}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_describe(arm) for arm in typing.get_args(hint))
    return "null" if hint is type(None) else hint.__name__


class _Config:
    """Type checks and the conversion from and to plain JSON values."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if not _matches(value, hints[field.name]):
                raise self._error(field.name, value, _describe(hints[field.name]))
        self._check()

    def _check(self) -> None:
        """Ranges and combinations; raises ValueError."""

    def _error(self, name: str, value: Any, expected: str) -> ValueError:
        return ValueError(f"{type(self).__name__}.{name} is {value!r}; expected {expected}")

    def _at_least(self, minimum: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value < minimum:
                raise self._error(name, value, f"at least {minimum}")

    def _fraction(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                raise self._error(name, value, "a number in [0, 1)")

    def _cardinalities(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if any(cardinality < 1 for cardinality in value):
                raise self._error(name, value, "cardinalities of at least 1")

    def _unique_heads(self, heads: tuple[str, ...]) -> None:
        if len(set(heads)) != len(heads) or not all(heads):
            raise self._error("heads", heads, "unique, non-empty names")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the inverse of `from_dict`."""
        fields = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads what `to_dict` wrote. Raises ValueError for unknown, missing or wrong fields."""
        fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if unknown := sorted(set(values) - set(fields)):
            raise ValueError(
                f"{cls.__name__} has no field {', '.join(map(repr, unknown))}; "
                f"its fields are {', '.join(fields)}"
            )
        required = [
            name
            for name, field in fields.items()
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        ]
        if missing := [name for name in required if name not in values]:
            raise ValueError(f"{cls.__name__} lacks the required {', '.join(map(repr, missing))}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


@dataclass(frozen=True)
class HSTUConfig(_Config):
    """HSTU (arXiv 2402.17152) in both of its public variants.

    `research` is the variant of the public ML-1M, ML-20M and Amazon checkpoints (retrieval);
    `ranking` is that of DLRMv3 (ranking of candidates). Fields of one variant are ignored by the
    other where they are listed under a variant below.
    """

    variant: Variant
    num_items: int
    """Catalogue size N. Items have indices 1..N; 0 is padding. A bare stack has 0 items."""
    d_model: int
    num_layers: int
    num_heads: int
    d_qk: int
    """Columns of Q and K per head."""
    d_v: int
    """Columns of U and V per head."""
    max_seq_len: int
    """The attention's constant divisor. In the research variant also the number of positions
    (history plus the positions reserved for output), which bounds the length of a history."""
    alpha: float | None = None
    """Scale of Q·K; by default 1 (research) or 1/sqrt(d_qk) (ranking)."""
    norm_eps: float = 1e-6
    dropout: float = 0.0
    """On the input of each layer's output projection."""
    input_dropout: float = 0.0
    signal_cardinalities: tuple[int, ...] = ()
    """One a signal column of the history (liked, watch percentage bucket, ...)."""

    # research variant
    projection_activation: Literal["silu", "none"] = "silu"
    attention_activation: Literal["silu", "softmax"] = "silu"
    relative_bias: bool = True
    """Learned position and time bias on the attention scores."""
    time_bias_buckets: int = 128
    concat_ua: bool = False
    """Output projection of concat(U, a, U·a) with a = norm(A V), instead of U·a."""
    user_norm: Literal["l2", "layer_norm"] = "l2"
    item_l2_norm: bool = True
    temperature: float = 0.05
    """Of the sampled softmax in training; scores are plain dot products."""

    # ranking variant
    group_norm: bool = False
    """Normalize A V per head (one scale and shift a head) instead of over all heads."""
    max_attn_len: int = 0
    """Window of the attention in behaviours; 0 is unbounded."""
    contextual_mask: bool = False
    """Prefix tokens are visible to and see the whole history; otherwise they are causal."""
    context_placement: Literal["prefix", "candidate"] = "prefix"
    """Context features as prefix tokens, or added to the candidates. The second keeps the K/V of
    the history independent of the request's context."""
    position_buckets: int = 8192
    position_from: Literal["start", "end"] = "start"
    """Count positions from the oldest behaviour, or from the request (DLRMv3)."""
    time_buckets: int = 2048
    time_from: Literal["previous", "request"] = "previous"
    """Time embedding of the time since the previous behaviour, or until the request (DLRMv3)."""
    user_cardinalities: tuple[int, ...] = ()
    context_cardinalities: tuple[int, ...] = ()
    item_cardinalities: tuple[int, ...] = ()
    """Side features of items, looked up by the item's index."""
    candidate_cardinalities: tuple[int, ...] = ()
    """Cross features that a request gives for each candidate."""
    heads: tuple[str, ...] = ()
    mlp_dim: int = 512
    """Hidden width of the item MLP and of the heads."""

    def _check(self) -> None:
        self._at_least(1, "d_model", "num_layers", "num_heads", "d_qk", "d_v", "max_seq_len")
        self._at_least(1, "mlp_dim", "time_bias_buckets")
        self._at_least(0, "num_items", "max_attn_len", "position_buckets", "time_buckets")
        self._fraction("dropout", "input_dropout")
        self._cardinalities(
            "signal_cardinalities",
            "user_cardinalities",
            "context_cardinalities",
            "item_cardinalities",
            "candidate_cardinalities",
        )
        self._unique_heads(self.heads)
        if self.variant == "ranking" and self.attention_activation == "softmax":
            raise self._error("attention_activation", "softmax", "'silu' in the ranking variant")
        if self.norm_eps <= 0:
            raise self._error("norm_eps", self.norm_eps, "more than 0")
        if self.temperature <= 0:
            raise self._error("temperature", self.temperature, "more than 0")
        if self.variant == "ranking" and 0 < self.position_buckets <= self.num_prefix_tokens:
            raise self._error(
                "position_buckets",
                self.position_buckets,
                f"more than the {self.num_prefix_tokens} prefix tokens",
            )

    @property
    def divisor(self) -> int:
        """N of SiLU(Q Kᵀ)/N."""
        return self.max_seq_len

    @property
    def scale(self) -> float:
        """Alpha with its default filled in."""
        if self.alpha is not None:
            return self.alpha
        return 1.0 if self.variant == "research" else self.d_qk**-0.5

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the history: one a user (and context) feature."""
        context = self.context_cardinalities if self.context_placement == "prefix" else ()
        return len(self.user_cardinalities) + len(context)


@dataclass(frozen=True)
class MTGRConfig(_Config):
    """MTGR (arXiv 2505.18654): token groups U, S, R and candidates in one HSTU-like stack."""

    num_items: int
    """Catalogue size N. Items have indices 1..N; 0 is padding."""
    d_model: int
    num_layers: int
    num_heads: int
    max_seq_len: int
    """The attention's constant divisor. The paper divides by the number of tokens; a constant
    keeps scores independent of the number of candidates and cached K/V exact."""
    heads: tuple[str, ...]
    d_qk: int | None = None
    """Columns of Q and K per head; by default d_model / num_heads."""
    d_v: int | None = None
    """Columns of U and V per head; by default d_model / num_heads."""
    embedding_dim: int = 64
    """Width of every embedding table; a token's embeddings are concatenated before its MLP."""
    mlp_dim: int = 512
    """Hidden width of the token MLPs and of the heads."""
    norm_eps: float = 1e-6
    dropout: float = 0.0
    input_dropout: float = 0.0
    position_buckets: int = 0
    """Positions counted from the oldest behaviour, added to S and R; 0 for none (the paper)."""
    time_buckets: int = 0
    """Buckets of the time since the previous behaviour, added to S, R and candidates; 0: none."""
    context_placement: Literal["prefix", "candidate"] = "prefix"
    """Context features as tokens of U, or among the candidates' cross features."""
    signal_cardinalities: tuple[int, ...] = ()
    user_cardinalities: tuple[int, ...] = ()
    context_cardinalities: tuple[int, ...] = ()
    item_cardinalities: tuple[int, ...] = ()
    candidate_cardinalities: tuple[int, ...] = ()

    def _check(self) -> None:
        self._at_least(1, "d_model", "num_layers", "num_heads", "max_seq_len", "num_items")
        self._at_least(1, "embedding_dim", "mlp_dim", "qk_dim", "v_dim")
        self._at_least(0, "position_buckets", "time_buckets")
        self._fraction("dropout", "input_dropout")
        self._cardinalities(
            "signal_cardinalities",
            "user_cardinalities",
            "context_cardinalities",
            "item_cardinalities",
            "candidate_cardinalities",
        )
        self._unique_heads(self.heads)
        if not self.heads:
            raise self._error("heads", self.heads, "at least one head")
        if self.norm_eps <= 0:
            raise self._error("norm_eps", self.norm_eps, "more than 0")
        if (self.d_qk is None or self.d_v is None) and self.d_model % self.num_heads:
            raise self._error("d_model", self.d_model, f"a multiple of num_heads {self.num_heads}")

    @property
    def qk_dim(self) -> int:
        return self.d_qk if self.d_qk is not None else self.d_model // self.num_heads

    @property
    def v_dim(self) -> int:
        return self.d_v if self.d_v is not None else self.d_model // self.num_heads

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens of the group U: one a user (and context) feature."""
        context = self.context_cardinalities if self.context_placement == "prefix" else ()
        return len(self.user_cardinalities) + len(context)


@dataclass(frozen=True)
class SemanticIdConfig(_Config):
    """HSTU that generates semantic ids: the research variant over the codes of the items (TIGER).

    A token is a code of a level, or the first one. Ids of tokens: 0 is padding, then the codes
    level by level, then the first token.
    """

    num_items: int
    """Catalogue size. Items have indices 1..num_items; 0 is padding."""
    code_sizes: tuple[int, ...]
    """How many codes there are at each of the L levels of an item."""
    max_behaviours: int
    """Bounds the length of a history."""
    d_model: int
    num_layers: int
    num_heads: int
    d_qk: int
    """Columns of Q and K per head."""
    d_v: int
    """Columns of U and V per head."""
    beam_width: int = 20
    """Prefixes that a search keeps; as many as items are asked for, where these are more."""
    norm_eps: float = 1e-6
    dropout: float = 0.0
    """On the input of each layer's output projection."""
    input_dropout: float = 0.0
    concat_ua: bool = False
    """Output projection of concat(U, a, U·a) with a = norm(A V), instead of U·a."""
    state_norm: Literal["l2", "layer_norm"] = "l2"
    """Of the last token's output, before it is multiplied with the embeddings of tokens."""
    token_l2_norm: bool = True
    temperature: float = 0.05
    """Products of state and tokens are divided by it before the softmax."""

    def _check(self) -> None:
        self._at_least(1, "num_items", "max_behaviours", "beam_width")
        if not self.code_sizes or any(size < 1 for size in self.code_sizes):
            raise self._error("code_sizes", self.code_sizes, "at least one size, each at least 1")
        if self.beam_width > MAX_BEAM_WIDTH:
            raise self._error("beam_width", self.beam_width, f"at most {MAX_BEAM_WIDTH}")
        try:
            self.decoder()
        except ValueError as error:
            message = str(error).removeprefix("HSTUConfig.")
            raise ValueError(f"{type(self).__name__}.{message}") from None

    @property
    def levels(self) -> tuple[range, ...]:
        """Ids of the tokens of each level."""
        ends = tuple(accumulate(self.code_sizes, initial=1))
        return tuple(range(start, end) for start, end in pairwise(ends))

    @property
    def first_token(self) -> int:
        """The id of the token that every history begins with."""
        return 1 + sum(self.code_sizes)

    def decoder(self) -> HSTUConfig:
        """The model of the tokens; its items are the tokens.

        Its positions are those of the longest history, and of all but the last code of an item.
        """
        return HSTUConfig(
            variant="research",
            num_items=self.first_token,
            d_model=self.d_model,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            d_qk=self.d_qk,
            d_v=self.d_v,
            max_seq_len=len(self.code_sizes) * (self.max_behaviours + 1),
            norm_eps=self.norm_eps,
            dropout=self.dropout,
            input_dropout=self.input_dropout,
            relative_bias=False,
            concat_ua=self.concat_ua,
            user_norm=self.state_norm,
            item_l2_norm=self.token_l2_norm,
            temperature=self.temperature,
        )
