"""``gr check``: whether this machine can serve, and what to do if it cannot."""

from __future__ import annotations

import logging

import click

from gr_core.cli.options import Setup, configured, json_option
from gr_core.cli.output import emit, table


@click.command(name="check")
@configured
@json_option
def check(setup: Setup, as_json: bool) -> int:
    """Check this machine: versions, devices, plugins, what is missing.

    The exit code is 1 if something is broken or nothing can be served.
    """
    from gr_core.checks import Fact, facts
    from gr_core.errors import GrError

    logging.getLogger("gr_core.plugins").setLevel(logging.CRITICAL)
    found = list(facts(setup.host))
    path = setup.config.repository.path
    try:
        names = setup.repository.names()
    except GrError as error:
        found.append(Fact("serving", "repository", "absent", str(error), "--models DIR"))
    else:
        found.append(Fact("serving", "repository", "ok", f"{path}: {', '.join(names) or 'empty'}"))
    broken = [fact for fact in found if fact.status == "error"]
    if as_json:
        emit({"ok": not broken, "facts": found})
        return 1 if broken else 0
    table(("", "name", "status", "detail"), [(f.area, f.name, f.status, f.detail) for f in found])
    for fact in found:
        if fact.advice and fact.status != "ok":
            print(f"{fact.area} {fact.name}: {fact.advice}")
    return 1 if broken else 0
