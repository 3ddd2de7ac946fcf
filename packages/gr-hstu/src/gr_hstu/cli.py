"""The command ``gr hstu``: train, evaluate, evaluation-set, import, params.

Heavy imports wait for a command.
"""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click

from gr_core.errors import UserError

if TYPE_CHECKING:
    from gr_hstu.data import Interactions

P = ParamSpec("P")
R = TypeVar("R")


@click.group("hstu")
def hstu() -> None:
    """Train, evaluate and import HSTU and MTGR models, count their parameters."""


def _explained(command: Callable[P, R]) -> Callable[P, R]:
    """Turns a user's mistakes into one message without a traceback."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (ValueError, FileNotFoundError) as error:
            raise UserError(str(error)) from error
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in ("scipy", "sklearn"):
                raise
            raise UserError(
                f"{error.name} is not installed; pip install 'gr-hstu[train]'"
            ) from error

    return wrapper


def _pairs(
    name: str,
) -> Callable[[click.Context, click.Parameter, tuple[str, ...]], dict[str, str]]:
    def parse(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
        out = {}
        for value in values:
            key, equals, rest = value.partition("=")
            if not (key and equals and rest):
                raise click.BadParameter(f"{value!r}, expected {name}")
            out[key] = rest
        return out

    return parse


def _experiment(command: Callable[P, R]) -> Callable[P, R]:
    """Options of whatever trains: which data, which task, how."""
    options = [
        click.option(
            "--data",
            required=True,
            metavar="NAME|PATH",
            help="ml-100k, kuairand-pure, amazon-industrial-sid, or a folder with "
            "interactions.csv.",
        ),
        click.option(
            "--data-dir",
            type=click.Path(path_type=Path),
            help="Where a dataset known by name lies; default ./data, then ../shared/data.",
        ),
        click.option(
            "--task",
            type=click.Choice(["retrieval", "generation", "ranking"]),
            default="retrieval",
            show_default=True,
        ),
        click.option(
            "--head",
            "heads",
            multiple=True,
            metavar="NAME=SIGNAL",
            callback=_pairs("NAME=SIGNAL"),
            help="Ranking head and the binary signal that it predicts; repeatable.",
        ),
        click.option(
            "--set",
            "changes",
            multiple=True,
            metavar="FIELD=VALUE",
            callback=_pairs("FIELD=VALUE"),
            help="Change a setting or training option, e.g. dropout=0.3, max_epochs=5.",
        ),
        click.option(
            "--work",
            type=click.Path(path_type=Path),
            default=Path("runs"),
            show_default=True,
            help="Folder of checkpoints; a run found there is resumed.",
        ),
        click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, …"),
        click.option("--threads", type=click.IntRange(min=1), help="CPU threads of torch."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@hstu.command()
@_experiment
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="NAME/VERSION",
    help="Folder of the new bundle; its last two parts are the model's name and version.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Of the weights on disk.",
)
@click.option(
    "--sasrec", "sasrec", is_flag=True, help="Also train a SASRec for the model card (retrieval)."
)
@click.option(
    "--samples",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Sample requests of real users to put into the bundle; mind the data's licence.",
)
@click.option("--overwrite", is_flag=True, help="Replace the folder if it exists.")
@_explained
def train(data: str, data_dir: Path | None, task: str, out: Path, **options: Any) -> None:
    """Trains a model and writes it as a bundle, its test quality in the model card.

    The best epoch is chosen on validation data; the test data is read once, at the end. Ctrl-C
    stops after the current step, and the same command goes on from there.
    """
    from gr_hstu.training import experiments

    if out.exists() and not options["overwrite"]:
        raise UserError(f"{out}: exists; choose another folder, or say --overwrite")
    command = _reproduction(data, task, out, options)
    interactions = _load(data, data_dir, options.pop("threads"))
    runs: dict[str, Callable[..., Any]] = {
        "retrieval": experiments.train_retrieval,
        "generation": experiments.train_generation,
        "ranking": experiments.train_ranking,
    }
    try:
        bundle, tables = runs[task](interactions, out=out, command=command, **options)
    except KeyboardInterrupt as stopped:
        raise UserError(f"{stopped or 'stopped'}; the same command goes on from there") from None
    for table in tables:
        _print(table)
    click.echo(f"{bundle.path}: {bundle.description}")


@hstu.command()
@_experiment
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How many models of each kind to train, with the seeds 0, 1, …",
)
@click.option(
    "--bundle",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Evaluate this bundle instead of training a model.",
)
@click.option(
    "--sasrec/--no-sasrec", default=True, show_default=True, help="Compare with SASRec (retrieval)."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Also write the tables there as Markdown."
)
@_explained
def evaluate(
    data: str,
    data_dir: Path | None,
    task: str,
    as_json: bool,
    out: Path | None,
    **options: Any,
) -> None:
    """Measures models and baselines on the test data by one evaluator, with intervals over users.

    Models are trained first unless a run in --work is complete or a bundle is given.
    """
    from gr_hstu.training import experiments

    interactions = _load(data, data_dir, options.pop("threads"))
    if task == "ranking":
        options.pop("sasrec")
    runs: dict[str, Callable[..., Any]] = {
        "retrieval": experiments.evaluate_retrieval,
        "generation": experiments.evaluate_generation,
        "ranking": experiments.evaluate_ranking,
    }
    try:
        tables = runs[task](interactions, **options)
    except KeyboardInterrupt as stopped:
        raise UserError(f"{stopped or 'stopped'}; the same command goes on from there") from None
    if out is not None:
        out.write_text("\n\n".join(table.markdown() for table in tables) + "\n", encoding="utf-8")
    if as_json:
        click.echo(json.dumps({table.title: table.values for table in tables}, indent=2))
        return
    for table in tables:
        _print(table)


@hstu.command("evaluation-set")
@click.option(
    "--model",
    "bundle",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="NAME/VERSION",
    help="The bundle whose model is to be evaluated.",
)
@click.option(
    "--data",
    required=True,
    metavar="NAME|PATH",
    help="The data that it was trained on: ml-100k, kuairand-pure, amazon-industrial-sid, or a "
    "folder.",
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Where a dataset known by name lies; default ./data, then ../shared/data.",
)
@click.option(
    "--head",
    "heads",
    multiple=True,
    metavar="NAME=SIGNAL",
    callback=_pairs("NAME=SIGNAL"),
    help="Ranking head and the binary signal that it predicts; repeatable.",
)
@click.option(
    "--users", type=click.IntRange(min=1), default=300, show_default=True, help="At most so many."
)
@click.option(
    "--min-candidates",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Leave out users who were shown fewer items (ranking).",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write; without it the set becomes part of the bundle.",
)
@_explained
def evaluation_set(
    bundle: Path, data: str, data_dir: Path | None, out: Path | None, **options: Any
) -> None:
    """Writes held-out cases as labelled requests, to judge an engine's quality by.

    Without --out the bundle gets them as evaluation.jsonl, and its model card says what they are;
    mind the data's licence.
    """
    from gr_core.repository import Bundle
    from gr_hstu.training import evaluation_sets

    opened = Bundle.open(bundle)
    interactions = _load(data, data_dir, None)
    text, words = evaluation_sets.evaluation_set(opened, interactions, **options)
    if out is not None:
        out.write_text(text, encoding="utf-8")
    else:
        written = ["gr", "hstu", "evaluation-set", "--data", Path(data).name]
        for name, value in options["heads"].items():
            written += ["--head", f"{name}={value}"]
        written += ["--users", str(options["users"]), "--seed", str(options["seed"])]
        if not evaluation_sets.finds_items(opened):
            written += ["--min-candidates", str(options["min_candidates"])]
        written += ["--model", f"{opened.name}/{opened.version}"]
        evaluation_sets.add_to_bundle(opened, text, words, shlex.join(written))
    click.echo(f"{out or bundle}: {words}")


@hstu.command("import")
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path), metavar="PATH")
@click.option(
    "--from",
    "importer",
    required=True,
    type=click.Choice(["meta-research", "meta-ranking"]),
    help="The code that wrote the checkpoint.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="NAME/VERSION",
    help="Folder of the new bundle.",
)
@click.option(
    "--set",
    "values",
    multiple=True,
    metavar="OPTION=VALUE",
    callback=_pairs("OPTION=VALUE"),
    help="What shapes do not tell, e.g. num_heads=2, gin=path/to/file.gin; repeatable.",
)
@click.option(
    "--catalogue",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON lines with the id (and title) of item 1, 2, …; default: the indices themselves.",
)
@click.option("--overwrite", is_flag=True, help="Replace the folder if it exists.")
@_explained
def import_(
    checkpoint: Path,
    importer: str,
    out: Path,
    values: dict[str, str],
    catalogue: Path | None,
    overwrite: bool,
) -> None:
    """Turns a public checkpoint into a bundle.

    A meta-ranking checkpoint holds a stack of layers without embeddings and heads: it becomes a
    folder with config.json and model.safetensors that code can load, not a bundle to serve.
    """
    from gr_hstu.training.imports import import_bundle

    plain = {name: _plain(value) for name, value in values.items()}
    for line in import_bundle(checkpoint, importer, out, plain, catalogue, overwrite):
        click.echo(line)


@hstu.command()
@click.argument("preset", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@_explained
def params(preset: str | None, as_json: bool) -> None:
    """Counts a preset's parameters, dense and embedding apart; lists the presets without a name."""
    from gr_hstu.presets import PRESETS, count_parameters, get_preset

    if preset is None:
        if as_json:
            click.echo(json.dumps({name: p.description for name, p in PRESETS.items()}, indent=2))
            return
        width = max(map(len, PRESETS))
        for name, entry in PRESETS.items():
            click.echo(f"{name:<{width}}  {entry.description}")
        return
    entry = get_preset(preset)
    count = count_parameters(entry)
    if as_json:
        values = {
            "preset": entry.name,
            "dense": count.dense,
            "embedding": count.embedding,
            "total": count.total,
            "tables": [dict(zip(("name", "rows", "width"), t, strict=True)) for t in count.tables],
        }
        click.echo(json.dumps(values, indent=2))
        return
    click.echo(f"{entry.name}: {entry.description}")
    click.echo(f"{'dense':<12}{count.dense:>16,}")
    click.echo(f"{'embedding':<12}{count.embedding:>16,}")
    click.echo(f"{'total':<12}{count.total:>16,}")
    for name, rows, width in count.tables[:12]:
        click.echo(f"  {name}: {rows:,} x {width} = {rows * width:,}")
    if len(count.tables) > 12:
        click.echo(f"  and {len(count.tables) - 12} smaller tables")


def _reproduction(data: str, task: str, out: Path, options: dict[str, Any]) -> str:
    """The command for the model card: what decides the result, and no paths of this machine."""
    words = ["gr", "hstu", "train", "--data", Path(data).name, "--task", task]
    for flag, values in (("--head", options["heads"]), ("--set", options["changes"])):
        for name, value in values.items():
            words += [flag, f"{name}={value}"]
    words += ["--seed", str(options["seed"]), "--dtype", options["dtype"]]
    if options["sasrec"]:
        words.append("--sasrec")
    if options["samples"]:
        words += ["--samples", str(options["samples"])]
    return shlex.join([*words, "--out", "/".join(out.parts[-2:])])


def _load(data: str, data_dir: Path | None, threads: int | None) -> Interactions:
    if threads:
        import torch

        torch.set_num_threads(threads)
    from gr_hstu.data import load

    return load(data, data_dir)


def _plain(value: str) -> Any:
    """A flag's value as JSON where it is some (numbers, true, null), else as text."""
    try:
        return json.loads(value)
    except ValueError:
        return value


def _print(table: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        click.echo(table.markdown() + "\n")
        return
    view = Table(*table.header, title=table.title)
    for row in table.rows:
        view.add_row(*row)
    console.print(view)
