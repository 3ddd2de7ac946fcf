"""What ``gr hstu train`` and ``gr hstu evaluate`` do, without the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file
from torch import nn

from gr_core.repository import Bundle
from gr_core.types import Task
from gr_hstu.config import HSTUConfig, MTGRConfig, SemanticIdConfig
from gr_hstu.data.interactions import Interactions
from gr_hstu.evaluation.report import Table, ranking_table, retrieval_table
from gr_hstu.evaluation.retrieval import RetrievalResult
from gr_hstu.models import build_model
from gr_hstu.models.semantic_ids import HSTUSemanticIds
from gr_hstu.training import bundles, settings
from gr_hstu.training.generation_task import GenerationTask
from gr_hstu.training.loop import Options, Progress
from gr_hstu.training.progress import ConsoleReporter
from gr_hstu.training.ranking_task import RankingTask
from gr_hstu.training.retrieval_task import RetrievalTask
from gr_hstu.training.samples import sample_requests

Settings = TypeVar(
    "Settings",
    settings.RetrievalSettings,
    settings.GenerationSettings,
    settings.RankingSettings,
)

OURS = {"hstu": "HSTU", "mtgr": "MTGR"}
GENERATED = "HSTU, semantic ids"


def train_retrieval(
    data: Interactions,
    *,
    out: Path,
    command: str,
    work: Path,
    seed: int,
    device: str,
    dtype: str,
    sasrec: bool,
    samples: int,
    overwrite: bool,
    changes: Mapping[str, str],
    heads: Mapping[str, str],
) -> tuple[Bundle, list[Table]]:
    """Trains HSTU for retrieval, measures it once on the test data, writes the bundle."""
    _no_heads(heads)
    task = RetrievalTask(data, _changed(settings.retrieval_settings(data), changes))
    model, progress = _trained_retrieval(task, "hstu", seed, work, device)
    model.cpu()
    bundles.round_weights(model, bundles.DTYPES[dtype])
    results = {"HSTU": [task.test(task.scorer(model))]}
    if sasrec:
        other, _ = _trained_retrieval(task, "sasrec", seed, work, device)
        results["SASRec"] = [task.test(task.scorer(other))]
    results |= {name: [task.test(make())] for name, make in task.baselines().items()}
    table = retrieval_table(_title(data, "retrieval", len(task.split.test)), results, "HSTU")
    card = bundles.card(
        f"HSTU retrieval, {data.name}",
        data=data,
        facts={
            "architecture": "HSTU, research variant (arXiv 2402.17152)",
            "catalogue": f"{len(task.catalogue)} items",
            "parameters": f"{_count(model):,}",
            "trained": _trained(progress, task.settings.options, seed),
            "protocol": task.split.description,
        },
        tables=[table],
        notes=[
            "The models are trained on the training part alone; baselines with validation rows "
            "have seen more.",
            "Intervals: bootstrap over users, 1,000 resamples.",
            *_time_notes(data),
        ],
        command=command,
    )
    bundle = bundles.write(
        out,
        model,
        architecture="hstu",
        tasks=(Task.RETRIEVE, Task.RANK),
        catalogue=task.catalogue,
        schema=task.schema,
        data=data,
        description=f"HSTU retrieval trained on {data.name}",
        card=card,
        dtype=bundles.DTYPES[dtype],
        samples=sample_requests(data, task.split.test, samples) if samples else "",
        overwrite=overwrite,
    )
    return bundle, [table]


def evaluate_retrieval(
    data: Interactions,
    *,
    work: Path,
    seeds: int,
    device: str,
    bundle: Path | None,
    sasrec: bool,
    changes: Mapping[str, str],
    heads: Mapping[str, str],
) -> list[Table]:
    """Measures HSTU (or a bundle), SASRec and the counting baselines on the test data."""
    _no_heads(heads)
    task = RetrievalTask(data, _changed(settings.retrieval_settings(data), changes))
    results: dict[str, Sequence[RetrievalResult]] = {}
    if bundle is not None:
        results["HSTU"] = [task.test(task.scorer(_opened(bundle, task.catalogue.ids)))]
    else:
        results["HSTU"] = _tested(task, "hstu", seeds, work, device)
    if sasrec:
        results["SASRec"] = _tested(task, "sasrec", seeds, work, device)
    results |= {name: [task.test(make())] for name, make in task.baselines().items()}
    return [retrieval_table(_title(data, "retrieval", len(task.split.test)), results, "HSTU")]


def train_generation(
    data: Interactions,
    *,
    out: Path,
    command: str,
    work: Path,
    seed: int,
    device: str,
    dtype: str,
    sasrec: bool,
    samples: int,
    overwrite: bool,
    changes: Mapping[str, str],
    heads: Mapping[str, str],
) -> tuple[Bundle, list[Table]]:
    """Trains HSTU over semantic ids, measures it once on the test data, writes the bundle."""
    _no_heads(heads)
    _no_sasrec(sasrec)
    task = GenerationTask(data, _changed(settings.generation_settings(data), changes))
    model, progress = _trained_generation(task, seed, work, device)
    model.cpu()
    bundles.round_weights(model, bundles.DTYPES[dtype])
    table = _generation_table(task, [task.test(task.scorer(model))])
    config = task.config()
    card = bundles.card(
        f"HSTU over semantic ids, {data.name}",
        data=data,
        facts={
            "architecture": "HSTU, research variant, over codes of items (TIGER, arXiv 2305.05065)",
            "catalogue": f"{len(task.catalogue)} items",
            "codes": ", ".join(map(str, config.code_sizes)) + " by level",
            "parameters": f"{_count(model):,}",
            "trained": _trained(progress, task.settings.options, seed),
            "protocol": task.split.description,
            "search": f"beam width {config.beam_width}, more where more items are asked for",
        },
        tables=[table],
        notes=[
            "The model is trained on the training part alone; baselines with validation rows have "
            "seen more.",
            "Intervals: bootstrap over users, 1,000 resamples.",
        ],
        command=command,
    )
    bundle = bundles.write(
        out,
        model,
        architecture="hstu-sid",
        tasks=(Task.GENERATE,),
        catalogue=task.catalogue,
        schema=task.schema,
        data=data,
        description=f"HSTU over semantic ids trained on {data.name}",
        card=card,
        dtype=bundles.DTYPES[dtype],
        samples=sample_requests(data, task.split.test, samples) if samples else "",
        overwrite=overwrite,
    )
    return bundle, [table]


def evaluate_generation(
    data: Interactions,
    *,
    work: Path,
    seeds: int,
    device: str,
    bundle: Path | None,
    sasrec: bool,
    changes: Mapping[str, str],
    heads: Mapping[str, str],
) -> list[Table]:
    """Measures HSTU over semantic ids (or a bundle) and the counting baselines on the test data."""
    _no_heads(heads)
    task = GenerationTask(data, _changed(settings.generation_settings(data), changes))
    models: list[Any] = []
    if bundle is not None:
        models.append(_opened(bundle, task.catalogue.ids))
    else:
        models += [_trained_generation(task, seed, work, device)[0] for seed in range(seeds)]
    return [_generation_table(task, [task.test(task.scorer(model)) for model in models])]


def _generation_table(task: GenerationTask, ours: Sequence[RetrievalResult]) -> Table:
    results = {GENERATED: ours}
    results |= {name: [task.test(make())] for name, make in task.baselines().items()}
    title = _title(task.data, "generation", len(task.split.test))
    return retrieval_table(title, results, GENERATED)


def train_ranking(
    data: Interactions,
    *,
    out: Path,
    command: str,
    work: Path,
    seed: int,
    device: str,
    dtype: str,
    sasrec: bool,
    samples: int,
    overwrite: bool,
    changes: Mapping[str, str],
    heads: Mapping[str, str],
) -> tuple[Bundle, list[Table]]:
    """Trains a ranker, measures it once on the test data, writes the bundle."""
    _no_sasrec(sasrec)
    task = RankingTask(data, _changed(settings.ranking_settings(data, heads), changes))
    model, progress = _trained_ranking(task, seed, work, device)
    model.cpu()
    bundles.round_weights(model, bundles.DTYPES[dtype])
    name = OURS[task.settings.model]
    table = _ranking_table(task, name, model)
    card = bundles.card(
        f"{name} ranking, {data.name}",
        data=data,
        facts={
            "architecture": (
                "MTGR (arXiv 2505.18654)"
                if task.settings.model == "mtgr"
                else "HSTU, ranking variant (arXiv 2402.17152)"
            ),
            "catalogue": f"{len(task.catalogue)} items",
            "heads": ", ".join(f"{h} ({label})" for h, label in task.settings.heads.items()),
            "user features": ", ".join(f.name for f in task.schema.user) or "none",
            "context features": ", ".join(f.name for f in task.schema.context) or "none",
            "item features": ", ".join(f.name for f in task.item_features) or "none",
            "parameters": f"{_count(model):,}",
            "trained": _trained(progress, task.settings.options, seed),
            "protocol": task.split.description,
        },
        tables=[table],
        notes=[
            "GAUC: mean AUC of users who show both outcomes, weighted by impressions. NE: log loss "
            "over that of a constant. Intervals: bootstrap over users, 1,000 resamples.",
            "The logistic regression reads all that the model reads but the history; its second "
            "form also reads aggregates of the history.",
            *_ranking_notes(task),
            *_time_notes(data),
        ],
        command=command,
    )
    bundle = bundles.write(
        out,
        model,
        architecture=task.settings.model,
        tasks=(Task.RANK,),
        catalogue=task.catalogue,
        schema=task.schema,
        data=data,
        description=f"{name} ranking trained on {data.name}",
        card=card,
        dtype=bundles.DTYPES[dtype],
        head_weights=task.settings.head_weights,
        samples=sample_requests(data, task.split.test, samples) if samples else "",
        overwrite=overwrite,
    )
    return bundle, [table]


def evaluate_ranking(
    data: Interactions,
    *,
    work: Path,
    seeds: int,
    device: str,
    bundle: Path | None,
    changes: Mapping[str, str],
    heads: Mapping[str, str],
) -> list[Table]:
    """Measures a ranker (or a bundle) and the baselines on the test data, a table a seed."""
    task = RankingTask(data, _changed(settings.ranking_settings(data, heads), changes))
    name = OURS[task.settings.model]
    if bundle is not None:
        return [_ranking_table(task, name, _opened(bundle, task.catalogue.ids))]
    tables = []
    for seed in range(seeds):
        model, _ = _trained_ranking(task, seed, work, device)
        suffix = f", seed {seed}" if seeds > 1 else ""
        tables.append(_ranking_table(task, name, model, suffix))
    return tables


def _ranking_table(task: RankingTask, name: str, model: Any, suffix: str = "") -> Table:
    test = task.split.test
    return ranking_table(
        _title(task.data, "ranking", len(test)) + suffix,
        task.label_NH[test.row_C],
        task.data.user_N[test.row_C],
        task.settings.heads,
        {name: task.test(model), **task.baselines()},
        name,
    )


def _trained_retrieval(
    task: RetrievalTask, kind: str, seed: int, work: Path, device: str
) -> tuple[Any, Progress]:
    model = task.new_model(kind, seed).to(device)
    options = replace(task.settings.options, seed=seed)
    folder = work / f"{task.data.name}-retrieval-{kind}-{seed}"
    with ConsoleReporter() as reporter:
        reporter.console.print(f"{folder}: {_count(model):,} parameters", highlight=False)
        return model, task.train(model, kind, options, folder, reporter)


def _tested(
    task: RetrievalTask, kind: str, seeds: int, work: Path, device: str
) -> list[RetrievalResult]:
    out = []
    for seed in range(seeds):
        model, _ = _trained_retrieval(task, kind, seed, work, device)
        out.append(task.test(task.scorer(model)))
    return out


def _trained_generation(
    task: GenerationTask, seed: int, work: Path, device: str
) -> tuple[HSTUSemanticIds, Progress]:
    model = task.new_model(seed).to(device)
    options = replace(task.settings.options, seed=seed)
    folder = work / f"{task.data.name}-generation-{seed}"
    with ConsoleReporter() as reporter:
        reporter.console.print(f"{folder}: {_count(model):,} parameters", highlight=False)
        return model, task.train(model, options, folder, reporter)


def _trained_ranking(task: RankingTask, seed: int, work: Path, device: str) -> tuple[Any, Progress]:
    model = task.new_model(seed).to(device)
    options = replace(task.settings.options, seed=seed)
    folder = work / f"{task.data.name}-ranking-{task.settings.model}-{seed}"
    with ConsoleReporter() as reporter:
        reporter.console.print(f"{folder}: {_count(model):,} parameters", highlight=False)
        return model, task.train(model, options, folder, reporter)


def _opened(path: Path, ids: Any) -> nn.Module:
    """The module of a bundle made for this very catalogue."""
    bundle = Bundle.open(path)
    if list(bundle.catalogue().ids) != list(ids):
        raise ValueError(f"{path}: its catalogue is not the dataset's")
    model: nn.Module
    if bundle.architecture == "hstu-sid":
        model = HSTUSemanticIds(SemanticIdConfig.from_dict(bundle.config))
    else:
        kind = MTGRConfig if bundle.architecture == "mtgr" else HSTUConfig
        model = build_model(kind.from_dict(bundle.config))
    own = model.state_dict()
    state = load_file(bundle.weights_path)
    model.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in state.items()})
    return model.eval()


def _changed(base: Settings, changes: Mapping[str, str]) -> Settings:
    """Settings with fields of theirs, or of their training options, replaced by flags."""
    own = {f.name: getattr(base, f.name) for f in fields(base)}
    options = {f.name: getattr(base.options, f.name) for f in fields(Options)}
    mine: dict[str, Any] = {}
    training: dict[str, Any] = {}
    for name, text in changes.items():
        values, target = (options, training) if name in options else (own, mine)
        current = values.get(name)
        if not isinstance(current, (bool, int, float, str)) or name == "seed":
            plain = sorted(
                n
                for n, v in (own | options).items()
                if isinstance(v, (bool, int, float, str)) and n != "seed"
            )
            raise ValueError(f"--set {name}: not a setting; there are {', '.join(plain)}")
        try:
            target[name] = (
                text in ("true", "1") if isinstance(current, bool) else type(current)(text)
            )
        except ValueError:
            raise ValueError(f"--set {name}={text}: expected a value like {current!r}") from None
    return replace(base, options=replace(base.options, **training), **mine)


def _title(data: Interactions, task: str, cases: int) -> str:
    return f"{data.name}, {task}, {cases:,} test cases"


def _trained(progress: Progress, options: Options, seed: int) -> str:
    return (
        f"seed {seed}, {progress.epoch} epochs, the best by validation "
        f"({progress.best_metric:.4f}) was epoch {progress.best_epoch}; learning rate "
        f"{options.learning_rate}"
    )


def _time_notes(data: Interactions) -> list[str]:
    if data.timed_N is None:
        return []
    return [
        "Behaviours of the weeks before have no time of their own in the data; each carries the "
        "time of the last of them, an upper bound. Their order is real, their gaps are unknown."
    ]


def _ranking_notes(task: RankingTask) -> list[str]:
    notes = []
    if "returns_next_day" in task.settings.heads.values():
        notes.append(
            "retention is whether the log shows the user again on the next calendar day. The log "
            "is a sample, so its rate is a lower bound; it hardly depends on the item, so its GAUC "
            "says little. It is not known for the last day, which does not count."
        )
    if task.data.name == "kuairand-pure":
        notes.append("The data has no label of money spent, so there is no monetization head.")
        notes.append(
            "earlier_* item features are counted in the weeks before the first training event."
        )
    return notes


def _no_heads(heads: Mapping[str, str]) -> None:
    if heads:
        raise ValueError("--head is for --task ranking")


def _no_sasrec(sasrec: bool) -> None:
    if sasrec:
        raise ValueError("--sasrec compares retrieval models; it is for --task retrieval")


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
