"""Reads the `name.parameter = value` lines of a gin configuration file."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any


def read_gin(path: str | Path) -> dict[str, Any]:
    """Bindings as {"name.parameter": value}, e.g. {"hstu_encoder.num_heads": 2}.

    Scopes and module paths before the name are dropped; later lines win. Values are Python
    literals, possibly over several lines; others (references and macros) are left out, as are
    imports and includes. Raises ValueError for a line that is none of these.
    """
    bindings: dict[str, Any] = {}
    lines = iter(Path(path).read_text(encoding="utf-8").splitlines())
    for number, line in enumerate(lines, start=1):
        text = line.split("#", 1)[0].strip()
        if not text or text.split()[0] in ("import", "include", "from"):
            continue
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{path}, line {number}: {line.strip()!r} is not 'name.param = value'")
        while any(value.count(a) > value.count(b) for a, b in ("()", "[]", "{}")):
            value += " " + next(lines, ")]}").split("#", 1)[0].strip()
        try:
            literal = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            continue
        parts = name.strip().split("/")[-1].split(".")
        bindings[".".join(parts[-2:])] = literal
    return bindings
