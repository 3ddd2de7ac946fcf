"""``gr call`` as users run it: a process that asks a real server."""

from __future__ import annotations

import asyncio
import json
import os
import sys

NOW = 1_700_000_000_000


async def gr_call(*arguments: str, stdin: str = "", **environment: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "from gr_core.cli import main; main()", "call", *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **environment},
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(stdin.encode()), 30)
    return process.returncode or 0, out.decode(), err.decode()


async def test_it_prints_tables_and_json(serve, tmp_path):
    history = tmp_path / "history.jsonl"
    rows = [{"item_id": 1, "timestamp_ms": NOW, "signals": {"is_liked": 1}}]
    rows += [{"item_id": 2, "timestamp_ms": NOW + 1}]
    history.write_text("".join(json.dumps(row) + "\n" for row in rows))
    async with serve() as running:
        target = ("--target", running.address)
        code, out, err = await gr_call(*target, "--history", str(history), "-k", "2")
        assert code == 0, err
        assert "Title of 3" in out
        assert "Title of 4" in out
        assert "retrieve: numbers/1 on toy" in out
        code, out, err = await gr_call(*target, "--history", "-", "--json", stdin=json.dumps(rows))
        assert code == 0, err
        assert [item["item_id"] for item in json.loads(out)["items"]] == list(range(3, 13))
        code, out, err = await gr_call(
            *target, "--candidates", "5,3", "--head-weight", "down=1", "--json"
        )
        assert code == 0, err
        assert [item["item_id"] for item in json.loads(out)["items"]] == [3, 5]
        request = {"history": rows, "k": 3, "request_id": "from-file", "model": "texts"}
        code, out, err = await gr_call(
            *target, "--request", "-", "--model", "numbers", "--json", stdin=json.dumps(request)
        )
        assert code == 0, err
        answer = json.loads(out)
        assert answer["request_id"] == "from-file"
        assert [item["item_id"] for item in answer["items"]] == [3, 4, 5]


async def test_it_lists_models(serve):
    async with serve() as running:
        code, out, err = await gr_call("--target", running.address, "--list-models")
        assert code == 0, err
        assert "numbers (default)" in out
        code, out, err = await gr_call("--target", running.address, "--list-models", "--json")
        assert [model["name"] for model in json.loads(out)] == ["numbers", "texts"]


async def test_mistakes_are_said_in_one_line_each(serve, tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text('[{"item_id": 1, "timestamp_ms": 5, "signals": {"x": NaN}}]')
    async with serve() as running:
        target = ("--target", running.address)
        for arguments, message in (
            (("-k", "0"), "k: 0"),
            (("--model", "films"), "'films' is not served; there are: numbers, texts"),
            (("--history", str(bad)), "NaN is no value of JSON"),
            (("--head-weight", "up"), "expected HEAD=WEIGHT"),
            (("--tls-certificate", str(bad)), "must be given together"),
        ):
            code, out, err = await gr_call(*target, *arguments)
            assert code == 2, (arguments, out, err)
            assert message in err
            assert "Traceback" not in err


async def test_a_server_that_is_not_there(unused_tcp_port: int):
    code, _, err = await gr_call("--target", f"127.0.0.1:{unused_tcp_port}", "--timeout", "0.5")
    assert code == 1
    assert str(unused_tcp_port) in err
    assert "Traceback" not in err


async def test_a_token_from_the_environment_or_a_file(serve, tmp_path):
    token, file = "a-token-of-24-characters", tmp_path / "token"
    file.write_text(token + "\n")
    async with serve(token_file=file) as running:
        target = ("--target", running.address)
        assert (await gr_call(*target))[0] == 1
        assert (await gr_call(*target, GR_TOKEN=token))[0] == 0
        assert (await gr_call(*target, "--token-file", str(file)))[0] == 0


async def test_a_handle_stands_for_a_history(serve):
    rows = [{"item_id": i, "timestamp_ms": NOW + i} for i in (1, 2, 3)]
    async with serve() as running:
        ada = ("--target", running.address, "--user-id", "ada", "-k", "1", "--history", "-")
        code, out, err = await gr_call(*ada, "--json", stdin=json.dumps(rows[:2]))
        assert code == 0, err
        handle = json.loads(out)["history_handle"]
        code, out, err = await gr_call(*ada, "--history-handle", handle, stdin=json.dumps(rows[2:]))
        assert code == 0, err
        assert "Title of 4" in out
        assert "\nhistory handle " in out
        code, out, err = await gr_call(*ada, "--history-handle", "AAAA", stdin="[]")
        assert code == 2
        assert "history_handle: not known here" in err
        code, out, err = await gr_call(*ada, "--history-handle", "é", stdin="[]")
        assert code == 2
        assert "expected base64" in err
