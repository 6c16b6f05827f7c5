"""Document 000's layout comes in whole, or is refused with its reason."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.artifacts.limits import Limits
from core.errors import DataInvalid, TooLarge
from core.tensors.formats import load_federated
from tests.core.artifacts.conftest import Reader
from tests.core.artifacts.federated_files import Model, model, rotation, tarred, zipped

Break = Callable[[Model], object]


@pytest.mark.parametrize("pack", [zipped, tarred, lambda files: tarred(files, mode="w:")])
def test_an_archive_becomes_the_model_it_holds(sandboxed: Reader, pack: Any) -> None:
    toy = model()

    found = sandboxed(pack(toy.files()), file_name="../../etc/toy.tar.gz")

    assert (found.format, found.file_name) == ("federated_model", "toy.safetensors")
    back = load_federated(found.path)
    assert found.meta == back.meta()
    assert (found.meta["clusters"], found.meta["rows"], found.meta["dim"]) == (3, 12, 6)
    assert found.meta["temperature"] == 0.1
    np.testing.assert_allclose(back.rotations, toy.maps, atol=1e-6)
    np.testing.assert_array_equal(back.scales, 1)
    np.testing.assert_array_equal(back.anchor, np.eye(6))
    np.testing.assert_array_equal(back.cluster_of, toy.cluster_of)
    np.testing.assert_array_equal(back.train_rows, np.arange(12))
    np.testing.assert_allclose(back.centroids, toy.facts["cluster_centroids"], atol=1e-6)
    y = np.einsum("nd,nde->ne", back.queries, back.rotations[back.cluster_of])
    np.testing.assert_allclose(y, back.targets, atol=1e-5)
    assert back.manifest["anchor"] == "none"
    assert back.manifest["reflected_clusters"] == []
    assert back.manifest["cluster_ids"] == ["cluster_0", "cluster_1", "cluster_2"]


def test_our_own_file_comes_back_byte_for_byte(sandboxed: Reader) -> None:
    first = sandboxed(zipped(model().files()))
    data = first.path.read_bytes()

    again = sandboxed(data)

    assert again.format == "federated_model"
    assert again.path.read_bytes() == data


@pytest.mark.parametrize("protocol", range(6))
def test_every_pickle_protocol_is_read(here: Reader, protocol: int) -> None:
    assert here(zipped(model().files(protocol=protocol))).meta["clusters"] == 3


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_every_float_width_is_read(here: Reader, dtype: str) -> None:
    found = here(zipped(model(dtype=dtype, dim=32).files()))
    back = load_federated(found.path)
    assert back.rotations.dtype == np.float32
    np.testing.assert_allclose(back.scales, 1, atol=1e-3)


@pytest.mark.parametrize("prefix", ["cluster_", ""])
@pytest.mark.parametrize("ids", [[7, 1, 40], ["7", "1", "40"], ["cluster_7", "cluster_1", "x"]])
def test_cluster_files_may_carry_the_prefix_or_not(
    here: Reader, prefix: str, ids: list[Any]
) -> None:
    toy = model()
    toy.facts["cluster_ids"] = ids
    toy.routing["idx_to_cluster_values"] = np.array([str(ids[c]) for c in toy.cluster_of])
    toy.file_names = [f"{prefix}{str(name).removeprefix('cluster_')}.npz" for name in ids]

    back = load_federated(here(zipped(toy.files())).path)

    np.testing.assert_array_equal(back.cluster_of, toy.cluster_of)
    np.testing.assert_allclose(back.rotations, toy.maps, atol=1e-6)


def test_ids_that_differ_only_by_the_prefix_keep_their_own_files(here: Reader) -> None:
    toy = model(clusters=2)
    toy.facts["cluster_ids"] = ["1", "cluster_1"]
    toy.routing["idx_to_cluster_values"] = np.array(["1", "cluster_1"])[toy.cluster_of]
    toy.file_names = ["1.npz", "cluster_1.npz"]

    back = load_federated(here(zipped(toy.files())).path)

    np.testing.assert_allclose(back.rotations, toy.maps, atol=1e-6)


def test_integer_values_and_a_folder_around_it_all_are_read(here: Reader) -> None:
    toy = model()
    toy.routing["idx_to_cluster_values"] = toy.cluster_of
    files = {f"models/v1/{name}": data for name, data in toy.files().items()}
    files["models/README"] = b"hello"

    found = here(zipped(files))

    assert found.meta["rows"] == 12
    assert found.notes == ["ignored, not part of the model: models/README"]


def test_a_scale_is_split_off(here: Reader) -> None:
    toy = model()
    toy.clusters[1]["W_stack"] = 2.5 * toy.clusters[1]["W_stack"]

    back = load_federated(here(zipped(toy.files())).path)

    np.testing.assert_allclose(back.scales, [1, 2.5, 1], rtol=1e-6)
    np.testing.assert_allclose(back.rotations, toy.maps, atol=1e-6)


def test_a_reflection_is_mended_along_its_own_axis(here: Reader) -> None:
    toy = model(dim=7)
    w = 1.5 * rotation(7, seed=5, reflect=True)
    toy.clusters[2]["W_stack"] = w[None]

    found = here(zipped(toy.files()))

    back = load_federated(found.path)
    assert back.manifest["reflected_clusters"] == ["cluster_2"]
    assert "reflected, for their determinant was -1: clusters cluster_2" in found.notes
    mended = back.scales[2] * back.rotations[2].astype(np.float64)
    change = np.linalg.svd(mended - w, compute_uv=False)
    np.testing.assert_allclose(change, [3, 0, 0, 0, 0, 0, 0], atol=1e-5)
    vector = np.linalg.svd(mended - w)[2][0]
    np.testing.assert_allclose(vector @ w, -1.5 * vector, atol=1e-5)


def test_missing_centroids_are_computed(here: Reader) -> None:
    toy = model()
    expected = toy.facts.pop("cluster_centroids")

    found = here(zipped(toy.files()))

    np.testing.assert_allclose(load_federated(found.path).centroids, expected, atol=1e-6)
    assert found.notes == ["no cluster_centroids: the means of the clusters' queries are used"]


def test_centroids_may_come_by_id(here: Reader) -> None:
    toy = model()
    rows = toy.facts["cluster_centroids"]
    toy.facts["cluster_centroids"] = {f"cluster_{c}": rows[c] for c in (2, 0, 1)}

    back = load_federated(here(zipped(toy.files())).path)

    np.testing.assert_allclose(back.centroids, rows, atol=1e-6)


def test_indices_that_differ_from_the_routing_are_noted(here: Reader) -> None:
    toy = model()
    toy.clusters[0]["indices"] = toy.clusters[1]["indices"]

    notes = here(zipped(toy.files())).notes

    assert notes == ["indices of 1 clusters differ from routing_data.npz, which is used"]


def fact(name: str, value: Any) -> Break:
    return lambda toy: toy.facts.__setitem__(name, value)


def routed(name: str, value: Any) -> Break:
    return lambda toy: toy.routing.__setitem__(name, value)


def cluster(name: str, value: Any) -> Break:
    return lambda toy: toy.clusters[1].__setitem__(name, value)


def put(field: str, at: Any, value: float) -> Break:
    def change(toy: Model) -> None:
        toy.routing[field] = toy.routing[field].copy()
        toy.routing[field][at] = value

    return change


def skewed(toy: Model) -> None:
    toy.clusters[1]["W_stack"] = toy.clusters[1]["W_stack"] * np.linspace(1, 1.01, 6)


def two_in_one(toy: Model) -> None:
    toy.clusters[1]["W_stack"] = np.concatenate([toy.clusters[1]["W_stack"]] * 2)


BROKEN: dict[str, tuple[Break, str]] = {
    "cluster id with a newline": (
        fact("cluster_ids", ["cluster_0", "cluster_1\n", "cluster_2"]),
        r"cluster_ids: entry 1 .* U\+000A",
    ),
    "temperature huge": (fact("temperature", 1e36), r"temperature: 1e\+36; needed"),
    "temperature zero": (fact("temperature", 0.0), "temperature: 0.0; needed a finite number > 0"),
    "temperature nan": (fact("temperature", float("nan")), "temperature: nan"),
    "temperature infinite": (fact("temperature", float("inf")), "temperature: inf"),
    "temperature text": (fact("temperature", "warm"), "temperature: 'warm'"),
    "temperature bool": (fact("temperature", value=True), "temperature: True"),
    "temperature missing": (lambda toy: toy.facts.pop("temperature"), "temperature: missing"),
    "ids missing": (lambda toy: toy.facts.pop("cluster_ids"), "cluster_ids: missing"),
    "ids empty": (fact("cluster_ids", []), "cluster_ids: needed a list"),
    "ids of floats": (fact("cluster_ids", [0.5, 1.5, 2.5]), "cluster_ids: needed a list"),
    "ids twice": (fact("cluster_ids", ["a", "a", "b"]), "an id appears twice"),
    "count differs": (fact("num_clusters", 9), "num_clusters: 9 beside 3 cluster_ids"),
    "centroids shape": (fact("cluster_centroids", np.ones((2, 6))), r"cluster_centroids: .*\[3, 6"),
    "centroids nan": (fact("cluster_centroids", np.full((3, 6), np.nan)), "cluster_centroids: NaN"),
    "centroids ragged": (fact("cluster_centroids", [[1.0], [1.0, 2.0], []]), "different lengths"),
    "centroids by id, one lacking": (
        fact("cluster_centroids", {"cluster_0": np.ones(6)}),
        "cluster_centroids: none for cluster cluster_1",
    ),
    "query nan": (put("query_embeddings", (3, 0), np.nan), "query_embeddings: row 3 holds NaN"),
    "query zero": (put("query_embeddings", 3, 0), "query_embeddings: row 3 is all zeros"),
    "target inf": (put("target_embeddings", (5, 1), np.inf), "target_embeddings: row 5 holds NaN"),
    "target rows": (routed("target_embeddings", np.ones((5, 6))), r"target_embeddings \[5, 6\]"),
    "query axes": (routed("query_embeddings", np.ones(6)), r"query_embeddings: shape \[6\]"),
    "query integers": (routed("query_embeddings", np.ones((12, 6), int)), "dtype int64; allowed"),
    "routing field": (lambda toy: toy.routing.pop("idx_to_cluster_keys"), "keys missing"),
    "keys out of range": (put("idx_to_cluster_keys", 4, 12), "entry 4 is 12; allowed 0 to 11"),
    "keys negative": (put("idx_to_cluster_keys", 4, -1), "entry 4 is -1; allowed 0 to 11"),
    "keys twice": (put("idx_to_cluster_keys", 4, 5), "name 11 of 12 query rows"),
    "keys text": (routed("idx_to_cluster_keys", np.array(["a"] * 12)), "needed whole numbers"),
    "keys fewer": (
        routed("idx_to_cluster_keys", np.arange(11)),
        "11 idx_to_cluster_keys beside 12",
    ),
    "values unknown": (routed("idx_to_cluster_values", np.array(["zz"] * 12)), "name 'zz'"),
    "values float": (routed("idx_to_cluster_values", np.ones(12)), "needed one axis of text"),
    "empty cluster": (
        routed("idx_to_cluster_values", np.array(["cluster_0", "cluster_1"] * 6)),
        "cluster cluster_2 is empty .*drop it from cluster_ids",
    ),
    "matrix missing": (lambda toy: toy.clusters[1].pop("W_stack"), "cluster_1: W_stack missing"),
    "matrix dim": (cluster("W_stack", np.eye(5)[None]), r"W_stack float64 \[1, 5, 5\]; needed"),
    "two matrices": (two_in_one, r"W_stack float32 \[2, 6, 6\]; needed floats \[1, 6, 6\]"),
    "matrix integers": (cluster("W_stack", np.eye(6, dtype=int)[None]), "W_stack int64"),
    "matrix nan": (cluster("W_stack", np.full((1, 6, 6), np.nan)), "cluster_1: W_stack holds NaN"),
    "matrix zero": (cluster("W_stack", np.zeros((1, 6, 6))), "cluster_1: W_stack holds NaN"),
    "not orthogonal": (
        skewed,
        r"cluster cluster_1: W is not a scaled rotation.*0\.00\d+ .*0\.001 is allowed; fit it with",
    ),
    "indices out of range": (cluster("indices", np.array([0, 99])), "indices: entry 1 is 99"),
    "indices float": (cluster("indices", np.ones(4)), "cluster_1: indices: float64"),
    "cluster targets": (
        cluster("target_embeddings", np.ones((2, 6))),
        r"target_embeddings \[2, 6\]; its indices need \[4, 6\]",
    ),
    "cluster targets nan": (
        cluster("target_embeddings", np.full((4, 6), np.nan)),
        "cluster_1: target_embeddings: row 0 holds NaN",
    ),
    "cluster file": (
        lambda toy: toy.file_names.__setitem__(1, "other.npz"),
        "cluster cluster_1: no file cluster_1.npz",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_refused_with_its_reason(here: Reader, name: str, tmp_path: Path) -> None:
    change, reason = BROKEN[name]
    toy = model()
    change(toy)

    with pytest.raises(DataInvalid, match=reason):
        here(zipped(toy.files()))
    assert not (tmp_path / "out.safetensors").exists()


def without(name: str) -> dict[str, bytes]:
    return {key: data for key, data in model().files().items() if key != name}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (without("toy.pkl"), "0 .pkl files"),
        (without("toy/routing_data.npz"), "no toy/routing_data.npz"),
        ({**model().files(), "b.pkl": b"x"}, "2 .pkl files"),
        ({"toy.pkl": model().files()["toy.pkl"]}, "pack toy.pkl together with its folder toy/"),
    ],
)
def test_a_part_that_is_missing_is_named(
    here: Reader, files: dict[str, bytes], reason: str
) -> None:
    with pytest.raises(DataInvalid, match=reason):
        here(tarred(files))


def test_a_model_too_big_for_the_memory_is_refused_before_it_is_read(here: Reader) -> None:
    with pytest.raises(TooLarge, match=r"need about \d+ bytes of memory"):
        here(zipped(model().files()), limits=Limits(memory_bytes=1000))
