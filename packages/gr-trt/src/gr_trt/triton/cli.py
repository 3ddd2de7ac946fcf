"""The command ``gr triton``."""

from __future__ import annotations

from pathlib import Path

import click


@click.group("triton")
def triton() -> None:
    """Work on model repositories of Triton Inference Server."""


@triton.command("add")
@click.argument("exported", type=click.Path(path_type=Path))
@click.argument("repository", type=click.Path(path_type=Path))
def add(exported: Path, repository: Path) -> None:
    """Add what was exported to a repository, as further models or as versions of its models.

    EXPORTED is a folder that `gr export --format triton-repository` wrote. REPOSITORY may be served
    meanwhile: versions appear complete, and the ensembles lead to them at the end.
    """
    from gr_trt.triton.repository import add

    for new in add(exported, repository):
        print(new)
