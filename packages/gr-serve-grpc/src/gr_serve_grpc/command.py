"""The command ``gr call``: a client of a running server."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from gr_core.cli.output import emit, table
from gr_core.errors import InvalidRequest, UserError, Violation
from gr_core.types import (
    Behaviour,
    Candidates,
    History,
    ItemId,
    Recommendation,
    RecommendRequest,
    Task,
    item_id_array,
)
from gr_serve_grpc.client import DEFAULT_TARGET, Client, Tls

PEM = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("call")
@click.option("--target", default=DEFAULT_TARGET, show_default=True, help="HOST:PORT of a server.")
@click.option("--model", default="", help="Name of a model or pipeline; default: the server's.")
@click.option("--version", default="", help="A loaded version; default: the active one.")
@click.option("--task", type=click.Choice(["retrieve", "rank"]), help="Force one stage alone.")
@click.option(
    "--history",
    metavar="FILE",
    help="Past behaviours, a JSON list or one JSON object a line; - reads standard input. "
    'A behaviour: {"item_id": 42, "timestamp_ms": 1700000000000, "is_liked": 1}.',
)
@click.option("--candidates", metavar="ID,ID,…", help="Rank these items instead of retrieving.")
@click.option("--exclude", metavar="ID,ID,…", help="Items that must not be retrieved.")
@click.option("-k", "--k", default=10, show_default=True, help="How many items.")
@click.option("--include-seen", is_flag=True, help="Items of the history may be retrieved again.")
@click.option("--user-id", default="", help="Owner of cached state.")
@click.option("--head-weight", "weights", multiple=True, metavar="HEAD=WEIGHT")
@click.option("--request-id", default="", help="To find the request again in logs.")
@click.option("--timeout", default=10.0, show_default=True, help="Seconds, with all retries.")
@click.option("--list-models", is_flag=True, help="List the models of the server instead.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.option("--tls", is_flag=True, help="Encrypt, with the system's authorities.")
@click.option("--tls-ca", type=PEM, help="Encrypt, with these authorities.")
@click.option("--tls-certificate", type=PEM, help="The client's certificate, for mutual TLS.")
@click.option("--tls-key", type=PEM, help="Its private key.")
@click.option("--token-file", type=PEM, help="File with a bearer token.")
@click.option("--token", envvar="GR_TOKEN", hidden=True)
def call(
    target: str,
    model: str,
    version: str,
    task: str | None,
    history: str | None,
    candidates: str | None,
    exclude: str | None,
    k: int,
    include_seen: bool,
    user_id: str,
    weights: Sequence[str],
    request_id: str,
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

    A bearer token is taken from --token-file or the environment variable GR_TOKEN.
    """
    encrypted = tls or tls_ca is not None or tls_certificate is not None
    if token_file is not None:
        token = token_file.read_text(encoding="utf-8").strip()
    with Client(
        target,
        timeout_s=timeout,
        tls=Tls(tls_ca, tls_certificate, tls_key) if encrypted else None,
        token=token,
    ) as client:
        if list_models:
            _show_models(client, as_json)
            return
        behaviours = read_history(history)
        request = RecommendRequest(
            History.of(behaviours),
            candidates=None if candidates is None else Candidates(item_id_array(_ids(candidates))),
            k=k,
            model=model,
            version=version,
            task=None if task is None else Task(task),
            user_id=user_id,
            include_seen=include_seen,
            exclude_item_ids=item_id_array(_ids(exclude or "")),
            head_weights=dict(map(_weight, weights)),
            request_id=request_id,
        )
        answer = client.recommend(request)
    if as_json:
        emit(answer)
    else:
        _show(answer)


def read_history(source: str | None) -> Sequence[Behaviour]:
    """Behaviours from a file or standard input. Raises `UserError` that names what is wrong."""
    if source is None:
        return []
    where = "standard input" if source == "-" else source
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--history {where}: {error}") from None
    found = list(_json_values(text, where))
    rows = found[0] if len(found) == 1 and isinstance(found[0], list) else found
    wrong: list[Violation] = []
    behaviours = [_behaviour(row, f"{where}[{i}]", wrong) for i, row in enumerate(rows)]
    if wrong:
        raise InvalidRequest(wrong)
    return behaviours


def _json_values(text: str, where: str) -> Iterator[Any]:
    if text.lstrip().startswith("["):
        yield _json(text, where)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield _json(line, f"{where}, line {number}")


def _json(text: str, where: str) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON; leave out what is not known")

    try:
        return json.loads(text, parse_constant=refuse)
    except ValueError as error:
        raise UserError(f"--history {where}: {error}") from None


def _behaviour(row: Any, where: str, wrong: list[Violation]) -> Behaviour:
    nothing = Behaviour(0, 0)
    if not isinstance(row, dict):
        wrong.append(Violation(where, f"{row!r:.40}, expected an object"))
        return nothing
    item_id, time_ms = row.get("item_id"), row.get("timestamp_ms")
    signals = {k: v for k, v in row.items() if k not in ("item_id", "timestamp_ms", "signals")}
    signals |= row.get("signals") or {}
    if not isinstance(item_id, int | str) or isinstance(item_id, bool):
        wrong.append(Violation(f"{where}.item_id", f"{item_id!r:.40}, expected an id"))
    if not isinstance(time_ms, int) or isinstance(time_ms, bool):
        wrong.append(Violation(f"{where}.timestamp_ms", f"{time_ms!r:.40}, expected ms since 1970"))
    known = {name: value for name, value in signals.items() if value is not None}
    for name, value in known.items():
        if not isinstance(value, int | float):
            wrong.append(Violation(f"{where}.{name}", f"{value!r:.40}, expected a number"))
    if wrong:
        return nothing
    assert isinstance(item_id, int | str)
    assert isinstance(time_ms, int)
    return Behaviour(item_id, time_ms, {name: float(value) for name, value in known.items()})


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
        raise click.BadParameter(
            f"{text!r}, expected HEAD=WEIGHT", param_hint="--head-weight"
        ) from None


def _show(answer: Recommendation) -> None:
    heads = list(answer.items[0].head_scores) if answer.items else []
    table(
        ["#", "item", "title", "score", *heads],
        [
            [i, item.item_id, item.title, f"{item.score:.4f}"]
            + [f"{item.head_scores.get(head, float('nan')):.4f}" for head in heads]
            for i, item in enumerate(answer.items, 1)
        ],
    )
    table(
        [
            "stage",
            "model",
            "version",
            "engine",
            "queue ms",
            "compute ms",
            "batch",
            "tokens",
            "reused",
        ],
        [
            [
                s.task,
                s.model,
                s.version,
                s.engine,
                f"{s.queue_s * 1e3:.2f}",
                f"{s.compute_s * 1e3:.2f}",
                s.batch_size,
                s.tokens,
                s.tokens_reused,
            ]
            for s in answer.stages
        ],
    )
    print(f"request {answer.request_id}: {answer.total_s * 1e3:.2f} ms in the server")
    if answer.unknown_items:
        print(f"{answer.unknown_items} behaviours were left out: the model does not know the items")
    if answer.unscored_item_ids:
        print(f"not scored, unknown to the model: {', '.join(map(str, answer.unscored_item_ids))}")


def _show_models(client: Client, as_json: bool) -> None:
    models = client.list_models()
    if as_json:
        emit(models)
        return
    table(
        ["name", "version", "answers with", "engines", "items", "heads"],
        [
            [
                model.name + (" (default)" if model.default else ""),
                f"{version.version}" + (" (active)" if version.active else ""),
                version.model,
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
