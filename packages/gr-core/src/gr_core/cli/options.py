"""Options that commands share, and what they stand for: the configuration, plugins, models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import click

if TYPE_CHECKING:
    from gr_core.config import Config, ModelSection
    from gr_core.plugins.host import PluginHost
    from gr_core.plugins.registry import Registry
    from gr_core.repository import ModelRepository

P = ParamSpec("P")
R = TypeVar("R")

TASKS = ("retrieve", "rank", "generate")
DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")


class Setup:
    """The configuration as the options say, and what follows from it. Loaded when needed."""

    def __init__(self, file: str | None, flags: Mapping[str, Any]) -> None:
        self._file = file
        self._flags = dict(flags)

    @cached_property
    def config(self) -> Config:
        from gr_core.config import Config

        return Config.load(self._file, flags=self._flags)

    @cached_property
    def host(self) -> PluginHost:
        from gr_core.plugins.host import PluginHost

        plugins = self.config.plugins
        return PluginHost.discover(
            allow=plugins.allow, block=plugins.block, required=plugins.required
        )

    @property
    def registry(self) -> Registry:
        return self.host.registry

    @cached_property
    def repository(self) -> ModelRepository:
        from gr_core.repository import ModelRepository

        return ModelRepository(self.config.repository.path)

    def models(self, names: Sequence[str] = ()) -> Sequence[ModelSection]:
        """How the named models are served; all of the configuration, or of the repository."""
        from gr_core.config import ModelSection

        configured = {model.name: model for model in self.config.models}
        chosen = names or list(configured) or self.repository.names()
        return [configured.get(name) or ModelSection(name=name) for name in chosen]

    def override_models(self, **changes: str | None) -> Setup:
        """Sets fields of every model that is served, e.g. its strategy."""
        given = {field: value for field, value in changes.items() if value is not None}
        if not given:
            return self
        flags = dict(self._flags)
        for index, model in enumerate(self.models()):
            flags[f"models.{index}.name"] = model.name
            flags |= {f"models.{index}.{field}": value for field, value in given.items()}
        return Setup(self._file, flags)


def configured(command: Callable[Concatenate[Setup, P], R]) -> Callable[P, R]:
    """Adds ``--config``, ``--profile``, ``--models``, ``--set``; the command gets a `Setup`."""

    @click.option(
        "--config", "config_file", metavar="FILE", help="Configuration; default: gr.toml."
    )
    @click.option(
        "--profile",
        type=click.Choice(["development", "testing", "production"]),
        help="Set of defaults.",
    )
    @click.option("--models", "folder", metavar="DIR", help="Model repository.")
    @click.option(
        "--set",
        "assignments",
        multiple=True,
        metavar="FIELD=VALUE",
        help="Set a field of the configuration, e.g. batching.max_queue=64.",
    )
    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        flags: dict[str, Any] = {}
        for assignment in _pop(kwargs, "assignments"):
            field, equals, value = assignment.partition("=")
            if not equals:
                raise click.BadParameter(
                    f"{assignment!r}, expected FIELD=VALUE", param_hint="--set"
                )
            flags[field] = value
        for field, value in (
            ("profile", _pop(kwargs, "profile")),
            ("repository.path", _pop(kwargs, "folder")),
        ):
            if value is not None:
                flags[field] = value
        return command(Setup(_pop(kwargs, "config_file"), flags), *args, **kwargs)

    return wrapper


def _pop(kwargs: Any, name: str) -> Any:
    return kwargs.pop(name)


def engine_options(command: Callable[P, R]) -> Callable[P, R]:
    """Adds ``--strategy``, ``--device`` and ``--dtype``."""

    @click.option("--strategy", help="auto, baseline, or the name of an engine.")
    @click.option("--device", help="auto, cpu, cuda, cuda:1, …")
    @click.option("--dtype", type=click.Choice(DTYPES), help="Precision.")
    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        return command(*args, **kwargs)

    return wrapper


def json_option(command: Callable[P, R]) -> Callable[P, R]:
    """Adds ``--json``, passed as ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")(command)
