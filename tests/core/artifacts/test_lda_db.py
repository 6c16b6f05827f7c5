"""Uploaded LDA teachers: sound ones come in, hostile databases are refused and run nothing."""

import random
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.artifacts.limits import MIB, Limits
from core.distill.lda import MultiHeadLDA
from core.errors import DataInvalid, StillroomError
from core.tensors.formats import load_pairs
from core.tensors.lda import check_lda, load_lda, save_lda
from core.tensors.lda_db import load_lda_db
from core.tensors.shards import load, save
from tests.core.artifacts.conftest import Reader, read_here, read_sandboxed
from tests.core.artifacts.federated_files import npz
from tests.core.artifacts.lda_databases import SMALL as SMALL_SCRIPT
from tests.core.artifacts.lda_databases import SPOILT, database, of_schema
from tests.core.tensors._lda import same_arrays, some_lda

LIMITS = Limits(memory_bytes=1024 * MIB, cpu_seconds=20, wall_seconds=60)


@pytest.mark.parametrize("mode", ["answers", "maps"])
def test_an_uploaded_database_becomes_a_model(sandboxed: Reader, mode: Any) -> None:
    found = sandboxed(database(mode), file_name="my lda.db", limits=LIMITS)

    assert (found.format, found.file_name) == ("lda_model", "my lda.safetensors")
    model = load_lda(found.path)
    check_lda(model)
    same_arrays(model, some_lda(mode))
    assert found.meta == model.meta()
    assert found.notes == []
    assert model.manifest["projection"] == "lda"


def test_an_own_model_comes_back_byte_for_byte(sandboxed: Reader, tmp_path: Path) -> None:
    save_lda(tmp_path / "model", some_lda("maps"))
    data = (tmp_path / "model").read_bytes()

    found = sandboxed(data)

    assert found.format == "lda_model"
    assert found.path.read_bytes() == data
    assert found.meta["mode"] == "maps"


def test_a_model_that_is_not_true_is_refused(here: Reader, tmp_path: Path) -> None:
    save_lda(tmp_path / "model", some_lda())
    tensors, manifest = load(tmp_path / "model")
    tensors["centroids"][1] = np.nan
    save(tmp_path / "model", tensors, manifest)
    with pytest.raises(DataInvalid, match="centroids: row 1 holds NaN"):
        here((tmp_path / "model").read_bytes())


def test_other_projections_and_missing_questions_are_noted(here: Reader) -> None:
    second = [
        "INSERT INTO projections SELECT 2, 'older', 4, 6, 5, 0.5, 'answers', NULL, NULL",
        "INSERT INTO heads SELECT 2, head, cluster_id, centroid, answer_vector, NULL FROM heads",
        "UPDATE projections SET created_at = '2026-01-01' WHERE id = 1",
        "UPDATE projections SET created_at = '2025-01-01' WHERE id = 2",
        "DELETE FROM embeddings",
    ]

    found = here(database(after=second))

    assert found.notes == [
        "projection 'lda' was taken, the newest; 1 other(s) left out: 'older'",
        "no questions in the file: the centroids stand in their place, with the answers of their "
        "heads as targets",
    ]
    assert found.meta["rows"] == 4
    assert found.meta["temperature"] == 0.03


def test_the_least_a_database_must_hold(here: Reader) -> None:
    script = """
    CREATE TABLE projections (id, name, num_heads, dim, target_dim, temperature, mood);
    CREATE TABLE heads (projection_id, head, cluster_id, centroid, answer_vector);
    CREATE TABLE notes (text);
    INSERT INTO projections VALUES (7, 'p', 1, 2, 2, 1, 'good');
    INSERT INTO heads VALUES (7, 0, 'a', x'0000803f00000000', x'000000000000803f');
    """
    model = load_lda(here(of_schema(script)).path)

    np.testing.assert_array_equal(model.centroids, [[1, 0]])
    np.testing.assert_array_equal(model.answers, [[0, 1]])
    assert model.temperature == 1


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_database_is_refused_with_its_place(name: str, tmp_path: Path) -> None:
    data, match = SPOILT[name]

    with pytest.raises(DataInvalid, match=match):
        read_here(data, tmp_path)
    (tmp_path / "lda.db").write_bytes(data)
    with pytest.raises(DataInvalid, match=match):
        MultiHeadLDA.load(tmp_path / "lda.db")


@pytest.mark.parametrize("name", ["a view", "a trigger", "a generated column", "half a file"])
def test_the_sandbox_refuses_it_too_and_keeps_nothing(name: str, tmp_path: Path) -> None:
    data, match = SPOILT[name]

    with pytest.raises(DataInvalid, match=match):
        read_sandboxed(data, tmp_path, limits=LIMITS)
    assert not list((tmp_path / "work").iterdir())


def test_one_page_shown_as_many_rows_is_refused(tmp_path: Path) -> None:
    """Every interior cell of a table's root is bent to the same leaf: rows without end."""
    path = tmp_path / "lda.db"
    path.write_bytes(of_schema(SMALL_SCRIPT))
    with closing(sqlite3.connect(path, isolation_level=None)) as opened:
        rows = [(1, str(row), "a", "question", 2, b"\0\0\x80?" * 2) for row in range(3000)]
        opened.execute("BEGIN")
        opened.executemany("INSERT INTO embeddings VALUES (?, ?, ?, ?, ?, ?)", rows)
        opened.execute("COMMIT")
        [root] = opened.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'embeddings'"
        ).fetchone()
    data = bytearray(path.read_bytes())
    page = (root - 1) * 4096
    assert data[page] == 5, "an interior page"
    cells = int.from_bytes(data[page + 3 : page + 5], "big")
    for cell in range(cells):
        at = page + int.from_bytes(data[page + 12 + 2 * cell : page + 14 + 2 * cell], "big")
        data[at : at + 4] = data[page + 8 : page + 12]
    path.write_bytes(data)

    with pytest.raises(DataInvalid, match=r"is there twice|damaged"):
        load_lda_db(path)


