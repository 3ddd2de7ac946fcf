"""The table ``options`` of a model, of which exporter and engine each take their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from gr_core.errors import PlanError

Options = TypeVar("Options")


def own_options(
    kind: type[Options], extra: Mapping[str, Any], foreign: frozenset[str], who: str
) -> Options:
    """The options of a dataclass ``kind``, which raises `ValueError` for a wrong one.

    ``foreign`` are names that another part takes. Raises `PlanError` in the name of ``who``.
    """
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    for name in extra:
        if name not in known | foreign:
            there = ", ".join(sorted(known | foreign))
            raise PlanError(f"{who} has no option {name!r}; there are: {there}")
    try:
        return kind(**{name: extra[name] for name in extra if name in known})
    except ValueError as error:
        raise PlanError(f"{who}: option {error}") from None
