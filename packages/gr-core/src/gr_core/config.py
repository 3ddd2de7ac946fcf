"""Configuration: one TOML file, environment variables and flags, over the defaults of a profile.

Flags come before the environment, the environment before the file, the file before the profile.
The file is ``--config``, else ``GR_CONFIG``, else ``gr.toml`` in the working directory. A variable
names its field with two underscores between sections: ``GR_BATCHING__MAX_QUEUE=64``,
``GR_SERVER__GRPC__PORT=8080``, ``GR_MODELS__0__DEVICE=cuda``.
"""

from __future__ import annotations

import difflib
import itertools
import json
import os
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
)
from pydantic_core import ErrorDetails

from gr_core.batcher import BatchingOptions
from gr_core.contracts import CacheKind
from gr_core.errors import ConfigurationError, Violation
from gr_core.histories import CAPACITY_BYTES
from gr_core.plugins.host import ALLOW_VARIABLE, BLOCK_VARIABLE
from gr_core.validation import Limits

DEFAULT_FILE = "gr.toml"
CONFIG_VARIABLE = "GR_CONFIG"
PREFIX = "GR_"

FieldPath = tuple[str | int, ...]

_SIZE = re.compile(r"(\d+)\s*(KiB|MiB|GiB)?")
_UNITS = {None: 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_SECRET = re.compile(r"token|secret|password|credential|api_?key", re.IGNORECASE)
_PLACE = re.compile(r"_(file|path)$", re.IGNORECASE)


def _bytes(value: object) -> object:
    if isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        return int(match[1]) * _UNITS[match[2]]
    return value


Bytes = Annotated[int, BeforeValidator(_bytes)]


def parse_bytes(field: str, value: object) -> int:
    """A number of bytes, or text such as ``"4GiB"``, of a plugin's options; else ValueError."""
    size = _bytes(value)
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise ValueError(f'{field}: {value!r}, expected a number of bytes, or text like "4GiB"')
    return size


def _matching(pattern: str, expected: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"expected {expected}")
        return value

    return AfterValidator(check)


Name = Annotated[str, _matching(r"\w[\w.-]{,127}", "letters, digits, '.', '_' and '-'")]
Device = Annotated[str, _matching(r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda or cuda:N")]
Dtype = Literal["auto", "float32", "bfloat16", "float16", "int8"]
ProfileName = Literal["development", "testing", "production"]


class Section(BaseModel):
    """A table of the file. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RepositorySection(Section):
    """Where the models are."""

    path: str = Field(
        default="models", description="Folder of name/version/ bundles, or package:module/folder."
    )
    poll_seconds: float = Field(
        default=1.0,
        ge=0,
        le=86400,
        description="How often to look for newly activated versions; 0: never.",
    )


class PluginsSection(Section):
    """Which of the installed plugins are used."""

    allow: tuple[str, ...] = Field(
        default=(), description="Use only these (GR_PLUGINS); empty: all."
    )
    block: tuple[str, ...] = Field(
        default=(), description="Never import these (GR_DISABLED_PLUGINS)."
    )
    required: tuple[str, ...] = Field(
        default=(), description="Refuse to start if one of these is broken."
    )


class ModelSection(Section):
    """A model of the repository that is to be served. Without any, all of them are."""

    name: Name = Field(description="Its folder in the repository.")
    versions: tuple[str, ...] = Field(
        default=(),
        description="Versions kept loaded; empty: the active one, followed as it changes.",
    )
    strategy: str = Field(
        default="auto", description="auto, baseline (torch eager), or an engine's name."
    )
    device: Device = Field(default="auto", description="auto, cpu, cuda, cuda:1, …")
    dtype: Dtype = Field(default="auto", description="auto: the engine's default.")
    threads: int = Field(
        default=0, ge=0, le=1024, description="CPU threads; 0: the engine's choice."
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Options that only the engine knows."
    )


class PipelineSection(Section):
    """A name that requests may give, and the models that answer it stage by stage."""

    name: Name = Field(description="What requests give as their model.")
    retrieve: str = Field(default="", description="Model that retrieves from its catalogue.")
    rank: str = Field(default="", description="Model that ranks.")
    generate: str = Field(
        default="",
        description="Model that generates; finds items without retrieve, or where asked to.",
    )
    retrieve_k: int = Field(
        default=100, ge=1, le=100_000, description="How many items are found to rank."
    )
    rerank: bool = Field(
        default=True,
        description="Whether found items are ranked; false: given candidates only.",
    )
    default: bool = Field(
        default=False, description="Whether it answers requests that name no model."
    )


_BATCHING = BatchingOptions()
_LIMITS = Limits()


class BatchingSection(Section):
    """The queue and the batches before each engine."""

    max_batch_size: int = Field(
        default=_BATCHING.max_batch_size, ge=1, le=65536, description="Requests in a batch."
    )
    max_batch_tokens: int = Field(
        default=_BATCHING.max_batch_tokens, ge=1, description="Padded tokens in a batch."
    )
    max_queue: int = Field(
        default=_BATCHING.max_queue,
        ge=1,
        le=1_000_000,
        description="Waiting requests; more: refused.",
    )
    length_ratio: float = Field(
        default=_BATCHING.length_ratio,
        ge=1,
        description="Longest over shortest of a batch, at most.",
    )


class CacheSection(Section):
    """A cache, by what it holds."""

    cache: str = Field(
        default="auto",
        description='Name of the cache plugin; "auto": one that can hold it, "off": none.',
    )
    capacity_bytes: Bytes = Field(
        default=256 << 20, ge=1, description='Bound, e.g. 1048576 or "256MiB".'
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Options that only the plugin knows."
    )


class HistoriesSection(Section):
    """Histories kept for users who return and send only what is new."""

    capacity_bytes: Bytes = Field(
        default=CAPACITY_BYTES, ge=0, description='Bound, e.g. "256MiB"; 0: none are kept.'
    )


class LimitsSection(Section):
    """What a request may ask for; more is refused as invalid."""

    max_history: int = Field(
        default=_LIMITS.max_history, ge=1, description="Behaviours in a history."
    )
    max_candidates: int = Field(
        default=_LIMITS.max_candidates, ge=1, description="Candidates to rank."
    )
    max_k: int = Field(default=_LIMITS.max_k, ge=1, description="Items to return.")


class LoggingSection(Section):
    """Logs go to standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="From here up."
    )
    format: Literal["text", "json"] = Field(default="text", description="json: one object a line.")


@dataclass(frozen=True, slots=True)
class Entry:
    """One value of the configuration, for people."""

    path: str
    value: Any
    """Redacted if it is a secret."""
    origin: str
    """A file, a variable, a flag, a profile, or ``default``."""


class Config(Section):
    """Everything that can be configured. `Config.load` reads it."""

    profile: ProfileName = Field(
        default="development", description="Set of defaults: development, testing or production."
    )
    repository: RepositorySection = RepositorySection()
    plugins: PluginsSection = PluginsSection()
    models: tuple[ModelSection, ...] = ()
    pipelines: tuple[PipelineSection, ...] = ()
    batching: BatchingSection = BatchingSection()
    cache: dict[CacheKind, CacheSection] = Field(default_factory=dict)
    histories: HistoriesSection = HistoriesSection()
    limits: LimitsSection = LimitsSection()
    server: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Settings of each protocol, as its plugin documents them."
    )
    observers: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Observers to use, each with its settings."
    )
    logging: LoggingSection = LoggingSection()

    _origins: dict[FieldPath, str] = PrivateAttr(default_factory=dict)

    @staticmethod
    def load(
        path: str | Path | None = None,
        *,
        flags: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Config:
        """Reads, merges and checks everything.

        ``flags`` maps dotted fields (``server.grpc.port``, ``models.0.device``) to values; a value
        of the type str is read as from the environment. Raises `ConfigurationError` that lists
        every problem with its field, value, what was expected, and where it came from.
        """
        environ = os.environ if environ is None else environ
        merged = _Merged()
        file = _find(path, environ)
        if file is not None:
            merged.add_file(file)
        merged.add_environment(environ)
        for name, value in (flags or {}).items():
            merged.set(_field(name), value, f"flag {name}")
        merged.add_profile_defaults()
        return merged.config()

    def origin(self, *path: str | int) -> str:
        """Where a value came from, e.g. ``config.origin("batching", "max_queue")``."""
        return _origin(self._origins, path)

    def entries(self) -> Sequence[Entry]:
        """All values with their origins, secrets redacted."""
        return [
            Entry(_shown(path), "***" if _is_secret(path, value) else value, self.origin(*path))
            for path, value in _leaves(self.model_dump(mode="json"))
        ]

    def show(self) -> str:
        """All values, one a line as ``path = value  # origin``, secrets redacted."""
        entries = self.entries()
        lines = [f"{e.path} = {json.dumps(e.value, ensure_ascii=False)}" for e in entries]
        width = min(max(map(len, lines)), 60)
        return "\n".join(
            f"{line:<{width}}  # {entry.origin}" for line, entry in zip(lines, entries, strict=True)
        )


PROFILES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "development": {},
    "testing": {
        "repository": {"poll_seconds": 0.0},
        "batching": {"max_queue": 64},
        "logging": {"level": "warning"},
    },
    "production": {
        "repository": {"poll_seconds": 10.0},
        "batching": {"max_queue": 1024},
        "logging": {"format": "json"},
    },
}
"""What each profile changes of the defaults."""


