"""Databases of LDA teachers, sound and hostile, for the tests of reading them."""

from __future__ import annotations

import sqlite3
import struct
import tempfile
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import numpy as np

from core.tensors.lda import Mode
from core.tensors.lda_db import SCHEMA, save_lda_db
from tests.core.tensors._lda import some_lda

NAN = struct.pack("<f", float("nan"))


def database(mode: Mode = "answers", *, after: Iterable[str] = ()) -> bytes:
    """A sound database, then whatever statements spoil it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lda.db"
        save_lda_db(path, {"lda": some_lda(mode)})
        with closing(sqlite3.connect(path, isolation_level=None)) as opened:
            for statement in after:
                opened.execute(statement)
        return path.read_bytes()


def of_schema(script: str) -> bytes:
    """A database of any schema."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lda.db"
        with closing(sqlite3.connect(path, isolation_level=None)) as opened:
            opened.executescript(script)
        return path.read_bytes()


def without(table: str) -> bytes:
    return database(after=[f"DROP TABLE {table}"])


VALUES = f"""
INSERT INTO projections VALUES (1, 'lda', 1, 2, 2, 0.1, 'answers', NULL, NULL);
INSERT INTO heads VALUES (1, 0, 'a', x'{np.ones(2, "<f4").tobytes().hex()}',
                          x'{np.ones(2, "<f4").tobytes().hex()}', NULL);
"""
SMALL = SCHEMA + VALUES

