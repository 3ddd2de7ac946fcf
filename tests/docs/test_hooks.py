"""docs/hooks.md says of every hook exactly what the code says."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

from gr_core.plugins import hooks
from gr_core.plugins.descriptors import Descriptor
from gr_core.plugins.registry import KINDS

PAGE = (Path(__file__).parents[2] / "docs" / "hooks.md").read_text(encoding="utf-8")
COMMON, *_REST = re.split(r"^## ", PAGE, flags=re.MULTILINE)
SECTIONS = {part.splitlines()[0]: part for part in _REST}
HOOKS = [name for name in vars(hooks) if name.startswith("gr_register_")]


def signature(name: str) -> str:
    (function,) = ast.parse(inspect.getsource(getattr(hooks, name))).body
    assert isinstance(function, ast.FunctionDef)
    assert function.returns is not None
    return f"def {name}({ast.unparse(function.args)}) -> {ast.unparse(function.returns)}: ...\n"


def test_every_hook_and_no_other_is_documented():
    assert [name for name in SECTIONS if name.startswith("gr_register_")] == HOOKS
    assert [f"gr_register_{kind}" for kind in KINDS] == HOOKS


@pytest.mark.parametrize("name", HOOKS)
def test_the_signature_is_the_codes(name: str):
    blocks = re.findall(r"```python\n(.*?)```", SECTIONS[name], re.DOTALL)
    assert blocks == [signature(name)]


@pytest.mark.parametrize("name", HOOKS)
def test_every_field_of_the_descriptor_is_explained(name: str):
    descriptor = KINDS[name.removeprefix("gr_register_")]
    assert f"`{descriptor.__name__}`" in SECTIONS[name]
    common = {field.name for field in fields(Descriptor)}
    own = {field.name for field in fields(descriptor)} - common
    assert documented(SECTIONS[name]) == own
    assert documented(COMMON) == common


def documented(text: str) -> set[str]:
    """Names in the first column of tables."""
    cells = re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
