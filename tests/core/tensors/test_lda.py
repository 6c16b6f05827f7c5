"""LDA models: their two files give back what was put in, and nothing invalid is written."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from core.errors import DataInvalid
from core.tensors.lda import LDA, Mode, check_lda, load_lda, save_lda, without_questions
from core.tensors.lda_db import SCHEMA, load_lda_db, projection_names, save_lda_db
from core.tensors.shards import load, save
from tests.core.tensors._lda import HEADS, ROWS, same_arrays, some_lda

MODES: tuple[Mode, ...] = get_args(Mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_model_comes_back_and_equal_ones_are_equal_bytes(tmp_path: Path, mode: Mode) -> None:
    for name in ("one", "other"):
        save_lda(tmp_path / name, some_lda(mode))

    back = load_lda(tmp_path / "one")

    check_lda(back)
    same_arrays(back, some_lda(mode))
    np.testing.assert_array_equal(back.train_rows, some_lda().train_rows)
    np.testing.assert_array_equal(back.held_out_rows, [4, 7])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    save_lda(tmp_path / "again", back)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "one").read_bytes()


def test_meta_says_what_a_plan_needs() -> None:
    assert some_lda("maps", manifest={"temperature": 0.5, "pairs": "a" * 64}).meta() == {
        "clusters": 4,
        "dim": 6,
        "target_dim": 5,
        "rows": 11,
        "held_out": 2,
        "temperature": 0.5,
        "mode": "maps",
        "pairs": "a" * 64,
    }


def changed(name: str, at: Any, value: float) -> dict[str, Any]:
    array = getattr(some_lda(), name).copy()
    array[at] = value
    return {name: array}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"maps": some_lda("maps").maps}, "exactly one of the two"),
        ({"answers": None}, "exactly one of the two"),
        (changed("centroids", 2, 0), "centroids: row 2 is all zeros"),
        (changed("answers", (1, 0), np.nan), "answers: row 1 holds NaN"),
        (changed("queries", (3, 1), np.inf), "query_embeddings: row 3 holds NaN or infinity"),
        (changed("cluster_of", 5, 4), "cluster_of: row 5 names head 4; there are 4"),
        (changed("cluster_of", 0, -1), "cluster_of: row 0 names head -1"),
        (changed("held_out_rows", 0, 7), "each row from 0 to 12 once"),
        ({"answers": np.ones((4, 6), np.float32)}, r"answers: .* needed float32 \[4, 5\]"),
        ({"targets": np.ones((10, 5), np.float32)}, r"targets: .* needed float32 \[11, 5\]"),
        ({"queries": np.ones((11, 6))}, "queries: float64 of shape"),
        ({"queries": np.ones((0, 6), np.float32)}, r"rows >= 1"),
        ({"cluster_of": np.zeros(ROWS, np.int32)}, "cluster_of: int32"),
        ({"cluster_ids": ["a", "b", "c"]}, "cluster_ids: 3 entries for 4 heads"),
        ({"cluster_ids": ["a", "b", "a", "d"]}, "cluster_ids: 'a' appears 2 times"),
        ({"cluster_ids": ["a", "b", "c\0", "d"]}, "control character"),
        ({"manifest": {}}, "temperature: None"),
        ({"manifest": {"temperature": -0.1}}, "temperature: -0.1"),
        ({"manifest": {"temperature": 0.1, "clusters": 3}}, "clusters is 3; needed 4"),
        ({"manifest": {"temperature": 0.1, "mode": "maps"}}, "mode is 'maps'; needed 'answers'"),
        ({"manifest": {"temperature": 0.1, "anchor": "none"}}, "'anchor' is not known"),
        ({"manifest": {"temperature": 0.1, "projection": ""}}, "projection is ''; needed a text"),
    ],
)
def test_what_is_no_model_is_refused_and_not_written(
    tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    model = some_lda(**changes)

    with pytest.raises(DataInvalid, match=match):
        save_lda(tmp_path / "model", model)
    with pytest.raises(DataInvalid, match=match):
        save_lda_db(tmp_path / "lda.db", {"lda": model})
    assert not list(tmp_path.iterdir())


def test_a_map_that_is_not_finite_is_refused() -> None:
    maps = some_lda("maps").maps
    assert maps is not None
    maps = maps.copy()
    maps[3, 0, 0] = np.inf
    with pytest.raises(DataInvalid, match="maps: head 3 holds NaN or infinity"):
        check_lda(some_lda("maps", maps=maps))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"version": 2}, "version 2; needed 'lda_model', version 1"),
        ({"format": "federated_model"}, "format 'federated_model'"),
        ({"mode": "sums"}, "mode is 'sums'; allowed: answers, maps"),
        ({"mode": "maps"}, "maps: missing"),
    ],
)
def test_another_file_is_named(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    save_lda(tmp_path / "model", some_lda())
    tensors, manifest = load(tmp_path / "model")
    save(tmp_path / "model", tensors, {**manifest, **changes})
    with pytest.raises(DataInvalid, match=match):
        load_lda(tmp_path / "model")


def stored(model: LDA) -> LDA:
    """What an lda.db has a place for."""
    return replace(model, train_rows=np.arange(ROWS), held_out_rows=np.zeros(0, np.int64))


@pytest.mark.parametrize("mode", MODES)
def test_a_model_comes_back_from_a_database(tmp_path: Path, mode: Mode) -> None:
    manifest = {"temperature": 1 / 3, "embedding_model": "MiniLM"}
    save_lda_db(tmp_path / "lda.db", {"first": some_lda(mode, manifest=manifest)})

    back = load_lda_db(tmp_path / "lda.db")

    same_arrays(back, some_lda(mode, manifest=manifest))
    np.testing.assert_array_equal(back.train_rows, np.arange(ROWS))
    assert back.manifest == {**manifest, "projection": "first", "source": "imported"}
    assert [path.name for path in tmp_path.iterdir()] == ["lda.db"]


def test_the_newest_projection_is_taken_and_a_missing_one_names_those_there(
    tmp_path: Path,
) -> None:
    models = {"old": some_lda(), "new": some_lda("maps")}
    save_lda_db(tmp_path / "lda.db", models)

    assert projection_names(tmp_path / "lda.db") == ["old", "new"]
    assert load_lda_db(tmp_path / "lda.db").mode == "maps"
    assert load_lda_db(tmp_path / "lda.db", "old").mode == "answers"
    with pytest.raises(DataInvalid, match=r"none is called 'newer'; there are 'old', 'new'"):
        load_lda_db(tmp_path / "lda.db", "newer")


@pytest.mark.parametrize("mode", MODES)
def test_without_questions_the_centroids_stand_in(tmp_path: Path, mode: Mode) -> None:
    given = some_lda(mode)
    model = without_questions(
        given.centroids,
        answers=given.answers,
        maps=given.maps,
        cluster_ids=given.cluster_ids,
        manifest={"temperature": 0.03},
    )
    save_lda_db(tmp_path / "lda.db", {"lda": model})

    back = load_lda_db(tmp_path / "lda.db")

    same_arrays(back, model)
    assert back.manifest["questions"] == "centroids"
    np.testing.assert_array_equal(back.queries, given.centroids)
    if given.maps is None:
        np.testing.assert_array_equal(back.targets, given.answers)
    else:
        exact = np.einsum("nd,ndm->nm", given.centroids.astype(float), given.maps.astype(float))
        np.testing.assert_allclose(back.targets, exact, rtol=1e-6, atol=1e-6)
    assert len(back.targets) == HEADS


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    save_lda_db(tmp_path / "lda.db", {"lda": some_lda()})
    before = (tmp_path / "lda.db").read_bytes()

    with pytest.raises(DataInvalid, match="projections: none given"):
        save_lda_db(tmp_path / "lda.db", {})
    with pytest.raises(DataInvalid, match="name is ''; needed a text of 1 to 200 letters"):
        save_lda_db(tmp_path / "lda.db", {"": some_lda()})

    assert (tmp_path / "lda.db").read_bytes() == before


def test_the_documented_schema_is_the_one_written() -> None:
    docs = Path(__file__).parents[3] / "docs" / "lda.md"
    assert f"```sql\n{SCHEMA}```" in docs.read_text()
