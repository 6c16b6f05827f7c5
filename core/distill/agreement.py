"""Document 001's judging of a student against its teacher, beside what learnt nothing."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional

from core.distill.answering import Answering, ask, checked_rows, in_mode, unfit
from core.distill.nulls import fit_ridge, mean_vector
from core.errors import DataInvalid, SpecInvalid

FLAT = 1e-6
"""Below this share of the answers' length a centred answer is rounding, not a direction."""


def evaluate_distillation(
    transformer: Answering,
    lda_projection: Answering,
    test_data: Tensor,
    *,
    train_data: Tensor | None = None,
    answers: Tensor | None = None,
    answer_of: Tensor | None = None,
) -> dict[str, float | None]:
    """Compare the student's answers with the teacher's, beside predictors that learnt nothing.

    Args:
        transformer: the student.
        lda_projection: the teacher.
        test_data: [n, d], n >= 1, not trained on.
        train_data: [k, d], what it was trained on: the mean answer and the ridge come from it.
        answers: [K, m] to choose among by cosine.
        answer_of: [n] int64, the right one of each test query.

    Returns:
        ``mean_cosine, min_cosine, max_cosine, std_cosine``: of the rows' cosines, the deviation
        over all rows (0 for one; document 001's over n - 1 is NaN there).
        ``centred_cosine``: mean cosine after the teacher's mean answer is taken from both, which
        a shared mean cannot flatter; None where all the teacher's answers are that mean.
        ``mean_vector_cosine``: of that mean answer itself (of ``test_data`` where there is no
        ``train_data``, then an upper bound). ``ridge_cosine``: of an affine map fitted to the
        teacher; None without ``train_data``.
        ``student_accuracy, teacher_accuracy, raw_accuracy``: share of right answers, raw by the
        query itself; None without ``answers``, raw also where d is not m.

    Raises:
        DataInvalid: wrong shapes, values that are not finite, or no rows.
        SpecInvalid: one of ``answers`` and ``answer_of`` alone.
    """
    if (answers is None) != (answer_of is None):
        missing = "answers" if answers is None else "answer_of"
        raise SpecInvalid(f"{missing}: needed beside the other", pointer=f"/{missing}")
    queries = checked_rows(test_data, "test_data")
    with in_mode(lda_projection, training=False), in_mode(transformer, training=False):
        wanted = ask(lda_projection, queries, "lda_projection").double().cpu()
        found = ask(transformer, queries, "transformer").double().cpu()
        seen, taught = queries, wanted
        if train_data is not None:
            seen = checked_rows(train_data, "train_data")
            taught = ask(lda_projection, seen, "lda_projection").double().cpu()
    if found.shape != wanted.shape:
        raise unfit(found, wanted)
    own = queries.double().cpu()
    cosines = functional.cosine_similarity(found, wanted, dim=-1)
    mean = mean_vector(taught)
    null = functional.cosine_similarity(mean.expand_as(wanted), wanted, dim=-1)
    metrics: dict[str, float | None] = {
        "mean_cosine": float(cosines.mean()),
        "min_cosine": float(cosines.min()),
        "max_cosine": float(cosines.max()),
        "std_cosine": float(cosines.std(correction=0)),
        "centred_cosine": _centred(found, wanted, mean),
        "mean_vector_cosine": float(null.mean()),
        "ridge_cosine": None,
        "student_accuracy": None,
        "teacher_accuracy": None,
        "raw_accuracy": None,
    }
    if train_data is not None:
        ridge = fit_ridge(seen.cpu(), taught)(own)
        metrics["ridge_cosine"] = float(functional.cosine_similarity(ridge, wanted, dim=-1).mean())
    if answers is not None and answer_of is not None:
        named = {"student": found, "teacher": wanted, "raw": own}
        metrics |= _accuracies(named, answers, answer_of)
    return metrics


def _centred(found: Tensor, wanted: Tensor, mean: Tensor) -> float | None:
    apart = wanted - mean
    kept = apart.norm(dim=1) > FLAT * wanted.norm(dim=1).mean()
    if not bool(kept.any()):
        return None
    return float(functional.cosine_similarity(found[kept] - mean, apart[kept], dim=-1).mean())


def _accuracies(
    named: Mapping[str, Tensor], answers: Tensor, answer_of: Tensor
) -> dict[str, float | None]:
    among = functional.normalize(checked_rows(answers, "answers").double().cpu(), dim=1)
    right = answer_of.cpu()
    wanted = named["teacher"]
    if among.shape[1] != wanted.shape[1]:
        raise DataInvalid(f"answers: {among.shape[1]} wide; the teacher's are {wanted.shape[1]}")
    inside = right.ndim == 1 and not right.is_floating_point() and len(right) == len(wanted)
    if not inside or not bool(((right >= 0) & (right < len(among))).all()):
        raise DataInvalid(
            f"answer_of: needed are {len(wanted)} whole numbers from 0 to {len(among) - 1}"
        )
    found: dict[str, float | None] = {}
    for name, vectors in named.items():
        fits = vectors.shape[1] == among.shape[1]
        best = (functional.normalize(vectors, dim=1) @ among.T).argmax(1) if fits else None
        found[f"{name}_accuracy"] = None if best is None else float((best == right).double().mean())
    return found
