"""Configuration: precedence, origins, and errors that say all at once."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from gr_core.config import PROFILES, Config, template
from gr_core.errors import ConfigurationError


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(text: str) -> Path:
    file = Path("gr.toml")
    file.write_text(text)
    return file


def problems_of(text: str = "", **environ: str) -> str:
    write(text)
    with pytest.raises(ConfigurationError) as caught:
        Config.load(environ=environ)
    return str(caught.value)


def test_flags_before_environment_before_file_before_profile() -> None:
    write('profile = "testing"\n[batching]\nmax_batch_size = 2\n[limits]\nmax_k = 7\n')
    environ = {"GR_BATCHING__MAX_BATCH_SIZE": "3", "GR_BATCHING__LENGTH_RATIO": "4"}
    config = Config.load(flags={"batching.length_ratio": 5.0}, environ=environ)
    expected = {
        ("batching", "length_ratio"): (5.0, "flag batching.length_ratio"),
        ("batching", "max_batch_size"): (3, "environment variable GR_BATCHING__MAX_BATCH_SIZE"),
        ("limits", "max_k"): (7, "gr.toml"),
        ("batching", "max_queue"): (64, "profile testing"),
        ("limits", "max_candidates"): (10_000, "default"),
    }
    for (section, field), (value, origin) in expected.items():
        assert getattr(getattr(config, section), field) == value
        assert config.origin(section, field) == origin


def test_the_file_is_found_by_flag_then_variable_then_name(tmp_path: Path) -> None:
    assert Config.load(environ={}).limits.max_k == 1000
    for name, k in (("gr.toml", 1), ("two.toml", 2), ("three.toml", 3)):
        tmp_path.joinpath(name).write_text(f"limits.max_k = {k}")
    assert Config.load(environ={}).limits.max_k == 1
    assert Config.load(environ={"GR_CONFIG": "two.toml"}).limits.max_k == 2
    assert Config.load("three.toml", environ={"GR_CONFIG": "two.toml"}).limits.max_k == 3
    with pytest.raises(ConfigurationError, match=r"GR_CONFIG: four\.toml: no such file"):
        Config.load(environ={"GR_CONFIG": "four.toml"})


def test_environment_reaches_lists_free_tables_and_plugins() -> None:
    write('[[models]]\nname = "a"\n[server.grpc]\nport = 1\n')
    config = Config.load(
        environ={
            "GR_MODELS__0__DEVICE": "cuda:1",
            "GR_MODELS__0__VERSIONS": "1.10, 2",
            "GR_MODELS__1__NAME": "7",
            "GR_SERVER__GRPC__PORT": "8080",
            "GR_SERVER__GRPC__HOST": "::1",
            "GR_CACHE__RESULTS__CAPACITY_BYTES": "2 MiB",
            "GR_PLUGINS": "hstu,grpc",
            "GR_DISABLED_PLUGINS": "vllm",
            "GR_PROFILE": "production",
            "GR_CACHE_DIR": "/var/cache/gr",  # read by others, and no mistake
        }
    )
    assert config.models[0].device == "cuda:1"
    assert config.models[0].versions == ("1.10", "2")
    assert config.models[1].name == "7"
    assert config.server == {"grpc": {"port": 8080, "host": "::1"}}
    assert config.cache["results"].capacity_bytes == 2 << 20  # type: ignore[index]
    assert config.plugins.allow == ("hstu", "grpc")
    assert config.plugins.block == ("vllm",)
    assert config.logging.format == "json"


def test_paths_of_a_file_are_relative_to_it(tmp_path: Path) -> None:
    folder = tmp_path / "etc"
    folder.mkdir()
    file = folder / "gr.toml"
    file.write_text('repository.path = "models"')
    assert Config.load(file, environ={}).repository.path == str(folder / "models")
    file.write_text('repository.path = "package:gr_core/models"')
    assert Config.load(file, environ={}).repository.path == "package:gr_core/models"
    config = Config.load(file, environ={"GR_REPOSITORY__PATH": "here"})
    assert config.repository.path == "here"


def test_every_problem_is_named_with_value_expectation_and_origin() -> None:
    text = """
        profile = "testing"
        [batching]
        max_batch_size = 0
        max_quue = 3
        [[models]]
        name = "a"
        device = "CUDA 1"
        [[models]]
        nme = "b"
        [cache.resuts]
        [plugins]
        allow = "x"
    """
    message = problems_of(
        text,
        GR_BATCHING__LENGTH_RATIO="long",
        GR_BATCHING_MAX_QUEUE="4",
        GR_SEVER__GRPC__PORT="1",
        GR_MODELS__5__NAME="x",
    )
    assert message.splitlines()[0] == "the configuration has 11 problems:"
    for expected in (
        "GR_BATCHING_MAX_QUEUE: is not read; write GR_BATCHING__MAX_QUEUE",
        "batching.length_ratio: 'long' (environment variable GR_BATCHING__LENGTH_RATIO): "
        "expected a valid number",
        "batching.max_batch_size: 0 (gr.toml): expected at least 1",
        "batching.max_quue: unknown (gr.toml); did you mean 'max_queue'?",
        "models[0].device: 'CUDA 1' (gr.toml): expected auto, cpu, cuda or cuda:N",
        "models[1].name: missing (gr.toml)",
        "models[1].nme: unknown (gr.toml); did you mean 'name'?",
        "cache.resuts: 'resuts' (gr.toml): expected 'results', 'user_kv' or 'embeddings'",
        "plugins.allow: 'x' (gr.toml): expected a list",
        "models[5].name: 'x' (environment variable GR_MODELS__5__NAME): there is no such place",
        "sever: unknown (environment variable GR_SEVER__GRPC__PORT); did you mean 'server'?",
    ):
        assert expected in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[[models]]\nname="a"\n[[models]]\nname="a"', "models[1].name: 'a' is the name of"),
        (
            '[[pipelines]]\nname="p"',
            "pipelines[0]: names no model; give retrieve, generate, rank, or several",
        ),
        (
            '[[models]]\nname="a"\n[[pipelines]]\nname="p"\nrank="b"',
            "pipelines[0].rank: 'b' is not among the models: a",
        ),
        (
            '[[pipelines]]\nname="p"\nrank="a"\ndefault=true\n'
            '[[pipelines]]\nname="q"\nrank="a"\ndefault=true',
            "only one can be the default, not p, q",
        ),
        ("a = ", "gr.toml: is not valid TOML"),
        ('profile = "prod"', "profile: 'prod' (gr.toml): expected 'development'"),
        ('models = "x"', "models: 'x' (gr.toml): expected a list"),
        ("repository = 3", "repository: 3 (gr.toml): expected a table"),
        ('[[models]]\nname="a/b"', "models[0].name: 'a/b' (gr.toml): expected letters"),
    ],
)
def test_inconsistencies_and_damaged_files(text: str, expected: str) -> None:
    assert expected in problems_of(text)


def test_show_names_origins_and_redacts_secrets() -> None:
    write(
        '[server.grpc]\nauth_token = "hunter2"\ntoken_file = "/run/token"\ntokens = ["hunter2"]\n'
        '[server.grpc.tls]\nkey_password = "hunter2"\nport = 7'
    )
    config = Config.load(environ={"GR_SERVER__HTTP__API_KEY": "hunter2"})
    shown = config.show()
    assert "hunter2" not in shown
    assert shown.count('"***"') == 4
    assert 'server.grpc.token_file = "/run/token"' in shown
    assert "batching.max_batch_tokens = 65536" in shown
    (line,) = [line for line in shown.splitlines() if "tls.port" in line]
    assert line.split() == ["server.grpc.tls.port", "=", "7", "#", "gr.toml"]


def test_a_secret_is_not_in_an_error_either() -> None:
    message = problems_of('[server]\ngrpc_token = "hunter2"')
    assert "server.grpc_token: *** (gr.toml): expected a table" in message
    assert "hunter2" not in message


@pytest.mark.parametrize("profile", PROFILES)
def test_the_template_says_what_is_in_force_anyway(profile: str) -> None:
    text = template(profile)
    in_force = Config.load(flags={"profile": profile}, environ={}).model_dump()
    write(text)
    config = Config.load(environ={})
    assert config.model_dump() == in_force
    assert config.origin("limits", "max_k") == "default"
    # Every example line is a field, with the default as its value.
    uncommented = "\n".join(
        line.removeprefix("# ") if " = " in line or "[" in line.split("  #")[0] else line
        for line in text.splitlines()
    )
    tree = tomllib.loads(uncommented)
    tree["server"], tree["observers"] = {}, {}
    write("")
    for section in ("repository", "plugins", "batching", "limits", "logging"):
        for field, value in tree[section].items():
            shown = in_force[section][field]
            assert value == (list(shown) if isinstance(shown, tuple) else shown)
