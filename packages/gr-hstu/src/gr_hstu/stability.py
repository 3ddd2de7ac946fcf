"""Which K and V stay true when a history grows: the condition for reusing them."""

from __future__ import annotations

from gr_core.contracts import PrefixStability
from gr_hstu.config import HSTUConfig, MTGRConfig


def prefix_stability(config: HSTUConfig | MTGRConfig) -> PrefixStability:
    """Holds for a history that keeps its oldest behaviour; dropping that shifts all positions."""
    depends_on = []
    if config.user_cardinalities:
        depends_on.append("user_features")
    if config.context_cardinalities and config.context_placement == "prefix":
        depends_on.append("context_features")
    if isinstance(config, MTGRConfig):
        return PrefixStability(
            "unchanged",
            0,
            (*depends_on, "realtime_counts"),
            "U and S attend to all of U and S, and never to R or candidates: while they are the "
            "same, R may grow and all K and V stay; a change of U or S, or a behaviour that passes "
            "from R to S, changes all",
        )
    if config.variant == "research":
        if config.attention_activation == "softmax":
            return PrefixStability(
                "none", 0, (), "the softmax variant normalizes over later tokens and padding"
            )
        if config.relative_bias:
            return PrefixStability(
                "growing",
                1,
                (),
                "causal, positions from the start; the time bias of the last token reads the "
                "time of what follows",
            )
        return PrefixStability("growing", 0, (), "causal, positions from the start")
    if config.time_buckets and config.time_from == "request":
        depends_on.append("request_time")
    if config.contextual_mask and config.num_prefix_tokens:
        reason = "prefix tokens see the whole history, and all of the history sees them"
    elif config.position_buckets and config.position_from == "end":
        reason = "positions are counted from the end of the history"
    elif "request_time" in depends_on:
        reason = (
            "time embeddings are relative to the request; what is older than the first behaviour "
            "whose bucket of time changed stays, also when behaviours are appended"
        )
    else:
        return PrefixStability(
            "growing",
            0,
            tuple(depends_on),
            "causal, positions from the start, times relative to earlier behaviours",
        )
    return PrefixStability("unchanged", 0, tuple(depends_on), reason)
