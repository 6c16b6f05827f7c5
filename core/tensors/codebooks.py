"""Codebooks of rotation planes: what one is, its two files, and what makes one invalid."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import DataInvalid
from core.tensors import shards
from core.tensors.manifests import shown
from core.tensors.shards import Array

METHODS = ("canonical", "pca", "combined", "imported")
"""The last: of a foreign file that names none."""
FORMAT = ("codebook", 1)
ORTHONORMAL = 1e-5
"""Largest entry of the Gram matrix of a pair, less the identity; float32 stays below 1e-6."""
DISJOINT = 1e-5
"""The same of all pairs together, up to which planes count as mutually orthogonal."""
LARGEST_SHARE = 1 + 1e-6
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Codebook:
    """m planes in d dimensions; a rotation in plane i turns ``planes[i, 0]`` to ``planes[i, 1]``.

    Plane i as a bivector is P_i = a_i b_i^T - b_i a_i^T, its Frobenius norm sqrt(2).
    """

    planes: Array
    """[m, 2, d] float32; each pair a_i, b_i is orthonormal to rounding."""
    explained: Array
    """[m] float32 in [0, 1]: the share of the weighted squared bivectors that plane i explains by
    itself. Shares of disjoint planes add up; zeros where the planes were made from nothing."""
    method: str
    """One of METHODS."""
    facts: dict[str, Any] = field(default_factory=dict)
    """How it was made; JSON values: solver, seed, clusters, together (the share that all planes
    explain), model (SHA-256)."""

    @property
    def dim(self) -> int:
        """Return d."""
        return int(self.planes.shape[2])

    @property
    def disjoint(self) -> bool:
        """Tell, by measuring, whether the planes are orthogonal to each other."""
        m, _, d = self.planes.shape
        return 2 * m <= d and self.overlap() <= DISJOINT

    def overlap(self) -> float:
        """Return the largest |inner product| of vectors of two different planes; 0 for one."""
        m = len(self.planes)
        rows = self.planes.reshape(2 * m, -1).astype(np.float64)
        gram = np.abs(rows @ rows.T).reshape(m, 2, m, 2).max(axis=(1, 3))
        np.fill_diagonal(gram, 0)
        return float(gram.max())

    def meta(self) -> dict[str, Any]:
        """Return the facts a plan needs."""
        return {
            "n_components": len(self.planes),
            "dim": self.dim,
            "method": self.method,
            "disjoint": self.disjoint,
            "explains": bool(self.explained.any()),
            # Of the planes it was made of: null is log(G^T W). An upload may not say.
            **({"compat": self.facts["compat"]} if "compat" in self.facts else {}),
        }


def check_codebook(codebook: Codebook) -> None:
    """Raise DataInvalid naming the field, the value and what is needed."""
    planes, explained = codebook.planes, codebook.explained
    if planes.ndim != 3 or planes.shape[0] < 1 or planes.shape[1] != 2 or planes.shape[2] < 2:
        raise DataInvalid(
            f"planes: shape {list(planes.shape)}; needed [planes >= 1, 2, dim >= 2], both vectors "
            "of each plane"
        )
    if planes.dtype != np.float32:
        raise DataInvalid(f"planes: dtype {planes.dtype}; needed float32")
    if not np.isfinite(planes).all():
        plane = int(np.argmin(np.isfinite(planes).all(axis=(1, 2))))
        raise DataInvalid(f"planes: plane {plane} holds NaN or infinity")
    wide = planes.astype(np.float64)
    off = np.abs(wide @ wide.transpose(0, 2, 1) - np.eye(2)).max(axis=(1, 2))
    if off.max() > ORTHONORMAL:
        worst = int(off.argmax())
        raise DataInvalid(
            f"planes: the vectors of plane {worst} are off orthonormal by {off[worst]:.3g} (allowed"
            f" {ORTHONORMAL:g}); orthonormalise each pair, for example by numpy.linalg.qr"
        )
    _check_explained(explained, len(planes))
    if codebook.method not in METHODS:
        raise DataInvalid(f"method: {shown(codebook.method)}; allowed: {', '.join(METHODS)}")
    _check_facts(codebook.facts)


def _check_explained(explained: Array, planes: int) -> None:
    if explained.dtype != np.float32 or explained.shape != (planes,):
        raise DataInvalid(
            f"explained: {explained.dtype} of shape {list(explained.shape)}; needed float32 "
            f"[{planes}], one share a plane"
        )
    bad = ~((explained >= 0) & (explained <= LARGEST_SHARE))
    if bad.any():
        worst = int(np.argmax(bad))
        raise DataInvalid(f"explained: plane {worst} has {explained[worst]}; needed 0 to 1")


_FACTS: Mapping[str, tuple[Any, str]] = {
    "solver": (lambda v: v in ("full", "randomized", "incremental"), "the name of a solver"),
    "seed": (lambda v: type(v) is int and 0 <= v < 2**31, "a whole number, 0 to 2147483647"),
    "clusters": (lambda v: type(v) is int and v >= 1, "a whole number from 1"),
    "sources": (lambda v: type(v) is int and v >= 1, "a whole number from 1"),
    "planes_per_cluster": (lambda v: type(v) is int and v >= 1, "a whole number from 1"),
    "components": (lambda v: type(v) is int and v >= 1, "a whole number from 1"),
    "together": (
        lambda v: type(v) in (int, float) and 0 <= v <= LARGEST_SHARE,
        "a number, 0 to 1",
    ),
    "compat": (lambda v: v in ("legacy", None), "legacy or null"),
    "source": (lambda v: v == "imported", "imported"),
    "model": (lambda v: _is_sha256(v), "a SHA-256"),
    "codebooks": (
        lambda v: isinstance(v, list) and 1 <= len(v) <= 64 and all(map(_is_sha256, v)),
        "a list of 1 to 64 SHA-256",
    ),
}
"""What may be said of how a codebook was made, and how it must be said."""


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _check_facts(facts: Mapping[str, Any]) -> None:
    for name, value in facts.items():
        if name not in _FACTS:
            raise DataInvalid(f"facts: {shown(name)} is not known; known: {', '.join(_FACTS)}")
        check, needed = _FACTS[name]
        if not check(value):
            raise DataInvalid(f"facts: {name} is {shown(value)}; needed {needed}")


def save_codebook(path: Path, codebook: Codebook) -> None:
    """Write a checked codebook as one .safetensors; equal codebooks give equal bytes."""
    check_codebook(codebook)
    named = dict(zip(("format", "version"), FORMAT, strict=True))
    tensors = {"planes": codebook.planes, "explained": codebook.explained}
    shards.save(path, tensors, {**named, **codebook.meta(), "facts": codebook.facts})


def load_codebook(path: Path) -> Codebook:
    """Read and check what save_codebook wrote.

    Raises:
        DataInvalid: another format, a tensor missing, or a codebook that is none.
    """
    tensors, manifest = shards.load(path)
    told = manifest.get("format"), manifest.get("version")
    if told != FORMAT:
        raise DataInvalid(
            f"manifest: format {shown(told[0])}, version {shown(told[1])}; needed "
            f"{FORMAT[0]!r}, version {FORMAT[1]}"
        )
    if missing := sorted({"planes", "explained"} - set(tensors)):
        raise DataInvalid(f"{', '.join(missing)}: missing from the codebook")
    facts = manifest.get("facts")
    if not isinstance(facts, dict):
        raise DataInvalid(f"manifest: facts is {shown(facts)}; needed an object")
    method = str(manifest.get("method"))
    codebook = Codebook(tensors["planes"], tensors["explained"], method, facts)
    check_codebook(codebook)
    for name, value in codebook.meta().items():
        if manifest.get(name) != value:
            raise DataInvalid(f"manifest: {name} is {shown(manifest.get(name))}; needed {value}")
    return codebook


def save_codebook_npz(path: Path, codebook: Codebook) -> None:
    """Write a checked codebook as .npz for other programs; equal codebooks give equal bytes.

    Document 000 prints no layout of a codebook file, so this one is plain: ``planes`` [m, 2, d]
    float32, ``explained_variance_ratio`` [m] float32, ``n_components`` and ``dim`` (int64),
    ``method`` (text). ``numpy.load`` reads it without pickles.
    """
    check_codebook(codebook)
    arrays = {
        "dim": np.array(codebook.dim, np.int64),
        "explained_variance_ratio": codebook.explained,
        "method": np.array(codebook.method),
        "n_components": np.array(len(codebook.planes), np.int64),
        "planes": codebook.planes,
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            data = io.BytesIO()
            np.lib.format.write_array(data, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", _EPOCH), data.getvalue())


def from_arrays(arrays: Mapping[str, Array]) -> Codebook:
    """Make a checked codebook of the arrays of such an .npz; ``planes`` alone is enough.

    Args:
        arrays: ``planes`` float32 or float64, the rest as in ``save_codebook_npz``. Without
            shares the planes explain nothing; without a method they are ``imported``.

    Raises:
        DataInvalid: names the array, what it is and what was needed.
    """
    if "planes" not in arrays:
        raise DataInvalid(f"planes: missing; the .npz holds {', '.join(sorted(arrays)) or 'none'}")
    planes = _narrowed("planes", arrays["planes"])
    shares = arrays.get("explained_variance_ratio", np.zeros(len(planes), np.float32))
    codebook = Codebook(
        planes,
        _narrowed("explained_variance_ratio", shares),
        _method_of(arrays.get("method")),
        {"source": "imported"},
    )
    check_codebook(codebook)
    for name, value in (("n_components", len(planes)), ("dim", codebook.dim)):
        told = arrays.get(name, np.array(value))
        if told.shape != () or told.dtype.kind not in "iu" or int(told) != value:
            raise DataInvalid(f"{name}: {told.dtype} {told.tolist()!r:.60}; planes say {value}")
    return codebook


def _narrowed(name: str, array: Array) -> Array:
    if array.dtype not in (np.float32, np.float64) or not array.ndim:
        raise DataInvalid(
            f"{name}: {array.dtype} of shape {list(array.shape)}; needed float32 or float64"
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused as infinity
        return array.astype(np.float32)


def _method_of(told: Array | None) -> str:
    if told is None:
        return "imported"
    if told.shape != () or told.dtype.kind not in "US":
        raise DataInvalid(f"method: {told.dtype} of shape {list(told.shape)}; needed one text")
    value = told.item()
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)
