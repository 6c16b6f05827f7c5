"""Judges low-dimensional codes: who is near whom, which groups stay together, what an axis says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.manifold import trustworthiness
from torch.nn import functional

from core.distill.neighbours import NEAREST, nearest_rows, recall_among
from core.distill.nulls import fit_ridge
from core.distill.students.linear import principal_axes
from core.errors import DataInvalid
from core.tensors.embeddings import Embeddings
from core.tensors.shards import Array

TRUSTED_ROWS = 2000
"""Rows among which trustworthiness is measured at most: it ranks every pair."""
PCA, RIDGE = "PCA", "ridge to PCA"
"""Rows that learn nothing, by the start of their names."""
TERMS = 8
WORD = r"(?u)\b[^\W\d]\w+\b"
"""What counts as a word: two characters or more, the first no digit. Row numbers say nothing."""
GIVEN_OTHER = (
    "PCA is of the teacher's own embeddings; a student is given other vectors of the same rows and "
    "has to find these first."
)
EDGE = 0.1
"""Share of the rows at either end of an axis whose words are compared."""


@dataclass(frozen=True)
class CodeRow:
    """What one way of coding is worth, on held-out rows."""

    name: str
    dim: int
    recall: float
    """Share of the 10 nearest by the teacher, among all rows, that are nearest by the codes."""
    trustworthiness: float | None
    """Venna and Kaski 2001, 10 neighbours, among held-out rows; none where there are too few."""
    purity: float | None
    """Share of the 10 nearest by the codes that are of the row's own group; none without groups."""


@dataclass(frozen=True)
class Axis:
    """One dimension of the shortest code, in words."""

    number: int
    high: list[str]
    low: list[str]


@dataclass(frozen=True)
class CodeEvaluation:
    """The whole judgement; a function of codes, embeddings and seed."""

    rows: list[CodeRow]
    held_out: int
    among: int
    """Rows that neighbours are looked for among."""
    teacher_purity: float | None
    """Of the teacher's own neighbours."""
    axes: list[Axis]
    """Of the student, in the order of its dimensions; none without texts."""
    words: list[str]

    def row(self, name: str) -> CodeRow:
        """Return one row by name."""
        return next(row for row in self.rows if row.name == name)

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def pca_codes(model: Embeddings, dim: int) -> Array:
    """Code every row by the leading principal components of the training rows: [n, dim] float32."""
    vectors = torch.from_numpy(model.embeddings.astype(np.float32))
    train = vectors[torch.from_numpy(model.train_rows)]
    axes = principal_axes(train, dim)
    codes: Array = ((vectors.double() - train.double().mean(0)) @ axes).float().numpy()
    return codes


def baseline_codes(model: Embeddings, dim: int, *, seed: int) -> dict[str, Array]:
    """Code every row as a student must beat: [n, dim] float32, by name.

    PCA of the embeddings themselves. Where a student is given something else, that is no map of
    its inputs: the row to beat is then the ridge regression from inputs to those components.
    """
    codes = pca_codes(model, dim)
    if model.inputs is None:
        return {f"{PCA} {dim}-D": codes}
    inputs, train = torch.from_numpy(model.inputs.astype(np.float32)), model.train_rows
    ridge = fit_ridge(inputs[train], torch.from_numpy(codes[train]), seed=seed)
    told: Array = ridge(inputs).float().numpy()
    return {f"{PCA} {dim}-D": codes, f"{RIDGE} {dim}-D": told}


def evaluate_codes(
    outputs: Mapping[str, Array],
    model: Embeddings,
    rows: Array,
    *,
    student: str | None,
    seed: int,
    remarks: Sequence[str] = (),
) -> CodeEvaluation:
    """Judge every set of codes on held-out rows.

    Args:
        outputs: name -> [n, k] codes of all rows of the model.
        model: whose embeddings are the truth.
        rows: [h] int64, those judged.
        student: name of the codes whose axes are put into words; None: no student.
        seed: of the rows drawn for trustworthiness.
        remarks: sentences that join the findings.

    Raises:
        DataInvalid: codes hold NaN or infinity; whose, and where.
    """
    for name, codes in outputs.items():
        _check_finite(name, codes)
    units = functional.normalize(torch.from_numpy(model.embeddings.astype(np.float64)), dim=1)
    groups = None
    if model.groups is not None:
        _, groups = np.unique(np.array(model.groups), return_inverse=True)
    found = [_row(name, codes, units, rows, groups, seed) for name, codes in outputs.items()]
    texts = model.texts
    axes = [] if student is None or texts is None else axis_terms(outputs[student], texts)
    return CodeEvaluation(
        rows=found,
        held_out=len(rows),
        among=len(units),
        teacher_purity=None if groups is None else _purity(units, rows, groups),
        axes=axes,
        words=[*_words(found, given_other=model.inputs is not None), *remarks],
    )


