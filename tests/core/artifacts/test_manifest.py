"""An uploaded federated model says nothing that its arrays, or anybody's reader, would deny."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from core.errors import DataInvalid
from core.tensors import shards
from core.tensors.formats import load_federated, save_federated
from tests.core.artifacts.conftest import Reader, read_here
from tests.core.artifacts.federated_files import model, zipped

SCORE = {"strength": 1.0, "temperature": 0.1, "log_score": -1.5, "hit1": 0.5, "cosine": 0.9}
FITTED = {
    "anchor": "none",
    "clustering": {"method": "kmeans", "max_clusters": 64, "min_cluster_size": 8},
    "compat": None,
    "pairs": "a" * 64,
    "seed": 0,
    "top_k": 10,
    "test_fraction": 0.2,
    "strength": 0.0,
    "scores": [SCORE],
}
Rewrite = Callable[[dict[str, Any]], bytes]


@pytest.fixture
def rewrite(tmp_path: Path) -> Rewrite:
    """Return a sound model's file with its manifest changed; Ellipsis takes a key out."""
    made = tmp_path / "made"
    made.mkdir()
    path = read_here(zipped(model().files()), made).path
    tensors, manifest = shards.load(path)

    def write(changes: dict[str, Any]) -> bytes:
        merged = {**manifest, **FITTED, **changes}
        kept = {name: value for name, value in merged.items() if value is not ...}
        shards.save(path, tensors, kept)
        return path.read_bytes()

    return write


def test_a_model_of_ours_comes_back_byte_for_byte(rewrite: Rewrite, sandboxed: Reader) -> None:
    data = rewrite({})
    found = sandboxed(data)
    assert found.path.read_bytes() == data
    assert (found.meta["pairs"], found.meta["temperature"]) == ("a" * 64, 0.1)


WRONG: dict[str, list[Any]] = {
    "format": ["pairs", None, 1, [1], {"a": 1}],
    "version": [2, 0, True, 1.0, "1", None, ...],
    "pairs": ["\ud800", {"a": 1}, 2**70, "A" * 64, "a" * 63, "a" * 64 + "\n", [], True, ""],
    "temperature": [0, -1, 1e300, 2**200, True, "0.1", None, [], {}, ...],
    "clusters": [4, 3.0, "3", None, True, 2**70],
    "dim": [7, 0, None],
    "rows": [11, 2**70, "12"],
    "held_out": [1, False, 0.0],
    "anchor": ["global ", "\ud800", 1, None, {}],
    "clustering": [
        {},
        "kmeans",
        {"method": "kmeans"},
        {**FITTED["clustering"], "more": 1},  # type: ignore[dict-item]
        {**FITTED["clustering"], "max_clusters": 2**70},  # type: ignore[dict-item]
        {**FITTED["clustering"], "method": "\ud800"},  # type: ignore[dict-item]
    ],
    "compat": ["modern", False, 0],
    "top_k": [0, 1025, 2**70, 1.0, "10", True, None],
    "seed": [-1, 2**70, 0.5, True, "0"],
    "test_fraction": [2, -0.1, "0.2", None],
    "strength": [-1, "1", None, True, 10**400],
    "scores": [
        None,
        {},
        [1],
        [{}],
        [{**SCORE, "hit1": 2}],
        [{**SCORE, "more": 1}],
        [{**SCORE, "log_score": None}],
    ],
    "source": ["fitted", None, 1],
    "cluster_ids": [[], ["a"], ["a", "a", "b"], ["a", "b", "\ud800"], ["a", "b", "\n"], "abc"],
    "reflected_clusters": [["cluster_9"], ["\x00"], "cluster_0", [1]],
    "largest_deviation": [-1, 2, "0", None],
    "unheard_of": [1, None],
    "\ud800": [1],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, each in WRONG.items() for v in each])
def test_a_wrong_fact_is_refused_by_its_name(
    rewrite: Rewrite, here: Reader, name: str, value: Any
) -> None:
    data = rewrite({name: value})
    with pytest.raises(DataInvalid) as caught:
        here(data)
    if name != "format":  # what claims to be another format is read as that
        assert repr(name).strip("'") in caught.value.message
    assert caught.value.message.isprintable()


@pytest.mark.parametrize(
    ("raw", "changed", "reason"),
    [
        ('"seed":0', '"seed":0,"seed":1', "names a key twice"),
        ('"strength":0.0', '"strength":1e999', "strength is inf"),
        ('"strength":0.0', '"strength":-Infinity', "not JSON"),
        ('"seed":0', '"seed":' + "9" * 5000, "digits"),
        ('"seed":0', '"seed":' + "[" * 400 + "]" * 400, "seed is a list"),
    ],
)
def test_what_is_no_sound_json_is_refused(
    rewrite: Rewrite, here: Reader, tmp_path: Path, raw: str, changed: str, reason: str
) -> None:
    (tmp_path / "m").write_bytes(rewrite({}))
    tensors, manifest = shards.load(tmp_path / "m")
    text = json.dumps(manifest, separators=(",", ":"))
    assert raw in text
    data = save(tensors, metadata={"manifest": text.replace(raw, changed)})
    with pytest.raises(DataInvalid, match=reason):
        here(data)


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ([0, 1, 2], [2]),
        ([0, 1, 2], [-1]),
        ([0, 1, 2], [2**40]),
        ([0, 1, 12], []),
        ([0, 1, 1], [2]),
    ],
)
def test_rows_held_out_are_of_the_pairs_and_never_trained_on(
    rewrite: Rewrite, tmp_path: Path, train: list[int], held_out: list[int]
) -> None:
    (tmp_path / "m").write_bytes(rewrite({}))
    sound = replace(load_federated(tmp_path / "m"), manifest={"temperature": 1})

    def save(train: list[int], held_out: list[int]) -> None:
        rows = np.array([*train, *range(3, 12)])
        changed = replace(sound, train_rows=rows, held_out_rows=np.array(held_out, np.int64))
        save_federated(tmp_path / "out", changed)

    save([0, 1, 12], [2])
    with pytest.raises(DataInvalid, match="each row from 0 to"):
        save(train, held_out)
