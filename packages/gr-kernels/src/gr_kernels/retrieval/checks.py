"""What every exact index checks of its arguments."""

from __future__ import annotations

from typing import Any


def check_table(table_ID: Any) -> None:
    """Raises `ValueError` for what is no table."""
    if table_ID.dim() != 2 or not 1 <= len(table_ID) < 2**31 or not table_ID.shape[1]:
        raise ValueError(f"table is {tuple(table_ID.shape)}; expected (items, width)")


def check_search(users_BD: Any, k: int, items: int, width: int) -> None:
    """Raises `ValueError` for users or a number that do not fit the table."""
    if users_BD.dim() != 2 or users_BD.shape[1] != width:
        raise ValueError(f"users have the shape {tuple(users_BD.shape)}; expected (users, {width})")
    if not 0 <= k <= items:
        raise ValueError(f"k is {k}; expected 0 to {items}, the number of items")
