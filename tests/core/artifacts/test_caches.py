"""Cache files of bivectors and of targets come in, or are refused with their reason."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.artifacts.importers import caches as importer
from core.errors import DataInvalid
from core.tensors import caches, shards
from core.tensors.caches import Claims
from core.tensors.shards import Stream
from tests.core.artifacts.conftest import Reader
from tests.core.artifacts.federated_files import npz

_half = np.random.default_rng(0).normal(size=(3, 4, 4)) / 3
L = ((_half - _half.transpose(0, 2, 1)) / 2).astype(np.float32)
T = np.random.default_rng(1).normal(size=(9, 4)).astype(np.float32)
PRINT = "0123456789abcdef" * 4


def written(name: str, values: Any, beside: dict[str, Any], claims: Claims) -> bytes:
    out = io.BytesIO()
    blocks = caches.cut(values, 2)
    caches.write_npz(out, name, Stream(values.dtype, values.shape, blocks), beside, claims)
    return out.getvalue()


def test_bivectors_come_back_from_our_own_export(sandboxed: Reader) -> None:
    claims = Claims(PRINT, {"dtype": "float32"})
    ids = ["a", "é", "c"]

    found = sandboxed(written("bivectors", L, {"cluster_ids": np.array(ids)}, claims))

    assert (found.format, found.notes) == ("bivectors_cache", [])
    assert found.meta == {"clusters": 3, "dim": 4, "dtype": "float32"}
    np.testing.assert_array_equal(caches.read_rows(found.path, "bivectors", 0, 3), L)
    assert caches.read_cluster_ids(found.path) == ids
    assert caches.read_claims(found.path) == claims


def test_targets_come_back_from_our_own_export(
    sandboxed: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = caches.digest_rows(T)

    found = sandboxed(written("targets", T, {"query_digests": digests}, Claims()))

    assert (found.format, found.notes) == ("targets_cache", [])
    assert found.meta == {"rows": 9, "dim": 4, "dtype": "float32"}
    np.testing.assert_array_equal(caches.read_rows(found.path, "targets", 2, 5), T[2:5])
    np.testing.assert_array_equal(caches.read_digests(found.path, 2, 5), digests[2:5])


@pytest.mark.parametrize("name", [*caches.BIVECTOR_NAMES, *caches.TARGET_NAMES])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_foreign_file_needs_one_array_under_a_known_name(
    here: Reader, name: str, *, compressed: bool
) -> None:
    what = "bivectors" if name in caches.BIVECTOR_NAMES else "targets"
    values = L if what == "bivectors" else T

    found = here(npz({name: values.astype(">f8"), "beside": T}, compressed=compressed))

    assert found.format == f"{what}_cache"
    assert found.notes[0] == "ignored, no such field: beside"
    assert found.notes[1].startswith("no ")
    np.testing.assert_array_equal(caches.read_rows(found.path, what, 0, len(values)), values)
    assert caches.read_claims(found.path) == Claims()


def test_blocks_meet_where_they_were_cut(here: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = here(npz({"targets": T}))
    kept = whole.path.read_bytes()
    Path(whole.path.parent / "scratch").rmdir()
    monkeypatch.setattr(importer, "_BLOCK_BYTES", 2 * 16)

    assert here(npz({"targets": T})).path.read_bytes() == kept


@pytest.mark.parametrize("values", [{"bivectors": L}, {"targets": T}])
def test_the_canonical_form_comes_in_again_byte_for_byte(
    here: Reader, values: dict[str, Any]
) -> None:
    beside = {"cluster_ids": np.array(["x", "y", "z"]), "query_digests": caches.digest_rows(T)}
    claims = {"fingerprint": np.array(PRINT), "settings": np.array('{"top_k": 3}')}
    name = "cluster_ids" if "bivectors" in values else "query_digests"
    data = here(npz({**values, name: beside[name], **claims})).path
    kept = data.read_bytes()
    (data.parent / "scratch").rmdir()

    found = here(kept)

    assert found.path.read_bytes() == kept
    assert shards.load_manifest(found.path)["settings"] == {"top_k": 3}


def test_rounding_off_skew_is_taken_away(here: Reader) -> None:
    off = L + np.float32(1e-5)

    kept = caches.read_rows(here(npz({"B": off})).path, "bivectors", 0, 3)

    np.testing.assert_array_equal(kept, -kept.transpose(0, 2, 1))
    np.testing.assert_allclose(kept, L, atol=1e-6)


def test_pairs_that_hold_targets_too_stay_pairs(here: Reader) -> None:
    found = here(npz({"query_embeddings": T, "target_embeddings": T, "targets": T}))

    assert found.format == "pairs"


def changed(array: Any, at: Any, value: float) -> Any:
    array = array.copy()
    array[at] = value
    return array


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "nan": ({"targets": changed(T, (7, 1), np.nan)}, "targets: row 7 holds NaN"),
    "zeros": ({"targets": changed(T, 8, 0)}, "row 8 .* all zeros"),
    "flat": ({"targets": T[0]}, r"targets: shape \[4\]; needed \[rows >= 1, dim >= 2\]"),
    "whole numbers": ({"targets": np.ones((3, 3), int)}, "dtype int64; allowed: float32, float64"),
    "large": ({"logs": changed(L, (2, 0, 1), 4.0)}, "cluster 2 holds 4; a principal logarithm"),
    "not skew": ({"logs": changed(L, (1, 0, 1), 3.0)}, "cluster 1 is off skew by"),
    "two matrices": ({"logs": L[0]}, r"bivectors: shape \[4, 4\]; needed \[clusters >= 1"),
    "twice": ({"B": L, "logs": L}, "B, logs: one .npz holds either bivectors"),
    "both": ({"B": L, "targets": T}, "B, targets: one .npz"),
    "ids twice": ({"B": L, "cluster_ids": np.array(["a", "a", "b"])}, "2 different ones of 3 for"),
    "digests": ({"targets": T, "query_digests": np.zeros((9, 4))}, r"needed uint8 \[9, 16\]"),
    "print": ({"targets": T, "fingerprint": np.array(["a", "b"])}, "fingerprint: shape .2.; nee"),
    "words": ({"targets": T, "settings": np.array("top_k=3")}, "settings: not JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_cache_is_refused_with_its_reason(
    here: Reader, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importer, "_BLOCK_BYTES", 64)  # several blocks: rows are counted through
    arrays, reason = BROKEN[name]

    with pytest.raises(DataInvalid, match=reason):
        here(npz(arrays))