SPOILT: dict[str, tuple[bytes, str]] = {
    "a view": (
        database(after=["CREATE VIEW v AS SELECT randomblob(1000000000)"]),
        r"'v' \('view'\) is more than a plain table",
    ),
    "a view in place of a table": (
        database(after=["ALTER TABLE heads RENAME TO h", "CREATE VIEW heads AS SELECT * FROM h"]),
        r"'heads' \('view'\) is more than a plain table",
    ),
    "a trigger": (
        database(
            after=["CREATE TRIGGER t AFTER INSERT ON heads BEGIN SELECT load_extension('x'); END"]
        ),
        r"'t' \('trigger'\)",
    ),
    "a virtual table": (
        database(after=["CREATE VIRTUAL TABLE f USING fts5(body)"]),
        r"'f' \('table'\) is more than a plain table",
    ),
    "a view that says it is a table": (
        database(
            after=[
                "CREATE VIEW v AS SELECT 1",
                "PRAGMA writable_schema = ON",
                "UPDATE sqlite_master SET type = 'table' WHERE name = 'v'",
            ]
        ),
        "'v'|damaged",
    ),
    "a generated column": (
        of_schema(
            SCHEMA.replace("map BLOB", "map BLOB AS (zeroblob(900000000))")
            + "INSERT INTO projections VALUES (1, 'lda', 1, 2, 2, 0.1, 'maps', NULL, NULL);"
        ),
        "heads.map is generated",
    ),
    "no tables": (
        of_schema("CREATE TABLE notes (text TEXT)"),
        "no table projections, heads; .*'no",
    ),
    "no heads": (without("heads"), "no table heads"),
    "no temperature": (
        database(after=["ALTER TABLE projections DROP COLUMN temperature"]),
        "projections has no column temperature",
    ),
    "no projection": (
        database(after=["DELETE FROM projections"]),
        "projections: no rows",
    ),
    "a negative temperature": (
        database(after=["UPDATE projections SET temperature = -0.1"]),
        "projections: 'lda': temperature: -0.1; needed a finite number > 0",
    ),
    "a temperature of text": (
        database(after=["UPDATE projections SET temperature = 'warm'"]),
        "projections: 'lda': temperature: 'warm'",
    ),
    "an infinite temperature": (
        database(after=["UPDATE projections SET temperature = 9e999"]),
        "temperature: inf",
    ),
    "an unknown mode": (
        database(after=["UPDATE projections SET mode = 'sums'"]),
        "mode is 'sums'; allowed: answers, maps",
    ),
    "maps that are not there": (
        database(after=["UPDATE projections SET mode = 'maps'"]),
        "heads: 'lda', head 0: map is None; needed a BLOB of 120 bytes, 30 float32",
    ),
    "more heads told": (
        database(after=["UPDATE projections SET num_heads = 5"]),
        "num_heads is 5; heads has 4 rows",
    ),
    "fewer heads told": (
        database(after=["UPDATE projections SET num_heads = 3"]),
        "head is 3; needed a whole number, 0 to 2",
    ),
    "a billion heads told": (
        database(after=["UPDATE projections SET num_heads = 1000000000"]),
        "num_heads is 1000000000; needed a whole number, 1 to 20000",
    ),
    "a wide dim told": (
        database(after=["UPDATE projections SET dim = 1000000000"]),
        "dim is 1000000000; needed a whole number, 2 to 16384",
    ),
    "a dim of text": (
        database(after=["UPDATE projections SET dim = 'six'"]),
        "projections: 'lda': dim is 'six'",
    ),
    "a short centroid": (
        database(after=["UPDATE heads SET centroid = x'00000000' WHERE head = 2"]),
        "heads: 'lda', head 2: centroid is 4 bytes; needed a BLOB of 24 bytes, 6 float32",
    ),
    "a huge centroid": (
        database(after=["UPDATE heads SET centroid = zeroblob(3000000) WHERE head = 1"]),
        "head 1: centroid is 3000000 bytes",
    ),
    "text for a vector": (
        database(after=["UPDATE heads SET answer_vector = '1, 2, 3, 4, 5' WHERE head = 1"]),
        "head 1: answer_vector is '1, 2, 3, 4, 5'; needed a BLOB",
    ),
    "no vector": (
        database(after=["UPDATE heads SET answer_vector = NULL WHERE head = 3"]),
        "head 3: answer_vector is None",
    ),
    "NaN in a vector": (
        database(after=[f"UPDATE heads SET centroid = x'{(NAN * 6).hex()}' WHERE head = 0"]),
        "head 0: centroid holds NaN",
    ),
    "a zero centroid": (
        database(after=["UPDATE heads SET centroid = zeroblob(24) WHERE head = 3"]),
        "centroids: row 3 is all zeros",
    ),
    "a cluster twice": (
        database(after=["UPDATE heads SET cluster_id = 'csv'"]),
        "heads: 'lda', head 1: cluster_id is 'csv', as of a head before it",
    ),
    "a cluster with a control character": (
        database(after=["UPDATE heads SET cluster_id = 'a' || char(27) WHERE head = 0"]),
        "control character",
    ),
    "a cluster that is no UTF-8": (
        database(after=["UPDATE heads SET cluster_id = CAST(x'ff' AS TEXT) WHERE head = 0"]),
        "half a character",
    ),
    "a head of no projection": (
        database(after=["UPDATE heads SET projection_id = 9 WHERE head = 3"]),
        "heads: a row's projection_id is 9; no such projection",
    ),
    "a question of no projection": (
        database(after=["UPDATE embeddings SET projection_id = 'x' WHERE question_id = '3'"]),
        "embeddings: a row's projection_id is 'x'",
    ),
    "a question of no head": (
        database(after=["UPDATE embeddings SET cluster_id = 'z' WHERE question_id = '3'"]),
        "question_id '3': cluster_id is 'z'; no head has it",
    ),
    "a question with another dim": (
        database(after=["UPDATE embeddings SET dim = 7 WHERE question_id = '4'"]),
        "question_id '4': dim is 7; needed a whole number, 6",
    ),
    "a short question": (
        database(after=["UPDATE embeddings SET vector = x'00' WHERE role = 'question'"]),
        "question_id '0': vector is 1 bytes; needed a BLOB of 24 bytes",
    ),
    "an unknown role": (
        database(after=["UPDATE embeddings SET role = 'hint' WHERE role = 'answer'"]),
        "role is 'hint'; allowed: question, answer",
    ),
    "an answer without its question": (
        database(after=["DELETE FROM embeddings WHERE role = 'question' AND question_id = '5'"]),
        "question_id '5': an answer without its question",
    ),
    "a map's question without an answer": (
        database("maps", after=["DELETE FROM embeddings WHERE role = 'answer'"]),
        "question_id '0': no row with role answer; mode maps needs one",
    ),
    "a header and nothing": (b"SQLite format 3\0", "does not start with the header"),
    "a header and noise": (b"SQLite format 3\0" + b"\xa5" * 5000, "truncated"),
    "a header and text": (b"SQLite format 3\0" + b"no database " * 500, "truncated"),
    "half a file": (database()[:8192], "is truncated: 8192 of"),
}
"""Bytes, and what is said of them."""
