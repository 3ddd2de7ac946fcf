"""Protocol buffers' text format, as much of it as ``config.pbtxt`` takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class Word(str):
    """A value that is written without quotes: a name of an enumeration."""

    __slots__ = ()


def text_format(message: Mapping[str, Any]) -> str:
    """A message as text: mappings are messages, lists are repeated fields, each of its own."""
    return "\n".join(_lines(message, "")) + "\n"


def _lines(message: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, value in message.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Mapping):
                yield f"{indent}{name} {{"
                yield from _lines(one, indent + "  ")
                yield f"{indent}}}"
            else:
                yield f"{indent}{name}: {_scalar(one)}"


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Word | int):
        return str(value)
    assert isinstance(value, str), value
    return '"' + "".join(map(_escaped, value.encode())) + '"'


def _escaped(byte: int) -> str:
    character = chr(byte)
    if character in '"\\':
        return "\\" + character
    return character if 32 <= byte < 127 else f"\\{byte:03o}"
