from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

import gr_popularity.plugin
from gr_core import Behaviour, Candidates, History, RecommendRequest
from gr_core.deployment import Environment, ModelSpec
from gr_core.errors import BundleError, UserError
from gr_core.pipeline import Pipeline
from gr_core.plugins.registry import Registry
from gr_core.repository import Bundle, ModelRepository
from gr_popularity.command import cli
from gr_popularity.model import PopularityModel

INTERACTIONS = "user_id,item_id,title\n" + "".join(
    f"{user},{item},Video {item}\n" for item in "abcd" for user in range("dcab".index(item) + 1)
)
"""Four items, watched by 3 (a), 4 (b), 2 (c) and 1 (d) of ten users."""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "interactions.csv").write_text(INTERACTIONS)
    out = tmp_path / "models" / "popular" / "1"
    command = ["fit", str(tmp_path / "interactions.csv"), "--out", str(out)]
    result = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert result.output == f"{out}: Share of 10 interactions with 4 items\n"
    return tmp_path / "models"


@pytest.fixture
async def pipeline(repository: Path):
    plugin = gr_popularity.plugin
    registry = Registry.of(*plugin.gr_register_models(), *plugin.gr_register_engines())
    pipeline = Pipeline(
        ModelRepository(repository), [ModelSpec("popular")], [], Environment(registry)
    )
    await pipeline.start()
    yield pipeline
    await pipeline.close()


async def test_retrieves_the_most_popular_unseen_items(pipeline: Pipeline):
    seen = History.of([Behaviour("a", 1_700_000_000_000), Behaviour("zebra", 1_700_000_000_001)])
    answer = await pipeline.recommend(RecommendRequest(seen, k=2))
    assert [(item.item_id, item.title) for item in answer.items] == [
        ("b", "Video b"),
        ("c", "Video c"),
    ]
    assert [item.score for item in answer.items] == pytest.approx([0.4, 0.2])
    assert answer.unknown_items == 1
    assert answer.stages[0].engine == "popularity"


async def test_ranks_candidates_and_names_those_it_does_not_know(pipeline: Pipeline):
    candidates = Candidates(np.array(["d", "zebra", "a"], object))
    answer = await pipeline.recommend(RecommendRequest(History(), candidates=candidates))
    assert [item.item_id for item in answer.items] == ["a", "d"]
    assert answer.items[0].head_scores == {"recommendation": pytest.approx(0.3)}
    assert list(answer.unscored_item_ids) == ["zebra"]


async def test_k_beyond_the_catalogue_gives_all_items(pipeline: Pipeline):
    answer = await pipeline.recommend(RecommendRequest(History(), k=100))
    assert [item.item_id for item in answer.items] == ["b", "a", "c", "d"]


def test_weights_that_do_not_fit_the_catalogue_are_refused(repository: Path):
    bundle = Bundle.open(repository / "popular" / "1")
    save_file({"shares": np.zeros(3, np.float32)}, bundle.weights_path)
    with pytest.raises(BundleError, match=r"shares: float32 \(3,\), expected float32 \(5,\)"):
        PopularityModel(bundle)
    bundle.weights_path.write_bytes(b"not safetensors")
    with pytest.raises(BundleError, match="no array 'shares'"):
        PopularityModel(bundle)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user,video\n1,2\n", "no column item_id; it has \\['user', 'video'\\]"),
        ("item_id\n", "no interactions"),
        ("item_id,title\n,x\n", "line 2: item_id is empty"),
    ],
)
def test_fit_says_what_is_wrong_with_the_file(tmp_path: Path, text: str, message: str):
    file = tmp_path / "interactions.csv"
    file.write_text(text)
    command = ["fit", str(file), "--out", str(tmp_path / "popular" / "1")]
    with pytest.raises(UserError, match=message):
        CliRunner().invoke(cli, command, catch_exceptions=False)