def test_what_waits_in_a_wal_is_told(tmp_path: Path) -> None:
    (tmp_path / "lda.db").write_bytes(database())
    (tmp_path / "lda.db-wal").write_bytes(b"something")
    with pytest.raises(DataInvalid, match=r"lda.db-wal: holds what is not in the database yet"):
        load_lda_db(tmp_path / "lda.db")


def test_reading_changes_nothing_and_takes_any_path(tmp_path: Path) -> None:
    folder = tmp_path / "a % b? #c"
    folder.mkdir()
    path = folder / "lda.db"
    path.write_bytes(database())
    path.chmod(0o400)
    folder.chmod(0o500)

    same_arrays(load_lda_db(path), some_lda())

    folder.chmod(0o700)
    assert [found.name for found in folder.iterdir()] == ["lda.db"]
    assert path.read_bytes() == database()


SOUND = {mode: database(mode) for mode in ("answers", "maps")}  # type: ignore[arg-type]
CHANGES = st.lists(
    st.tuples(st.floats(0, 0.9999), st.binary(min_size=1, max_size=6)), min_size=1, max_size=4
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(SOUND)), CHANGES, st.floats(0.02, 1))
def test_any_mutation_gives_a_model_or_our_error(
    mode: str, changes: list[tuple[float, bytes]], kept: float
) -> None:
    data = SOUND[mode]
    for place, new in changes:
        at = int(place * len(data))
        data = data[:at] + new + data[at + len(new) :]
    data = data[: max(100, int(len(data) * kept))] if kept < 0.5 else data
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = read_here(data, Path(folder), limits=LIMITS)
        except StillroomError:
            return
        check_lda(load_lda(found.path))


def test_of_damaged_databases_nothing_but_data_invalid_comes(tmp_path: Path) -> None:
    """Most bytes are changed in the schema, whose words SQLite puts into its own messages."""
    path, chance, refused = tmp_path / "lda.db", random.Random(0), 0
    for turn in range(800):
        data = bytearray(SOUND["maps" if turn % 2 else "answers"])
        end = 4096 if turn % 4 else len(data)
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(100, end)] = chance.randrange(256)
        path.write_bytes(data)
        try:
            load_lda_db(path)
        except DataInvalid:
            refused += 1
    assert refused > 300


def test_a_schema_that_is_no_text_is_told_as_damage(tmp_path: Path) -> None:
    path, row = tmp_path / "lda.db", b"tableheadsheads"
    data = database()
    assert row in data
    path.write_bytes(
        data.replace(row, b"tableh\xff\xfedsheads").replace(b"E heads (", b"E heads  ")
    )
    with pytest.raises(DataInvalid, match=r"database lda\.db is truncated or damaged \(.*decode"):
        load_lda_db(path)


QUESTIONS = {
    "query_embeddings": np.eye(5, 4, dtype=np.float32) + 1,
    "query_cluster": np.array([0, 1, 1, 2, 0]),
    "answer_embeddings": np.eye(3, 4, dtype=np.float32),
    "cluster_ids": np.array(["x", "y", "z"]),
}


def test_questions_by_cluster_become_pairs(sandboxed: Reader) -> None:
    found = sandboxed(npz(QUESTIONS), file_name="qa.npz")

    assert found.format == "pairs"
    assert found.meta == {"rows": 5, "dim": 4, "groups": 3}
    pairs = load_pairs(found.path)
    assert pairs.groups == ["x", "y", "y", "z", "x"]
    assert pairs.ids == ["0", "1", "2", "3", "4"]
    np.testing.assert_array_equal(pairs.targets, QUESTIONS["answer_embeddings"][[0, 1, 1, 2, 0]])
    assert found.notes == [
        "the target of a question is its cluster's answer; its group is the cluster's id",
        "no ids in the file: row numbers are used",
    ]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"query_cluster": np.array([0, 1, 1, 3, 0])}, "query_cluster: row 3 names 3; there are 3"),
        ({"query_cluster": np.array([0, -1, 1, 2, 0])}, "query_cluster: row 1 names -1"),
        ({"query_cluster": np.zeros(5)}, "query_cluster: float64"),
        ({"query_cluster": np.zeros(4, int)}, r"query_cluster: int64 of shape \[4\]"),
        ({"answer_embeddings": np.ones(3)}, r"beside answer_embeddings \[3\]"),
        ({"answer_embeddings": np.ones((3, 5))}, "both must be the same"),
        ({"cluster_ids": np.array(["x", "y", "x"])}, "needed 3 different ones"),
        ({"cluster_ids": np.array(["x", "y"])}, "cluster_ids: 2 entries"),
    ],
)
def test_questions_that_do_not_fit_are_refused(here: Reader, changes: Any, match: str) -> None:
    with pytest.raises(DataInvalid, match=match):
        here(npz({**QUESTIONS, **changes}))


def test_targets_win_over_answers_which_are_then_left_out(here: Reader) -> None:
    found = here(npz({**QUESTIONS, "target_embeddings": np.ones((5, 4))}))

    np.testing.assert_array_equal(load_pairs(found.path).targets, np.ones((5, 4)))
    assert "ignored, no such field: query_cluster" in found.notes
