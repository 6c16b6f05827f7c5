"""Pairs of embeddings from an .npz or a foreign .safetensors, checked and in one canonical form."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from core.artifacts.importers.npy import read_npz
from core.artifacts.limits import Budget
from core.errors import DataInvalid
from core.tensors import shards
from core.tensors.formats import Pairs, save_pairs
from core.tensors.shards import Array

NEEDED = ("query_embeddings", "target_embeddings")
TEXTS = ("ids", "groups")
ANSWERED = ("query_cluster", "answer_embeddings")
"""Beside query_embeddings: questions by cluster, and each cluster's answer."""


def from_npz(source: Path, target: Path, *, budget: Budget) -> tuple[dict[str, Any], list[str]]:
    """Read an .npz, write ``target``; return the pairs' meta and notes on what was left out."""
    wanted = (*NEEDED, *TEXTS, *ANSWERED, "cluster_ids")
    table = read_npz(source, wanted=wanted, name="the .npz", budget=budget)
    if {"query_embeddings", *ANSWERED} <= table.arrays.keys() and NEEDED[1] not in table.arrays:
        return _write(target, _answered(table.arrays), table.ignored, _ANSWERED_NOTE)
    beside = [name for name in (*ANSWERED, "cluster_ids") if name in table.arrays]
    if missing := [name for name in NEEDED if name not in table.arrays]:
        raise DataInvalid(
            f"{', '.join(missing)}: missing from the .npz, which holds "
            f"{', '.join(sorted([*table.arrays, *table.ignored])[:20]) or 'nothing'}; needed "
            "query_embeddings and target_embeddings, optional ids and groups; or query_embeddings, "
            "query_cluster and answer_embeddings, optional ids and cluster_ids"
        )
    return _write(target, table.arrays, sorted([*table.ignored, *beside]))


_ANSWERED_NOTE = "the target of a question is its cluster's answer; its group is the cluster's id"


def _answered(arrays: Mapping[str, Array]) -> dict[str, Any]:
    """Return the arrays of pairs: each question beside its cluster's answer."""
    which, answers = arrays["query_cluster"], arrays["answer_embeddings"]
    rows, clusters = len(np.atleast_1d(arrays["query_embeddings"])), len(np.atleast_1d(answers))
    if which.dtype.kind not in "iu" or which.shape != (rows,) or answers.ndim != 2:
        raise DataInvalid(
            f"query_cluster: {which.dtype} of shape {list(which.shape)} beside answer_embeddings "
            f"{list(answers.shape)}; needed whole numbers [{rows}], rows of answer_embeddings"
        )
    outside = (which < 0) | (which >= clusters)
    if outside.any():
        row = int(np.argmax(outside))
        raise DataInvalid(f"query_cluster: row {row} names {which[row]}; there are {clusters}")
    ids = as_text("cluster_ids", arrays.get("cluster_ids", np.arange(clusters)))
    if len(ids) != clusters or len(set(ids)) < clusters:
        raise DataInvalid(f"cluster_ids: {len(ids)} entries; needed {clusters} different ones")
    groups = [ids[number] for number in which.tolist()]
    found = {"query_embeddings": arrays["query_embeddings"], "target_embeddings": answers[which]}
    return {**found, "groups": groups, **({"ids": arrays["ids"]} if "ids" in arrays else {})}


def from_tensors(target: Path, tensors: Mapping[str, Array]) -> tuple[dict[str, Any], list[str]]:
    """Write the pairs found in a .safetensors canonically; return their meta and notes."""
    arrays: dict[str, Array | list[str]] = {name: tensors[name] for name in NEEDED}
    known = set(NEEDED)
    for name in TEXTS:
        if f"{name}_offsets" in tensors:
            if name not in tensors:
                raise DataInvalid(f"{name}: missing beside {name}_offsets")
            arrays[name] = shards.unpack_text(tensors[name], tensors[f"{name}_offsets"])
            known |= {name, f"{name}_offsets"}
        elif name in tensors:
            arrays[name] = tensors[name]
            known.add(name)
    return _write(target, arrays, sorted(set(tensors) - known))


def _write(
    target: Path, arrays: Mapping[str, Any], ignored: list[str], *told: str
) -> tuple[dict[str, Any], list[str]]:
    notes = [*told]
    notes += [f"ignored, no such field: {name[:100]}" for name in ignored[:50]]
    queries = arrays["query_embeddings"]
    if "ids" in arrays:
        ids = as_text("ids", arrays["ids"])
    else:
        ids = [str(row) for row in range(len(np.atleast_1d(queries)))]
        notes.append("no ids in the file: row numbers are used")
    groups = as_text("groups", arrays["groups"]) if "groups" in arrays else None
    pairs = Pairs(ids=ids, queries=queries, targets=arrays["target_embeddings"], groups=groups)
    save_pairs(target, pairs)
    return pairs.meta(), notes


def as_text(name: str, values: Array | list[str]) -> list[str]:
    """Return labels as text: unicode, UTF-8 bytes or whole numbers, one axis."""
    if isinstance(values, list):
        return values
    if values.ndim != 1 or values.dtype.kind not in "USiu":
        raise DataInvalid(
            f"{name}: {values.dtype} of shape {list(values.shape)}; needed one axis of text, "
            "bytes or whole numbers"
        )
    try:
        if values.dtype.kind == "S":
            return [value.decode() for value in values.tolist()]
        texts = [str(value) for value in values.tolist()]
        for text in texts:
            text.encode()
    except ValueError as error:
        raise DataInvalid(f"{name}: not valid text ({error})") from error
    return texts
