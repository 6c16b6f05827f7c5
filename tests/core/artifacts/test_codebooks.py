"""Codebooks come in from .npz and .safetensors, or are refused with their reason."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import DataInvalid
from core.tensors.codebooks import (
    Codebook,
    check_codebook,
    load_codebook,
    save_codebook,
    save_codebook_npz,
)
from core.tensors.shards import Array, load, save
from tests.core.artifacts.conftest import Reader
from tests.core.artifacts.federated_files import npz


def some_planes(m: int = 3, d: int = 8) -> Array:
    columns = np.linalg.qr(np.random.default_rng(0).normal(size=(d, 2 * m)))[0]
    planes: Array = np.ascontiguousarray(columns.T.reshape(m, 2, d)).astype(np.float32)
    return planes


def some_codebook(**facts: Any) -> Codebook:
    shares = np.array([0.5, 0.25, 0.125], np.float32)
    return Codebook(some_planes(), shares, "pca", {"solver": "full", "seed": 0, **facts})


def changed(array: Array, at: Any, value: float) -> Array:
    array = array.copy()
    array[at] = value
    return array


def test_a_codebook_comes_back_and_equal_ones_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "other"):
        save_codebook(tmp_path / name, some_codebook())
        save_codebook_npz(tmp_path / f"{name}.npz", some_codebook())

    back = load_codebook(tmp_path / "one")

    np.testing.assert_array_equal(back.planes, some_codebook().planes)
    np.testing.assert_array_equal(back.explained, some_codebook().explained)
    assert (back.method, back.facts) == ("pca", {"solver": "full", "seed": 0})
    for end in ("", ".npz"):
        one, other = (tmp_path / f"{name}{end}" for name in ("one", "other"))
        assert one.read_bytes() == other.read_bytes()


def test_the_npz_opens_in_numpy_without_pickles(tmp_path: Path) -> None:
    save_codebook_npz(tmp_path / "c.npz", some_codebook())

    with np.load(tmp_path / "c.npz", allow_pickle=False) as found:
        assert sorted(found) == sorted(
            ["planes", "explained_variance_ratio", "n_components", "dim", "method"]
        )
        np.testing.assert_array_equal(found["planes"], some_planes())
        assert (int(found["n_components"]), int(found["dim"])) == (3, 8)
        assert str(found["method"]) == "pca"


def test_an_uploaded_npz_becomes_a_codebook(sandboxed: Reader, tmp_path: Path) -> None:
    save_codebook_npz(tmp_path / "c.npz", some_codebook())

    found = sandboxed((tmp_path / "c.npz").read_bytes(), file_name="my planes.npz")

    assert (found.format, found.file_name) == ("codebook", "my planes.safetensors")
    back = load_codebook(found.path)
    np.testing.assert_array_equal(back.planes, some_planes())
    assert found.meta == back.meta()
    told = {"n_components": 3, "dim": 8, "method": "pca", "disjoint": True, "explains": True}
    assert found.meta == told
    assert back.facts == {"source": "imported"}


def test_an_own_codebook_comes_back_byte_for_byte(sandboxed: Reader, tmp_path: Path) -> None:
    save_codebook(tmp_path / "c", some_codebook(together=0.875))
    data = (tmp_path / "c").read_bytes()

    found = sandboxed(data)

    assert found.format == "codebook"
    assert found.path.read_bytes() == data


def test_planes_alone_are_enough_and_float64_is_narrowed(here: Reader) -> None:
    planes = some_planes()

    found = here(npz({"planes": planes.astype(np.float64), "extra": planes}))

    back = load_codebook(found.path)
    np.testing.assert_array_equal(back.planes, planes)
    assert not back.explained.any()
    assert back.method == "imported"
    assert found.notes == [
        "ignored, no such field: extra",
        "no explained_variance_ratio: the planes count as explaining nothing",
    ]


def test_overlapping_planes_are_measured_as_such(here: Reader) -> None:
    planes = some_planes()
    planes[1] = planes[0, ::-1]

    found = here(npz({"planes": planes}))

    assert found.meta["disjoint"] is False
    assert load_codebook(found.path).overlap() == pytest.approx(1)


PLANES = some_planes()


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"planes": PLANES[:, 0]}, r"planes: shape \[3, 8\]; needed"),
        ({"planes": PLANES[:, :1]}, r"planes: shape \[3, 1, 8\]; needed"),
        ({"planes": PLANES[:0]}, r"planes: shape \[0, 2, 8\]; needed"),
        ({"planes": PLANES.astype(np.int32)}, "planes: int32 of shape"),
        ({"planes": PLANES.astype(np.float16)}, "planes: float16 of shape"),
        ({"planes": np.float32(1)}, r"planes: float32 of shape \[\]"),
        ({"planes": changed(PLANES, (1, 0, 0), np.nan)}, "plane 1 holds NaN"),
        ({"planes": PLANES.astype(np.float64) * 1e200}, "plane 0 holds NaN or infinity"),
        ({"planes": PLANES * 1.001}, "are off orthonormal by 0.002"),
        ({"planes": changed(PLANES, (2, 1), PLANES[2, 0])}, "plane 2 are off orthonormal by 1"),
        ({"n_components": np.array(4)}, "n_components: int64 4; planes say 3"),
        ({"dim": np.array([8])}, "dim: int64"),
        ({"dim": np.array(8.0)}, "dim: float64"),
        ({"explained_variance_ratio": np.zeros(2, np.float32)}, r"needed float32 \[3\]"),
        ({"explained_variance_ratio": np.array([0.1, -0.1, 0])}, "plane 1 has -0.1"),
        ({"explained_variance_ratio": np.array([0.1, np.nan, 0])}, "plane 1 has nan"),
        ({"method": np.array("magic")}, "method: 'magic'; allowed: canonical, pca"),
        ({"method": np.array(b"\xff")}, "method: 'ÿ'; allowed"),
        ({"method": np.array(3)}, "method: int64"),
    ],
)
def test_what_is_no_codebook_is_refused(here: Reader, arrays: Any, match: str) -> None:
    with pytest.raises(DataInvalid, match=match):
        here(npz({"planes": PLANES, **arrays}))


def test_a_codebook_with_pickles_inside_is_refused(here: Reader) -> None:
    with pytest.raises(DataInvalid, match="object array"):
        here(npz({"planes": np.array([{}], dtype=object)}))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"version": 2}, "version 2; needed 'codebook', version 1"),
        ({"facts": 3}, "facts is 3"),
        ({"facts": {"mood": "good"}}, "facts: 'mood' is not known"),
        ({"facts": {"solver": "oracle"}}, "facts: solver is 'oracle'; needed the name of a solver"),
        ({"facts": {"model": "x"}}, "facts: model is 'x'; needed a SHA-256"),
        ({"facts": {"together": True}}, "facts: together is True; needed a number"),
        ({"method": "magic"}, "method: 'magic'"),
        ({"n_components": 4}, "n_components is 4; needed 3"),
        ({"disjoint": False}, "disjoint is False; needed True"),
    ],
)
def test_a_manifest_that_is_not_true_is_refused(
    here: Reader, tmp_path: Path, changes: Any, match: str
) -> None:
    save_codebook(tmp_path / "c", some_codebook())
    tensors, manifest = load(tmp_path / "c")
    save(tmp_path / "c", tensors, {**manifest, **changes})
    with pytest.raises(DataInvalid, match=match):
        here((tmp_path / "c").read_bytes())


def test_a_file_without_shares_and_another_format_are_refused(tmp_path: Path) -> None:
    save_codebook(tmp_path / "c", some_codebook())
    tensors, manifest = load(tmp_path / "c")
    save(tmp_path / "c", {"planes": tensors["planes"]}, manifest)
    with pytest.raises(DataInvalid, match="explained: missing"):
        load_codebook(tmp_path / "c")
    save(tmp_path / "c", tensors, {**manifest, "format": "pairs"})
    with pytest.raises(DataInvalid, match="format 'pairs'"):
        load_codebook(tmp_path / "c")


def test_nothing_invalid_is_written(tmp_path: Path) -> None:
    bad = Codebook(PLANES * 2, some_codebook().explained, "pca")
    for write in (save_codebook, save_codebook_npz):
        with pytest.raises(DataInvalid, match="off orthonormal"):
            write(tmp_path / "c", bad)
    assert not (tmp_path / "c").exists()
    with pytest.raises(DataInvalid, match="dtype float64; needed float32"):
        check_codebook(Codebook(PLANES.astype(np.float64), bad.explained, "pca"))
