"""LDA teachers in an SQLite file, ``lda.db``: the schema, reading one, writing one.

A file may hold several projections. Reading goes through ``core.tensors.sqlite_tables``.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import DataInvalid
from core.tensors.lda import LDA, MODES, Mode, check_lda, without_questions
from core.tensors.manifests import check_temperature, check_texts, shown
from core.tensors.shards import Array
from core.tensors.sqlite_tables import Columns, Row, Tables, open_tables

SCHEMA = """\
CREATE TABLE projections (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    num_heads INTEGER NOT NULL,
    dim INTEGER NOT NULL,
    target_dim INTEGER NOT NULL,
    temperature REAL NOT NULL,
    mode TEXT NOT NULL DEFAULT 'answers',
    model TEXT,
    created_at TEXT
);
CREATE TABLE heads (
    projection_id INTEGER NOT NULL REFERENCES projections (id),
    head INTEGER NOT NULL,
    cluster_id TEXT NOT NULL,
    centroid BLOB NOT NULL,
    answer_vector BLOB,
    map BLOB,
    PRIMARY KEY (projection_id, head)
);
CREATE TABLE embeddings (
    projection_id INTEGER NOT NULL REFERENCES projections (id),
    question_id TEXT NOT NULL,
    cluster_id TEXT NOT NULL,
    role TEXT NOT NULL,
    dim INTEGER NOT NULL,
    vector BLOB NOT NULL,
    PRIMARY KEY (projection_id, question_id, role)
);
"""
"""The documented tables (docs/lda.md). Vectors are float32, little-endian, a map row after row;
``mode`` is ``answers`` or ``maps``, ``role`` ``question`` or ``answer``; heads count from 0."""
_KNOWN = {
    "projections": Columns(
        ("id", "name", "num_heads", "dim", "target_dim", "temperature"),
        ("mode", "model", "created_at"),
    ),
    "heads": Columns(("projection_id", "head", "cluster_id", "centroid"), ("answer_vector", "map")),
    "embeddings": Columns(
        ("projection_id", "question_id", "cluster_id", "role", "dim", "vector"), required=False
    ),
}
_ROLES = ("question", "answer")
_FLOAT = np.dtype("<f4")


@dataclass(frozen=True)
class Projection:
    """One row of ``projections``, checked."""

    id: int
    name: str
    heads: int
    dim: int
    target_dim: int
    temperature: float
    mode: Mode
    model: str | None


def load_lda_db(
    path: Path, projection: str | None = None, *, most_heads: int = 20_000, most_dim: int = 16_384
) -> LDA:
    """Read one projection of an lda.db, checked.

    Args:
        path: a closed database.
        projection: its name; None takes the newest: the last ``created_at``, among equal ones (or
            where there are none) the highest id.
        most_heads: of a projection; more are refused.
        most_dim: the same of its widths.

    Returns:
        The model. Where the file has no questions the centroids stand in their place, and the
        manifest says so (``questions``).

    Raises:
        DataInvalid: names table, row and field, what is there and what is needed.
        OSError: there is no such file, or it cannot be read.
    """
    with open_tables(path, _KNOWN) as tables:
        rows = _by_age(tables)
        row = _chosen(rows, projection)
        told = _projection(row, most_heads=most_heads, most_dim=most_dim)
        known = {row["id"] for row in rows}
        for table in ("heads", "embeddings"):
            for value in tables.distinct(table, "projection_id"):
                if value not in known:
                    raise DataInvalid(
                        f"{table}: a row's projection_id is {shown(value)}; no such projection"
                    )
        model = _model(told, tables)
    check_lda(model)
    return model


def projection_names(path: Path) -> list[str]:
    """Return what the projections of an lda.db are called, oldest first; raises as load_lda_db."""
    with open_tables(path, _KNOWN) as tables:
        return [row["name"] for row in _by_age(tables)]


def _by_age(tables: Tables) -> list[Row]:
    rows: list[Row] = []
    for row in tables.rows("projections"):
        where = f"projections: id {shown(row['id'])}"
        _whole(f"{where}: id", row["id"], low=-(2**63))
        _name(f"{where}: name", row["name"])
        if row["created_at"] is not None:
            _text(f"{where}: created_at", row["created_at"])
        if any(row["name"] == other["name"] for other in rows):
            raise DataInvalid(f"{where}: name {shown(row['name'])} is there twice")
        rows.append(row)
        if len(rows) > 1000:
            raise DataInvalid("projections: more than 1000 rows")
    if not rows:
        raise DataInvalid("projections: no rows; needed at least one projection")
    return sorted(rows, key=lambda row: (row["created_at"] or "", row["id"]))


def _chosen(rows: list[Row], name: str | None) -> Row:
    if name is None:
        return rows[-1]
    for row in rows:
        if row["name"] == name:
            return row
    there = ", ".join(shown(row["name"]) for row in rows[-12:])
    raise DataInvalid(
        f"projections: none is called {shown(name)}; there are {there} (the last is the newest)"
    )


def _projection(row: Row, *, most_heads: int, most_dim: int) -> Projection:
    where = f"projections: {shown(row['name'])}"
    mode = "answers" if row["mode"] is None else row["mode"]
    if mode not in MODES:
        raise DataInvalid(f"{where}: mode is {shown(mode)}; allowed: {', '.join(MODES)}")
    try:
        temperature = check_temperature(row["temperature"])
    except DataInvalid as error:
        raise DataInvalid(f"{where}: {error.message}") from error
    return Projection(
        id=row["id"],
        name=row["name"],
        heads=_whole(f"{where}: num_heads", row["num_heads"], low=1, high=most_heads),
        dim=_whole(f"{where}: dim", row["dim"], low=2, high=most_dim),
        target_dim=_whole(f"{where}: target_dim", row["target_dim"], low=2, high=most_dim),
        temperature=temperature,
        mode=mode,
        model=None if row["model"] is None else _name(f"{where}: model", row["model"]),
    )


def _model(told: Projection, tables: Tables) -> LDA:
    ids, centroids, heads = _heads(told, tables)
    manifest: dict[str, Any] = {
        "temperature": told.temperature,
        "projection": told.name,
        "source": "imported",
        **({} if told.model is None else {"embedding_model": told.model}),
    }
    answers, maps = (heads, None) if told.mode == "answers" else (None, heads)
    questions, numbers, targets = _questions(told, tables, ids, answers)
    if not questions:
        return without_questions(
            centroids, answers=answers, maps=maps, cluster_ids=ids, manifest=manifest
        )
    return LDA(
        centroids=centroids,
        answers=answers,
        maps=maps,
        queries=np.stack(questions),
        targets=np.stack(targets),
        cluster_of=np.array(numbers, np.int64),
        cluster_ids=ids,
        train_rows=np.arange(len(questions)),
        held_out_rows=np.zeros(0, np.int64),
        manifest=manifest,
    )


def _heads(told: Projection, tables: Tables) -> tuple[list[str], Array, Array]:
    """Return cluster ids, centroids [N, d] and answers [N, m] or maps [N, d, m]."""
    field = "answer_vector" if told.mode == "answers" else "map"
    shape = (told.target_dim,) if told.mode == "answers" else (told.dim, told.target_dim)
    found: dict[int, tuple[str, Array, Array]] = {}
    for row in tables.rows("heads", projection_id=told.id):
        number = _whole(f"heads: {shown(told.name)}: head", row["head"], low=0, high=told.heads - 1)
        where = f"heads: {shown(told.name)}, head {number}"
        if number in found:
            raise DataInvalid(f"{where}: is there twice")
        found[number] = (
            _text(f"{where}: cluster_id", row["cluster_id"]),
            _vector(f"{where}: centroid", row["centroid"], (told.dim,)),
            _vector(f"{where}: {field}", row[field], shape),
        )
    if len(found) != told.heads:
        raise DataInvalid(
            f"projections: {shown(told.name)}: num_heads is {told.heads}; heads has {len(found)} "
            "rows of it"
        )
    ids, centroids, heads = zip(*(found[number] for number in range(told.heads)), strict=True)
    first = {name: number for number, name in reversed(list(enumerate(ids)))}
    if twice := [number for number, name in enumerate(ids) if first[name] < number]:
        raise DataInvalid(
            f"heads: {shown(told.name)}, head {twice[0]}: cluster_id is {shown(ids[twice[0]])}, as "
            "of a head before it; make them unique"
        )
    return list(ids), np.stack(centroids), np.stack(heads)


def _questions(
    told: Projection, tables: Tables, ids: list[str], answers: Array | None
) -> tuple[list[Array], list[int], list[Array]]:
    """Return the questions' vectors, their heads and their targets, in the order of the table."""
    number_of = {name: number for number, name in enumerate(ids)}
    widths = dict(zip(_ROLES, (told.dim, told.target_dim), strict=True))
    found: dict[str, dict[str, tuple[int, Array]]] = {role: {} for role in _ROLES}
    for row in tables.rows("embeddings", projection_id=told.id):
        name = _text(f"embeddings: {shown(told.name)}: question_id", row["question_id"])
        where = f"embeddings: {shown(told.name)}, question_id {shown(name)}"
        role, cluster_id = row["role"], row["cluster_id"]
        if role not in _ROLES:
            raise DataInvalid(f"{where}: role is {shown(role)}; allowed: {', '.join(_ROLES)}")
        if name in found[role]:
            raise DataInvalid(f"{where}: is there twice with role {role}")
        if cluster_id not in number_of:
            raise DataInvalid(f"{where}: cluster_id is {shown(cluster_id)}; no head has it")
        _whole(f"{where}: dim", row["dim"], low=widths[role], high=widths[role])
        vector = _vector(f"{where}: vector", row["vector"], (widths[role],))
        found[role][name] = number_of[cluster_id], vector
    if alone := sorted(found["answer"].keys() - found["question"].keys()):
        raise DataInvalid(
            f"embeddings: {shown(told.name)}, question_id {shown(alone[0])}: an answer without its "
            "question"
        )
    targets = []
    for name, (number, _) in found["question"].items():
        if name in found["answer"]:
            targets.append(found["answer"][name][1])
        elif answers is not None:
            targets.append(answers[number])
        else:
            raise DataInvalid(
                f"embeddings: {shown(told.name)}, question_id {shown(name)}: no row with role "
                "answer; mode maps needs one a question"
            )
    numbers = [number for number, _ in found["question"].values()]
    return [vector for _, vector in found["question"].values()], numbers, targets