# ── Reading and merging ───────────────────────────────────────────────────────────────────────


class _Merged:
    """A tree of raw values, the origin of each leaf, and the problems found so far."""

    def __init__(self) -> None:
        self.tree: dict[str, Any] = {}
        self.origins: dict[FieldPath, str] = {}
        self.problems: list[Violation] = []

    def add_file(self, file: Path) -> None:
        try:
            with file.open("rb") as stream:
                tree = tomllib.load(stream)
        except OSError as error:
            raise ConfigurationError(f"{file}: cannot be read: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{file}: is not valid TOML: {error}") from None
        repository = tree.get("repository")
        where = repository.get("path") if isinstance(repository, dict) else None
        if isinstance(where, str) and not where.startswith("package:"):
            # A path in a file is relative to that file.
            tree["repository"]["path"] = str(file.parent / Path(where).expanduser())
        self.tree = tree
        self.origins = {path: str(file) for path, _ in _leaves(tree)}

    def add_environment(self, environ: Mapping[str, str]) -> None:
        aliases = {ALLOW_VARIABLE: "plugins.allow", BLOCK_VARIABLE: "plugins.block"}
        for variable, raw in sorted(environ.items()):
            if not variable.startswith(PREFIX):
                continue
            rest = variable.removeprefix(PREFIX).lower()
            if variable in aliases:
                path = _field(aliases[variable])
            elif "__" in rest or rest == "profile":
                path = _field(rest.replace("__", "."))
            else:
                self._check_misspelled(variable, rest)
                continue
            self.set(path, raw, f"environment variable {variable}")

    def _check_misspelled(self, variable: str, rest: str) -> None:
        """Notices one underscore where two are meant."""
        for section in Config.model_fields:
            field = rest.removeprefix(f"{section}_")
            if field != rest and field in _keys(_annotation((section,))):
                right = f"{PREFIX}{section}__{field}".upper()
                self.problems.append(Violation(variable, f"is not read; write {right}"))

    def add_profile_defaults(self) -> None:
        name = self.tree.get("profile", "development")
        for section, values in PROFILES.get(name, {}).items() if isinstance(name, str) else ():
            for key, value in values.items():
                table = self.tree.setdefault(section, {})
                if isinstance(table, dict) and key not in table:
                    table[key] = value
                    self.origins[section, key] = f"profile {name}"

    def set(self, path: FieldPath, value: Any, origin: str) -> None:
        """Puts a value at its place, making the tables on the way to it."""
        if isinstance(value, str):
            value = _read(value, _annotation(path))
        node: Any = self.tree
        for part, following in itertools.pairwise(path):
            node = _child(node, part, [] if isinstance(following, int) else {})
            if node is None:
                break
        if node is None or _child(node, path[-1], value) is None:
            self.problems.append(Violation(_shown(path), f"{value!r} ({origin}): {_NO_PLACE}"))
            return
        node[path[-1]] = value
        for old in [p for p in self.origins if p[: len(path)] == path]:
            del self.origins[old]
        for leaf, _ in _leaves(value, path):
            self.origins[leaf] = origin

    def config(self) -> Config:
        try:
            config = Config.model_validate(self.tree)
        except ValidationError as error:
            problems = [self._explain(e) for e in error.errors(include_url=False)]
        else:
            problems = list(_inconsistencies(config))
            if not problems and not self.problems:
                # An empty table says nothing of the fields in it: they keep their defaults.
                said = {path for path, value in _leaves(self.tree) if value != {}}
                config._origins.update({p: o for p, o in self.origins.items() if p in said})
                return config
        problems += self.problems
        lines = [str(p) for p in sorted(problems, key=lambda p: p.field)]
        if len(lines) == 1:
            raise ConfigurationError(f"the configuration is wrong: {lines[0]}")
        listing = "".join(f"\n  {line}" for line in lines)
        raise ConfigurationError(f"the configuration has {len(lines)} problems:{listing}")

    def _explain(self, error: ErrorDetails) -> Violation:
        path = tuple(part for part in error["loc"] if part != "[key]")
        origin = _origin(self.origins, path)
        if error["type"] == "extra_forbidden":
            known = _keys(_annotation(path[:-1]))
            close = difflib.get_close_matches(str(path[-1]), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"
            return Violation(_shown(path), f"unknown ({origin}); {hint}")
        if error["type"] == "missing":
            return Violation(_shown(path), f"missing ({_origin(self.origins, path[:-1])})")
        context = error.get("ctx", {})
        expected = _EXPECTED.get(error["type"], "").format(**context) or (
            error["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        )
        value = "***" if _is_secret(path, error["input"]) else repr(error["input"])
        return Violation(_shown(path), f"{value:.80} ({origin}): {expected}")


_NO_PLACE = "there is no such place; the entries of a list are numbered from 0 without gaps"
_EXPECTED = {
    "tuple_type": "expected a list",
    "dict_type": "expected a table",
    "model_type": "expected a table",
    "greater_than_equal": "expected at least {ge}",
    "less_than_equal": "expected at most {le}",
}
"""What pydantic says in the words of Python, in the words of TOML."""


def _find(path: str | Path | None, environ: Mapping[str, str]) -> Path | None:
    given = path or environ.get(CONFIG_VARIABLE)
    if given:
        file = Path(given).expanduser()
        if not file.is_file():
            source = "--config" if path else CONFIG_VARIABLE
            raise ConfigurationError(f"{source}: {file}: no such file; `gr config init` makes one")
        return file
    default = Path(DEFAULT_FILE)
    return default if default.is_file() else None


def _field(name: str) -> FieldPath:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))


def _child(node: Any, part: str | int, default: Any) -> Any:
    """The child of a table or list, made if it is absent and may be; None if there is no place."""
    if isinstance(node, dict) and isinstance(part, str):
        return node.setdefault(part, default)
    if isinstance(node, list) and isinstance(part, int) and part <= len(node):
        if part == len(node):
            node.append(default)
        return node[part]
    return None


def _read(text: str, annotation: Any) -> Any:
    """A value from text: TOML where anything or a collection may stand, else left to pydantic."""
    origin = typing.get_origin(annotation)
    if origin is tuple and not text.lstrip().startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    if annotation is Any or origin in (tuple, dict):
        try:
            return tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            return text
    return text


def _annotation(path: FieldPath) -> Any:
    """The declared type of a field; None if there is no such field."""
    annotation: Any = Config
    for part in path:
        while typing.get_origin(annotation) is Annotated:
            annotation = typing.get_args(annotation)[0]
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            field = annotation.model_fields.get(str(part))
            annotation = field.annotation if field else None
        elif origin is dict:
            annotation = arguments[1]
        elif origin is tuple and isinstance(part, int):
            annotation = arguments[0]
        elif annotation is not Any:
            return None
    return annotation


def _keys(annotation: Any) -> list[str]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return list(annotation.model_fields)
    return []


def _leaves(value: Any, path: FieldPath = ()) -> Iterator[tuple[FieldPath, Any]]:
    """Values by their path; lists of plain values count as values, empty tables as leaves."""
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from _leaves(child, (*path, key))
    elif isinstance(value, list) and any(isinstance(child, dict) for child in value):
        for index, child in enumerate(value):
            yield from _leaves(child, (*path, index))
    else:
        yield path, value


def _origin(origins: Mapping[FieldPath, str], path: FieldPath) -> str:
    """Of the value itself, of the list or table that it stands in, or of what stands in it."""
    for length in range(len(path), 0, -1):
        if path[:length] in origins:
            return origins[path[:length]]
    inside = {origin for leaf, origin in origins.items() if leaf[: len(path)] == path}
    return ", ".join(sorted(inside)) if inside and path else "default"


def _shown(path: FieldPath) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def _is_secret(path: FieldPath, value: Any) -> bool:
    """Numbers and switches are none: ``max_batch_tokens`` is no secret."""
    names = [part for part in path if isinstance(part, str)]
    return (
        bool(value)
        and not isinstance(value, int | float)
        and any(_SECRET.search(n) and not _PLACE.search(n) for n in names)
    )


def _inconsistencies(config: Config) -> Iterator[Violation]:
    """What is wrong between fields."""
    for section in ("models", "pipelines"):
        seen: dict[str, int] = {}
        for index, entry in enumerate(getattr(config, section)):
            if entry.name in seen:
                first = f"{section}[{seen[entry.name]}]"
                yield Violation(
                    f"{section}[{index}].name", f"{entry.name!r} is the name of {first} already"
                )
            seen.setdefault(entry.name, index)
    names = [model.name for model in config.models]
    for index, pipeline in enumerate(config.pipelines):
        where = f"pipelines[{index}]"
        if not pipeline.retrieve and not pipeline.rank and not pipeline.generate:
            yield Violation(where, "names no model; give retrieve, generate, rank, or several")
        for stage in ("retrieve", "rank", "generate"):
            model = getattr(pipeline, stage)
            if model and names and model not in names:
                yield Violation(
                    f"{where}.{stage}", f"{model!r} is not among the models: {', '.join(names)}"
                )
    defaults = [p.name for p in config.pipelines if p.default]
    if len(defaults) > 1:
        yield Violation("pipelines", f"only one can be the default, not {', '.join(defaults)}")


# ── A new file ────────────────────────────────────────────────────────────────────────────────


def template(profile: str) -> str:
    """A commented file with every field at its default; it says what the profile says anyway."""
    lines = [
        "# Configuration of gr. Every line that is commented out shows a default.",
        "# `gr config show` prints what is in force, and where each value comes from.",
        "",
        f"profile = {json.dumps(profile)}  # development, testing or production",
    ]
    for name, field in Config.model_fields.items():
        annotation = field.annotation
        if name == "profile":
            continue
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        if isinstance(annotation, type) and issubclass(annotation, Section):
            lines += ["", f"[{name}]  # {_about(annotation)}"]
            lines += _fields(annotation, PROFILES[profile].get(name, {}))
        elif origin is tuple:
            lines += ["", f"# {_about(arguments[0])}", f"# [[{name}]]", *_fields(arguments[0], {})]
        elif arguments[1] is CacheSection:
            kinds = ", ".join(kind.value for kind in CacheKind)
            lines += ["", f"# {_about(CacheSection)} Kinds: {kinds}.", f"# [{name}.results]"]
            lines += _fields(CacheSection, {})
        else:
            lines += ["", f"# {field.description}", f"# [{name}.NAME]"]
    return "\n".join(lines) + "\n"


def _about(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").strip().splitlines()[0]


def _fields(section: type[BaseModel], changed: Mapping[str, Any]) -> Iterator[str]:
    for name, field in section.model_fields.items():
        if typing.get_origin(field.annotation) is dict:
            continue
        value = "…" if field.is_required() else changed.get(name, field.get_default())
        shown = json.dumps(value, ensure_ascii=False)
        yield f"# {name} = {shown}  # {field.description}"
