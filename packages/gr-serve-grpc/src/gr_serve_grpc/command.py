"""The command ``gr call``: a client of a running server."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import click

from gr_core.cli.options import TASKS, json_option
from gr_core.cli.output import emit, table
from gr_core.cli.recommend import print_answer
from gr_core.errors import ConfigurationError, InvalidRequest, Violation
from gr_core.json_requests import answer_as_dict, request_of
from gr_core.types import Candidates, History, ItemId, RecommendRequest, Task, item_id_array
from gr_serve_grpc.client import DEFAULT_TARGET, Client, Tls

PEM = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("call")
@click.option("--target", default=DEFAULT_TARGET, show_default=True, metavar="HOST:PORT")
@click.option("--model", help="Name of a model or pipeline; default: the server's default.")
@click.option("--version", "model_version", help="Version; default: the active one.")
@click.option(
    "--history",
    metavar="FILE",
    type=click.File("r"),
    help="Behaviours as a JSON list, or one JSON object a line; - reads standard input. "
    'One is {"item_id": 42, "timestamp_ms": 1700000000000, "signals": {"is_liked": 1}}.',
)
@click.option("--candidates", metavar="ID,…", help="Items to rank; default: find some.")
@click.option("--exclude", metavar="ID,…", help="Items that must not be found.")
@click.option(
    "--task", type=click.Choice(TASKS), help="One stage alone; default: what the models can."
)
@click.option("-k", "--k", type=int, help="How many items.  [default: 10]")
@click.option("--user-id", help="Owner of cached state.")
@click.option(
    "--history-handle",
    metavar="BASE64",
    help="Of an earlier answer to the same user; --history then is only what is new.",
)
@click.option("--head-weight", "weights", multiple=True, metavar="HEAD=WEIGHT")
@click.option(
    "--request",
    "file",
    type=click.File("r"),
    help="A request as JSON, which the other options change; - reads standard input.",
)
@click.option("--timeout", default=10.0, show_default=True, help="Seconds, with all retries.")
@click.option("--list-models", is_flag=True, help="List the server's models instead.")
@json_option
@click.option("--tls", is_flag=True, help="Encrypt; the server's certificate must be trusted.")
@click.option("--tls-ca", type=PEM, help="Encrypt; trust these authorities instead.")
@click.option("--tls-certificate", type=PEM, help="The client's own certificate (mutual TLS).")
@click.option("--tls-key", type=PEM, help="Its private key.")
@click.option("--token-file", type=PEM, help="File with a bearer token; default: $GR_TOKEN.")
@click.option("--token", envvar="GR_TOKEN", hidden=True)
def call(
    target: str,
    model: str | None,
    model_version: str | None,
    history: IO[str] | None,
    candidates: str | None,
    exclude: str | None,
    task: str | None,
    k: int | None,
    user_id: str | None,
    history_handle: str | None,
    weights: Sequence[str],
    file: IO[str] | None,
    timeout: float,
    list_models: bool,
    as_json: bool,
    tls: bool,
    tls_ca: Path | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
    token_file: Path | None,
    token: str | None,
) -> None:
    """Ask a running server for recommendations.

    For example: gr call --history behaviours.jsonl -k 5
    """
    given: dict[str, Any] = {"model": model, "version": model_version, "k": k, "user_id": user_id}
    request = RecommendRequest(History()) if file is None else _request(file)
    if history is not None:
        given["history"] = _history(history)
    if candidates is not None:
        given["candidates"] = Candidates(item_id_array(_ids(candidates)))
    if exclude is not None:
        given["exclude_item_ids"] = item_id_array(_ids(exclude))
    if history_handle is not None:
        given["history_handle"] = request_of(
            {"history_handle": history_handle}, "--history-handle"
        ).history_handle
    if task is not None:
        given["task"] = Task(task)
    if weights:
        given["head_weights"] = dict(map(_weight, weights))
    request = replace(request, **{key: v for key, v in given.items() if v is not None})
    if token_file is not None:
        token = token_file.read_text(encoding="utf-8").strip()
    if (tls_certificate is None) != (tls_key is None):
        raise ConfigurationError("--tls-certificate and --tls-key must be given together")
    encrypted = tls or tls_ca is not None or tls_certificate is not None
    credentials = Tls(tls_ca, tls_certificate, tls_key) if encrypted else None
    with Client(target, timeout_s=timeout, tls=credentials, token=token) as client:
        if list_models:
            _show_models(client, as_json)
            return
        answer = client.recommend(request)
    if as_json:
        emit(answer_as_dict(answer))
        return
    print_answer(answer)
    print(f"request {answer.request_id}")
    if answer.history_handle:
        print(f"history handle {base64.b64encode(answer.history_handle).decode()}")


def _request(file: IO[str]) -> RecommendRequest:
    return request_of(_json(file.read(), "--request"), "--request")


def _history(file: IO[str]) -> History:
    """Behaviours of a JSON list, of columns in a JSON object, or of one object a line."""
    text = file.read()
    lines = [line for line in text.splitlines() if line.strip()]
    if text.lstrip().startswith("[") or len(lines) == 1:
        data = _json(text, "--history")
    else:
        data = [_json(line, f"--history, line {i}") for i, line in enumerate(lines, 1)]
    if isinstance(data, dict) and "item_id" in data:
        data = [data]
    return request_of({"history": data}, "--history").history


def _json(text: str, where: str) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no value of JSON; leave out what is not known")

    try:
        return json.loads(text, parse_constant=refuse)
    except ValueError as error:
        raise InvalidRequest([Violation(where, f"is not JSON: {error}")]) from None


def _ids(text: str) -> list[ItemId]:
    """Ids from text: integers if all are."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if all(part.removeprefix("-").isdecimal() for part in parts):
        return [int(part) for part in parts]
    return list(parts)


def _weight(text: str) -> tuple[str, float]:
    head, _, weight = text.partition("=")
    try:
        return head, float(weight)
    except ValueError:
        problem = f"{text!r}, expected HEAD=WEIGHT"
        raise click.BadParameter(problem, param_hint="--head-weight") from None


def _show_models(client: Client, as_json: bool) -> None:
    models = client.list_models()
    if as_json:
        emit(models)
        return
    table(
        ["name", "model", "version", "engines", "items", "heads"],
        [
            [
                model.name + (" (default)" if model.default else ""),
                version.model,
                version.version + (" (active)" if version.active else ""),
                _pairs(version.engines),
                version.catalogue_size,
                ", ".join(version.heads),
            ]
            for model in models
            for version in model.versions
        ],
    )


def _pairs(values: Mapping[Task, str]) -> str:
    return ", ".join(f"{task}: {value}" for task, value in values.items())
