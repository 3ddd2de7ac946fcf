"""The group ``gr``: built-in commands and those of plugins, and what becomes of errors."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from typing import Any, ClassVar

import click

from gr_core._version import __version__
from gr_core.builtins import COMMANDS
from gr_core.errors import GrError, InvalidRequest, PluginError, UserError
from gr_core.plugins.descriptors import CommandDescriptor
from gr_core.plugins.host import PluginHost
from gr_core.plugins.registry import Registry, did_you_mean

logger = logging.getLogger(__name__)

MISTAKE, FAULT, INTERRUPTED = 2, 1, 130
"""Exit codes: of the user's mistakes, of our faults, of Ctrl-C."""

_REGISTRY = "gr_core.registry"
"""Where the registry is kept in click's context."""


class Commands(click.Group):
    """Resolves a command when it is called. Plugins are asked only for names not built in."""

    _builtin: ClassVar = {command.name: command for command in COMMANDS}

    def _registry(self, ctx: click.Context) -> Registry:
        """What the plugins offer, discovered once in a run."""
        if _REGISTRY not in ctx.meta:
            # What failed is listed below the commands, or where a command is missing.
            logging.getLogger("gr_core.plugins").setLevel(logging.CRITICAL)
            ctx.meta[_REGISTRY] = PluginHost.discover().registry
        registry: Registry = ctx.meta[_REGISTRY]
        return registry

    def _plugin_commands(self, ctx: click.Context) -> dict[str, CommandDescriptor]:
        declared = self._registry(ctx).commands.declared()
        return {c.name: c for c in declared if c.name not in self._builtin}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self._builtin, *self._plugin_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        descriptor = self._builtin.get(cmd_name) or self._plugin_commands(ctx).get(cmd_name)
        if descriptor is None:
            return None
        command = descriptor.resolve()
        if not isinstance(command, click.Command):
            raise PluginError(
                f"command {cmd_name}: {descriptor.factory} is a {type(command).__name__}, "
                "expected a click.Command"
            )
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name.startswith("-") or self.get_command(ctx, name) is not None:
            return super().resolve_command(ctx, args)
        hint = did_you_mean(name, self.list_commands(ctx))
        failed = self._registry(ctx).troubles
        why = "".join(f"\nPlugin {plugin} failed: {reason}" for plugin, reason in failed.items())
        raise click.UsageError(f"There is no command {name!r}.{hint}{why}", ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in (
            ("Commands", self._builtin),
            ("Commands of plugins", self._plugin_commands(ctx)),
        ):
            if commands:
                with formatter.section(title):
                    formatter.write_dl([(c.name, c.summary) for c in commands.values()])
        if troubles := self._registry(ctx).troubles:
            with formatter.section("Plugins that failed, see `gr plugins list`"):
                formatter.write_dl(list(troubles.items()))


@click.group(
    cls=Commands,
    name="gr",
    help="Serve generative recommenders. Plugins bring the models, engines and servers.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option("--debug", is_flag=True, envvar="GR_DEBUG", help="Show tracebacks and debug logs.")
@click.version_option(__version__, prog_name="gr")
def gr(debug: bool) -> None:
    from gr_core import logs

    logs.setup("debug" if debug else "warning")


def main(arguments: list[str] | None = None) -> None:
    """Runs ``gr`` and exits: 0, 1 for faults and failed checks, 2 for mistakes of the user."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Runs ``gr`` and returns its exit code."""
    debug = "--debug" in arguments or os.environ.get("GR_DEBUG", "") not in ("", "0")
    try:
        result: Any = gr.main(args=arguments, prog_name="gr", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return MISTAKE
    except (KeyboardInterrupt, click.Abort):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away, e.g. `head`; nothing is left to be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAULT
    except GrError as error:
        if debug:
            traceback.print_exc()
        for line in error.violations if isinstance(error, InvalidRequest) else [error]:
            print(f"gr: {line}", file=sys.stderr)
        return MISTAKE if isinstance(error, UserError) else FAULT
    except Exception as error:
        logger.exception("gr %s failed", " ".join(arguments))
        print(f"gr: a fault of ours, {type(error).__name__}: {error}", file=sys.stderr)
        return FAULT
    return result if isinstance(result, int) else 0
