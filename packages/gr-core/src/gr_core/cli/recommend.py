"""``gr recommend``: one request through the whole pipeline, without a server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import IO, TYPE_CHECKING

import click

from gr_core.cli.options import TASKS, Setup, configured, engine_options, json_option
from gr_core.cli.output import emit, table

if TYPE_CHECKING:
    from gr_core.config import Config
    from gr_core.plugins.registry import Registry
    from gr_core.types import ItemId, Recommendation, RecommendRequest


@click.command(name="recommend")
@configured
@engine_options
@json_option
@click.option("--model", default="", help="Name of a model or pipeline; default: the default one.")
@click.option("--version", "model_version", default="", help="Version; default: the active one.")
@click.option("--history", metavar="ID,…", default="", help="Items of the history, oldest first.")
@click.option("--candidates", metavar="ID,…", default="", help="Items to rank; default: find some.")
@click.option(
    "--task", type=click.Choice(TASKS), help="One stage alone; default: what the models can."
)
@click.option("-k", type=int, default=None, help="How many items.  [default: 10]")
@click.option(
    "--request", "file", type=click.File("r"), help="A request as JSON; - reads standard input."
)
def recommend(
    setup: Setup,
    strategy: str | None,
    device: str | None,
    dtype: str | None,
    as_json: bool,
    model: str,
    model_version: str,
    history: str,
    candidates: str,
    task: str | None,
    k: int | None,
    file: IO[str] | None,
) -> None:
    """Recommend once, without a server.

    For example: gr recommend --models DIR --history 12,7,42 -k 5
    """
    from gr_core.errors import InvalidRequest, Violation
    from gr_core.json_requests import answer_as_dict, request_of
    from gr_core.types import Candidates, History, RecommendRequest, Task, item_id_array

    request = RecommendRequest(History())
    if file is not None:
        try:
            request = request_of(json.load(file))
        except ValueError as error:
            raise InvalidRequest([Violation("--request", f"is not JSON: {error}")]) from None
    if history:
        now = time.time_ns() // 1_000_000
        items = item_id_array(_ids(history))
        # Without times of their own the behaviours lie a minute apart, the last a minute ago.
        ages = [60_000 * (len(items) - i) for i in range(len(items))]
        past = History(items, item_id_array([now - age for age in ages]))
        request = replace(request, history=past)
    if candidates:
        request = replace(request, candidates=Candidates(item_id_array(_ids(candidates))))
    request = replace(
        request,
        k=k if k is not None else request.k,
        model=model or request.model,
        version=model_version or request.version,
        task=request.task if task is None else Task(task),
    )
    setup = setup.override_models(strategy=strategy, device=device, dtype=dtype)
    answer = asyncio.run(_recommend(_needed(setup, request.model), setup.registry, request))
    if as_json:
        emit(answer_as_dict(answer))
        return
    print_answer(answer)


def _needed(setup: Setup, name: str) -> Config:
    """The configuration without the models that answer to other names, which need no loading."""
    pipelines = tuple(p for p in setup.config.pipelines if p.name == name)
    models = {m for p in pipelines for m in (p.retrieve, p.rank, p.generate) if m} or {name}
    if not models <= {model.name for model in setup.models()}:
        return setup.config
    chosen = tuple(setup.models(sorted(models)))
    return setup.config.model_copy(update={"models": chosen, "pipelines": pipelines})


def _ids(text: str) -> Sequence[ItemId]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return [int(p) for p in parts] if all(p.lstrip("-").isdigit() for p in parts) else parts


async def _recommend(
    config: Config, registry: Registry, request: RecommendRequest
) -> Recommendation:
    from gr_core.pipeline import Pipeline

    pipeline = Pipeline.from_config(config, registry)
    await pipeline.start()
    try:
        return await pipeline.recommend(request)
    finally:
        await pipeline.close()


def print_answer(answer: Recommendation) -> None:
    """The items as a table, then how they came about."""
    heads = list(answer.items[0].head_scores) if answer.items else []
    table(
        ("", "item", "title", "score", *heads),
        [
            (
                rank,
                item.item_id,
                item.title,
                f"{item.score:.4f}",
                *(f"{item.head_scores[head]:.4f}" for head in heads),
            )
            for rank, item in enumerate(answer.items, start=1)
        ],
    )
    for stage in answer.stages:
        reused = f", {stage.tokens_reused} of them reused" if stage.tokens_reused else ""
        print(
            f"{stage.task.value}: {stage.model}/{stage.version} on {stage.engine}, "
            f"{stage.compute_s * 1e3:.1f} ms, {stage.tokens} tokens{reused}"
        )
    print(f"features {answer.features_s * 1e3:.1f} ms, in all {answer.total_s * 1e3:.1f} ms")
    if answer.unknown_items:
        print(f"items of the history that the model does not know: {answer.unknown_items}")
    if answer.unscored_item_ids:
        unknown = ", ".join(map(str, answer.unscored_item_ids))
        print(f"candidates that the model does not know: {unknown}")