def _whole(where: str, value: Any, *, low: int, high: int = 2**63 - 1) -> int:
    if type(value) is int and low <= value <= high:
        return value
    needed = str(low) if low == high else f"{low} to {high}"
    raise DataInvalid(f"{where} is {shown(value)}; needed a whole number, {needed}")


def _name(where: str, value: Any) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= 200:
        raise DataInvalid(f"{where} is {shown(value)}; needed a text of 1 to 200 letters")
    return _text(where, value)


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataInvalid(f"{where} is {shown(value)}; needed a text")
    check_texts(where, [value])
    return value


def _vector(where: str, value: Any, shape: tuple[int, ...]) -> Array:
    size = int(np.prod(shape))
    if not isinstance(value, bytes) or len(value) != _FLOAT.itemsize * size:
        found = f"{len(value)} bytes" if isinstance(value, bytes) else shown(value)
        raise DataInvalid(
            f"{where} is {found}; needed a BLOB of {_FLOAT.itemsize * size} bytes, {size} float32 "
            "little-endian"
        )
    array = np.frombuffer(value, _FLOAT).astype(np.float32).reshape(shape)
    if not np.isfinite(array).all():
        raise DataInvalid(f"{where} holds NaN or infinity")
    return array


def save_lda_db(path: Path, models: Mapping[str, LDA], *, created_at: str | None = None) -> None:
    """Write an lda.db anew, in place of what was there: each model a projection, in order.

    What an lda.db has no place for is left out: which rows were held out, and how it was fitted.

    Args:
        path: of the file.
        models: by the names of the projections; the last is the newest.
        created_at: of all of them, ISO 8601.

    Raises:
        DataInvalid: a model is invalid, or nothing was given.
        OSError: the disk is full or broken.
    """
    if not models:
        raise DataInvalid("projections: none given; needed at least one model")
    for name, model in models.items():
        _name("projections: name", name)
        check_lda(model)
    made = path.with_name(f"{path.name}.part")
    made.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(made, isolation_level=None)) as database:
            database.executescript(f"PRAGMA journal_mode = OFF; BEGIN; {SCHEMA}")
            for number, (name, model) in enumerate(models.items(), start=1):
                _write(database, number, name, model, created_at)
            database.execute("COMMIT")
        made.replace(path)
    except sqlite3.Error as error:
        raise OSError(f"{path.name} could not be written: {error}") from error
    finally:
        made.unlink(missing_ok=True)


