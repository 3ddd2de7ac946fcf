"""``gr config``: make, show and validate the configuration."""

from __future__ import annotations

from pathlib import Path

import click

from gr_core.cli.options import Setup, configured, json_option
from gr_core.cli.output import emit


@click.group(name="config")
def config() -> None:
    """Make, show and validate the configuration."""


@config.command()
@click.option(
    "--profile",
    type=click.Choice(["development", "testing", "production"]),
    default="development",
    show_default=True,
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("gr.toml"), show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace the file if it is there.")
def init(profile: str, out: Path, overwrite: bool) -> None:
    """Write a commented file with every field at its default."""
    from gr_core.config import template
    from gr_core.errors import ConfigurationError

    try:
        with out.open("w" if overwrite else "x", encoding="utf-8") as file:
            file.write(template(profile))
    except FileExistsError:
        raise ConfigurationError(f"{out} is there already; say --overwrite to replace it") from None
    except OSError as error:
        raise ConfigurationError(f"{out}: cannot be written: {error.strerror}") from None
    print(f"wrote {out}")


@config.command()
@configured
@json_option
def show(setup: Setup, as_json: bool) -> None:
    """Show what is in force and where each value comes from. Secrets are hidden."""
    if as_json:
        emit(setup.config.entries())
    else:
        print(setup.config.show())


@config.command()
@configured
def validate(setup: Setup) -> None:
    """Check the file, the environment and the flags."""
    print(f"the configuration is valid (profile {setup.config.profile})")
