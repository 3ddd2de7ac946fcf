"""The code of docs/grpc.md runs, against a real server."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from gr_core import History, RecommendRequest

PAGE = Path(__file__).parents[3] / "docs" / "grpc.md"


async def test_the_code_of_the_page_runs(serve, capsys):
    if not PAGE.exists():
        pytest.skip("docs/grpc.md belongs to the repository, not to the package")
    page = PAGE.read_text(encoding="utf-8")
    code = "".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    async with serve() as running:
        names: dict[str, object] = {}
        code = code.replace("127.0.0.1:50051", running.address)
        await asyncio.to_thread(exec, compile(code, str(PAGE), "exec"), names)
        assert [item.item_id for item in names["ranked"].items] == [42, 7]
        assert len(names["alone"].items) == 10
        assert [names[name].stages[0].tokens for name in ("returned", "kept")] == [3, 4]
        await names["many"]([RecommendRequest(History(), request_id="one")])
    printed = capsys.readouterr().out
    assert "Title of 1 " in printed
    assert "retrieve numbers 1 toy" in printed
    assert "one [RankedItem(" in printed