def _write(
    database: sqlite3.Connection, number: int, name: str, model: LDA, created_at: str | None
) -> None:
    facts = model.meta()
    told = facts["clusters"], facts["dim"], facts["target_dim"], facts["temperature"]
    beside = model.mode, model.manifest.get("embedding_model"), created_at
    _insert(database, "projections", [(number, name, *told, *beside)])
    heads = (
        (
            *(number, head, model.cluster_ids[head], _blob(model.centroids[head])),
            None if model.answers is None else _blob(model.answers[head]),
            None if model.maps is None else _blob(model.maps[head]),
        )
        for head in range(facts["clusters"])
    )
    _insert(database, "heads", heads)
    if model.manifest.get("questions") != "centroids":
        _insert(database, "embeddings", _embeddings(number, model))


def _embeddings(number: int, model: LDA) -> Iterable[tuple[Any, ...]]:
    """Yield a row per question, and one per target that is not its head's answer vector."""
    for row, head in enumerate(model.cluster_of.tolist()):
        told = number, str(row), model.cluster_ids[head]
        query, target = model.queries[row], model.targets[row]
        yield (*told, "question", len(query), _blob(query))
        if model.answers is None or not np.array_equal(target, model.answers[head]):
            yield (*told, "answer", len(target), _blob(target))


def _insert(database: sqlite3.Connection, table: str, rows: Iterable[tuple[Any, ...]]) -> None:
    width = len(_KNOWN[table].needed) + len(_KNOWN[table].optional)
    database.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * width)})", rows)


def _blob(array: Array) -> bytes:
    return array.astype(_FLOAT).tobytes()