def _check_finite(name: str, codes: Array) -> None:
    sound = np.isfinite(codes).all(axis=1)
    if not sound.all():
        raise DataInvalid(
            f"{name}: row {int(np.argmin(sound))} holds NaN or infinity "
            f"({int((~sound).sum())} such rows in all); needed finite codes"
        )


def _row(
    name: str, codes: Array, units: torch.Tensor, rows: Array, groups: Array | None, seed: int
) -> CodeRow:
    points = torch.from_numpy(codes.astype(np.float64))
    own = torch.from_numpy(rows)
    return CodeRow(
        name=name,
        dim=codes.shape[1],
        recall=recall_among(points[own], points, units[own], units, own),
        trustworthiness=_trust(units, points, rows, seed),
        purity=None if groups is None else _purity(points, rows, groups),
    )


def _trust(units: torch.Tensor, points: torch.Tensor, rows: Array, seed: int) -> float | None:
    drawn = np.sort(np.random.default_rng(seed).permutation(rows)[:TRUSTED_ROWS])
    if len(drawn) <= 2 * NEAREST:
        return None
    return float(trustworthiness(units[drawn].numpy(), points[drawn].numpy(), n_neighbors=NEAREST))


def _purity(points: torch.Tensor, rows: Array, groups: Array) -> float:
    own = torch.from_numpy(rows)
    count = min(NEAREST, len(points) - 1)
    near = nearest_rows(points[own], points, count=count, own=own).numpy()
    return float((groups[near] == groups[rows][:, None]).mean())


def axis_terms(codes: Array, texts: Sequence[str]) -> list[Axis]:
    """Say in words what either end of every dimension holds.

    Terms whose mean tf-idf is largest among the EDGE of rows at one end against that at the other.

    Args:
        codes: [n, k].
        texts: [n].
    """
    vectorizer = TfidfVectorizer(
        stop_words="english", max_features=20_000, sublinear_tf=True, token_pattern=WORD
    )
    try:
        weights = vectorizer.fit_transform(texts)
    except ValueError:  # no words at all: numbers, or stop words alone
        return []
    terms = vectorizer.get_feature_names_out()
    count = max(1, round(EDGE * len(codes)))
    found = []
    for number, column in enumerate(codes.T):
        order = np.argsort(column, kind="stable")
        low, high = (
            np.asarray(weights[some].mean(axis=0)).ravel()
            for some in (order[:count], order[-count:])
        )
        ranked = np.argsort(high - low, kind="stable")
        found.append(
            Axis(
                number=number,
                high=[str(terms[at]) for at in ranked[::-1][:TERMS] if high[at] > low[at]],
                low=[str(terms[at]) for at in ranked[:TERMS] if low[at] > high[at]],
            )
        )
    return found


def _words(rows: Sequence[CodeRow], *, given_other: bool) -> list[str]:
    """Hold every code against PCA of its own width, or against what the inputs tell of it."""
    bases = {row.dim: row for row in rows if row.name.startswith(PCA)}
    bases |= {row.dim: row for row in rows if row.name.startswith(RIDGE)}
    words = []
    for row in rows:
        base = bases.get(row.dim)
        if row.name.startswith((PCA, RIDGE)) or base is None:
            continue
        name = base.name.removesuffix(f" {row.dim}-D")
        sentence = (
            f"{row.name} keeps {row.recall:.1%} of the teacher's nearest {NEAREST} in {row.dim} "
            f"dimensions, {name} {base.recall:.1%}"
        )
        if row.recall > base.recall:
            times = f": {row.recall / base.recall:.2f} times as many" if base.recall else ""
            words.append(f"{sentence}{times}.")
        else:
            words.append(f"Warning: {sentence}. The student is worth no more than that.")
    return [*words, GIVEN_OTHER] if words and given_other else words
