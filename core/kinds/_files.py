"""What kinds share: blocks of rows, sizes, small JSON files with the same bytes every time."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.kinds._base import Chunk, Produced
from core.tensors import shards
from core.tensors.shards import Array

BLOCK_ENTRIES = 16 * 2**20
"""Numbers in a block of vectors at most (64 MiB in float32), however many rows are asked for."""


def float_bytes(*shape: int) -> int:
    """Return what a float32 tensor of this shape takes."""
    return 4 * math.prod(shape)


def write_json(path: Path, value: Any, *, format_name: str, **meta: Any) -> Produced:
    """Write JSON with sorted keys; no NaN."""
    text = json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n"
    path.write_text(text, encoding="utf-8")
    return Produced(path, format_name, path.name, "application/json", meta)


def read_json(path: Path) -> Any:
    """Read what write_json wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def blocks(total: int, size: int) -> list[tuple[int, int]]:
    """Cut range(total) into (start, stop) pieces of ``size``, the last one shorter."""
    return [(start, min(start + size, total)) for start in range(0, total, size)]


def vector_blocks(total: int, size: int, *, dim: int) -> list[tuple[int, int]]:
    """Cut range(total) like ``blocks``, shorter where one would pass BLOCK_ENTRIES numbers."""
    return blocks(total, min(size, max(1, BLOCK_ENTRIES // dim)))


def query_rows(chunk: Chunk, sha256: str, start: int, stop: int) -> Array:
    """Return queries start..stop-1 of stored pairs or of a model, [stop - start, d] float32.

    These rows alone are read.
    """
    rows = shards.load_rows(chunk.fetch(sha256), "query_embeddings", start, stop)
    return rows.astype("float32", copy=False)


def write_targets(
    chunk: Chunk,
    made: Sequence[Mapping[str, Produced]],
    *,
    teacher: Mapping[str, Any],
    pairs: str | None,
    **beside: Any,
) -> Produced:
    """Write a ``targets`` artifact: which blocks hold a teacher's answers, and to what.

    Args:
        chunk: of a job with the input ``model``.
        made: outputs of the chunks that made the blocks, in order.
        teacher: the spec in force, JSON values.
        pairs: SHA-256 of those whose queries are answered; None: the model's own.
        beside: what else the file tells.
    """
    listed, model = _list_blocks(made), chunk.input("model")
    facts = {
        "rows": sum(block["rows"] for block in listed),
        "dim": model.meta["dim"],
        "target_dim": model.meta.get("target_dim", model.meta["dim"]),
        "clusters": model.meta.get("clusters", 0),
        "model": model.sha256,
        "pairs": pairs,
        "teacher": dict(teacher),
    }
    whole = {"format": "targets", "version": 1, **facts, "blocks": listed, **beside}
    return write_json(chunk.workdir / "targets.json", whole, format_name="targets", **facts)


def _list_blocks(made: Sequence[Mapping[str, Produced]]) -> list[dict[str, Any]]:
    """Return hash and rows of each chunk's ``targets``."""
    listed: list[dict[str, Any]] = []
    for outputs in made:
        file = outputs["targets"]
        with file.path.open("rb") as data:
            sha256 = hashlib.file_digest(data, "sha256").hexdigest()
        listed.append({"sha256": sha256, "rows": file.meta["rows"]})
    return listed
