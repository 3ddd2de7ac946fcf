"""What the plugin registers. Imports gr_core alone; the rest loads when it is needed."""

from __future__ import annotations

from collections.abc import Iterable

from gr_core import CommandDescriptor, EngineDescriptor, ModelDescriptor, Task, hookimpl

TASKS = (Task.RETRIEVE, Task.RANK)


@hookimpl
def gr_register_models() -> Iterable[ModelDescriptor]:
    return [
        ModelDescriptor(
            name="popularity",
            factory="gr_popularity.model:PopularityModel",
            tasks=TASKS,
            formats=("numpy",),
            summary="Recommends what most people watched",
        )
    ]


@hookimpl
def gr_register_engines() -> Iterable[EngineDescriptor]:
    return [
        EngineDescriptor(
            name="popularity",
            factory="gr_popularity.engine:PopularityEngine",
            formats=("numpy",),
            tasks=TASKS,
            devices=("cpu",),
            dtypes=("float32",),
            architectures=("popularity",),
            summary="Looks scores up in an array",
        )
    ]


@hookimpl
def gr_register_commands() -> Iterable[CommandDescriptor]:
    return [
        CommandDescriptor(
            name="popularity",
            factory="gr_popularity.command:cli",
            summary="Make a model from a file of interactions",
        )
    ]
