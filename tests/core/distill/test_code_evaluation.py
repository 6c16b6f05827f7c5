"""How codes are judged: small cases by hand, PCA beside them, words on axes, the same files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness

from core.distill.code_evaluation import (
    GIVEN_OTHER,
    TERMS,
    TRUSTED_ROWS,
    CodeEvaluation,
    axis_terms,
    evaluate_codes,
    pca_codes,
)
from core.distill.code_report import HEADER, draw_map, markdown, write_code_report
from core.distill.report_parts import STRONG, draw_loss
from core.errors import DataInvalid
from core.tensors.embeddings import Embeddings, whole
from core.tensors.shards import Array
from tests.core.distill._make import CLUSTERS, make_embeddings, unit

HISTORY = [
    {"epoch": e, "loss": 9 / e, "validation_recall": 0.1 * e, "stage": s, "tau": 4.0 - s}
    for e, s in ((1, 0), (2, 0), (3, 1), (4, 1), (5, 2))
]


def on_a_circle(angles: Sequence[float], groups: str, **changes: object) -> Embeddings:
    """Rows at these angles, a letter of ``groups`` each; the last two are held out."""
    at = np.array(angles)
    made = whole(
        np.column_stack([np.cos(at), np.sin(at)]).astype(np.float32),
        groups=list(groups) if groups else None,
    )
    rows = np.arange(len(at))
    return replace(made, train_rows=rows[:-2], held_out_rows=rows[-2:], **changes)  # type: ignore[arg-type]


def judged(model: Embeddings, **outputs: Array) -> CodeEvaluation:
    named = {name.replace("_", " "): codes for name, codes in outputs.items()}
    return evaluate_codes(named, model, model.held_out_rows, student=None, seed=0)


def test_small_case_by_hand() -> None:
    """Twelve rows: each has eleven others, of which ten are looked at; one is left out."""
    angles = np.linspace(0, 1.1, 12)
    model = on_a_circle(angles, "aaaaaabbbbbb")
    bent = np.arange(12.0)[:, None]
    bent[0] = 20
    ends = np.zeros(12)
    ends[10], ends[11] = 1, 9
    ends[:10] = [2, 3, 4, 5, 6, 7, 8, 1.5, 0.5, 0]

    found = judged(model, right=angles[:, None], bent=bent, third=ends[:, None])

    assert (found.held_out, found.among) == (2, 12)
    # By the teacher rows 10 and 11 are far from row 0 alone.
    assert found.row("right").recall == 1
    # Row 10 is still farthest from row 0 (10), row 11 from row 1 (10, row 0 is at 9).
    assert found.row("bent").recall == pytest.approx(0.95)
    # Row 10 at 1 is farthest from row 11 at 9, row 11 from row 9 at 0: nine each, not row 0.
    assert found.row("third").recall == pytest.approx(0.9)
    # Of the ten nearest by the teacher five are of group a (all but row 0), five of group b.
    assert found.teacher_purity == found.row("right").purity == 0.5
    assert found.row("third").purity == pytest.approx((4 + 4) / 20)
    assert found.row("right").trustworthiness is None, "two rows are too few"
    assert [row.dim for row in found.rows] == [1, 1, 1]


def test_purity_by_hand_with_fewer_rows_than_neighbours() -> None:
    model = on_a_circle([0, 0.1, 0.2, 0.3], "aabb")
    found = judged(model, codes=np.arange(4.0)[:, None])
    assert found.row("codes").recall == 1
    assert found.row("codes").purity == found.teacher_purity == pytest.approx(1 / 3)


def test_without_groups_and_texts_nothing_is_said_of_them() -> None:
    found = judged(on_a_circle([0, 0.1, 0.2, 0.3], ""), codes=np.arange(4.0)[:, None])
    assert (found.teacher_purity, found.row("codes").purity, found.axes) == (None, None, [])
    assert "purity" not in markdown(found, title="T").replace(HEADER, "")
    assert "| codes | 1 | 1.0000 | - | - |" in markdown(found, title="T")


def test_trustworthiness_is_sklearns_by_cosine_among_held_out_rows() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(150, 9)) * rng.uniform(0.2, 5, size=(150, 1))
    rows = np.arange(150)
    model = replace(whole(vectors), train_rows=rows[40:], held_out_rows=rows[:40])
    codes = (vectors[:, :3] + 0.3 * rng.normal(size=(150, 3))).astype(np.float32)

    found = judged(model, codes=codes).row("codes").trustworthiness

    assert len(rows[:40]) <= TRUSTED_ROWS
    wanted = trustworthiness(vectors[:40], codes[:40], n_neighbors=10, metric="cosine")
    assert found == pytest.approx(wanted, abs=1e-12)
    assert judged(model, codes=unit(vectors)).row("codes").trustworthiness == pytest.approx(1)
    few = replace(model, train_rows=rows[20:], held_out_rows=rows[:20])
    assert judged(few, codes=codes).row("codes").trustworthiness is None
    enough = replace(model, train_rows=rows[21:], held_out_rows=rows[:21])
    assert judged(enough, codes=codes).row("codes").trustworthiness is not None


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 6), st.floats(0.1, 10))
def test_turning_and_scaling_codes_changes_no_figure(seed: int, dim: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    model = make_embeddings()
    codes = rng.normal(size=(len(model.embeddings), dim))
    turn = np.linalg.qr(rng.normal(size=(dim, dim)))[0]

    found = judged(model, codes=codes, turned=scale * codes @ turn)

    one, other = found.rows
    assert replace(other, name=one.name) == replace(one, trustworthiness=other.trustworthiness)
    assert other.trustworthiness == pytest.approx(one.trustworthiness)


def test_the_teachers_own_directions_are_the_best_code() -> None:
    model = make_embeddings()
    row = judged(model, own=unit(model.embeddings.astype(np.float64))).row("own")
    assert row.recall == 1
    assert row.trustworthiness == pytest.approx(1)
    assert row.purity == judged(model, own=model.embeddings).teacher_purity


def test_pca_is_sklearns_up_to_signs_and_of_training_rows_alone() -> None:
    model = make_embeddings()
    fitted = PCA(5, svd_solver="full").fit(model.embeddings[model.train_rows].astype(np.float64))

    codes = pca_codes(model, 5)

    wanted = fitted.transform(model.embeddings.astype(np.float64))
    signs = np.sign((codes * wanted).sum(axis=0))
    assert codes.dtype == np.float32
    assert codes == pytest.approx(wanted * signs, abs=1e-5)
    others = model.embeddings.copy()
    others[model.held_out_rows] = others[model.held_out_rows][::-1] * 3
    moved = pca_codes(replace(model, embeddings=others), 5)
    assert np.array_equal(moved[model.train_rows], codes[model.train_rows])


def test_a_student_is_held_against_pca_of_its_own_width_in_words() -> None:
    model = make_embeddings(inputs=False)
    good, noise = pca_codes(model, 5), np.random.default_rng(0).normal(size=(160, 5))
    pca = {"PCA_2-D": pca_codes(model, 2), "PCA_5-D": good}

    equal = judged(model, **pca, **{"student_5-D": good})
    worse = judged(model, **pca, **{"student_5-D": noise})
    better = judged(model, **{**pca, "PCA_5-D": noise, "student_5-D": good})
    wide = judged(model, **pca, **{"student_7-D": pca_codes(model, 7)})

    share = equal.row("PCA 5-D").recall
    for found in (equal, worse):
        [words] = found.words
        assert words.startswith("Warning: student 5-D keeps ")
        assert f"in 5 dimensions, PCA {share:.1%}. The student is worth no more than that" in words
    [words] = better.words
    times = share / better.row("PCA 5-D").recall
    assert words.endswith(f": {times:.2f} times as many.")
    assert wide.words == judged(model, **pca).words == []


def test_more_than_nothing_is_no_multiple_of_it() -> None:
    """Where PCA keeps none of a row's nearest there is nothing to divide by."""
    angles = np.linspace(0, 3, 40)
    model = replace(on_a_circle(angles, ""), held_out_rows=np.array([0]), train_rows=np.arange(39))
    far = np.abs(np.arange(40.0) - 20)[:, None]
    far[0] = 20
    far[1:15] = 0
    outputs = {"PCA_1-D": far, "student_1-D": angles[:, None]}
    found = judged(model, **outputs)
    assert found.row("PCA 1-D").recall == 0
    assert found.words == [
        "student 1-D keeps 100.0% of the teacher's nearest 10 in 1 dimensions, PCA 0.0%."
    ]


def test_that_a_student_is_given_something_else_than_pca_is_told() -> None:
    codes = {"PCA_2-D": pca_codes(make_embeddings(), 2)}
    both = {**codes, "student_2-D": codes["PCA_2-D"]}
    assert judged(make_embeddings(), **both).words[1:] == [GIVEN_OTHER]
    assert judged(make_embeddings(), **codes).words == []
    assert GIVEN_OTHER not in judged(make_embeddings(inputs=False), **both).words


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_codes_that_are_no_numbers_are_an_error_that_says_whose(value: float) -> None:
    model = make_embeddings()
    codes = pca_codes(model, 2)
    broken = codes.copy()
    broken[7, 1] = value
    with pytest.raises(DataInvalid, match=r"student: row 7 holds NaN or infinity \(1 such"):
        judged(model, PCA=codes, student=broken)


def planted() -> tuple[Array, list[str]]:
    """Along the first axis boats and trees, along the second nothing."""
    rng = np.random.default_rng(0)
    first = np.repeat([-1.0, 0.0, 1.0], [20, 60, 20])
    words = {-1.0: "sailing boats upon the water", 0.0: "stones", 1.0: "green trees of a forest"}
    texts = [f"{words[value]} {number}" for number, value in enumerate(first)]
    return np.column_stack([first + 0.1 * rng.uniform(size=100), rng.normal(size=100)]), texts


def test_axes_are_told_by_the_words_planted_at_their_ends() -> None:
    codes, texts = planted()

    axes = axis_terms(codes, texts)

    assert [axis.number for axis in axes] == [0, 1]
    assert sorted(axes[0].low) == ["boats", "sailing", "water"], "no stop words, no row numbers"
    assert sorted(axes[0].high) == ["forest", "green", "trees"]
    flipped = axis_terms(-codes, texts)
    assert sorted(flipped[0].high) == sorted(axes[0].low)
    assert all(len(end) <= TERMS for axis in axes for end in (axis.low, axis.high))
    assert axis_terms(codes, texts) == axes


@pytest.mark.parametrize("texts", [["7", "12", "2026"], ["the", "of a", "and"], ["", " ", "?"]])
def test_texts_without_words_say_nothing(texts: list[str]) -> None:
    assert axis_terms(np.arange(3.0)[:, None], texts) == []


def test_one_text_for_all_tells_no_ends_apart() -> None:
    [axis] = axis_terms(np.arange(30.0)[:, None], ["the same words"] * 30)
    assert (axis.low, axis.high) == ([], [])


def whole_evaluation() -> tuple[CodeEvaluation, dict[str, Array], Embeddings]:
    model = make_embeddings()
    _, texts = planted()
    model = replace(model, texts=[texts[row % 100] for row in range(160)])
    named = {"PCA 2-D": pca_codes(model, 2), "student 2-D": pca_codes(model, 3)[:, 1:]}
    found = evaluate_codes(
        named, model, model.held_out_rows, student="student 2-D", seed=0, remarks=["Stopped."]
    )
    return found, {"student 2-D": named["student 2-D"]}, model


def test_files_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    written = []
    for name in ("one", "two"):
        found, codes, model = whole_evaluation()
        (tmp_path / name).mkdir()
        paths = write_code_report(
            tmp_path / name,
            found,
            codes=codes,
            groups=model.groups,
            title="T",
            history=HISTORY,
            facts={"b": 1, "a": 2},
        )
        written.append({key: path.read_bytes() for key, path in paths.items()})

    assert written[0] == written[1]
    pictures = {"recall_png", "map_png", "loss_curve_png"}
    assert set(written[0]) == {"report_json", "report_md", *pictures}
    assert all(written[0][name].startswith(b"\x89PNG") for name in pictures)


def test_the_report_holds_rows_words_axes_and_settings(tmp_path: Path) -> None:
    found, codes, _ = whole_evaluation()
    facts = {"model": "abc"}
    paths = write_code_report(tmp_path, found, codes=codes, groups=None, title="C", facts=facts)

    told = json.loads(paths["report_json"].read_text())
    text = paths["report_md"].read_text()

    assert "NaN" not in paths["report_json"].read_text()
    assert "loss_curve" not in " ".join([text, *paths])
    assert (told["title"], told["facts"], told["history"]) == ("C", facts, [])
    assert [row["name"] for row in told["evaluation"]["rows"]] == ["PCA 2-D", "student 2-D"]
    assert [axis["number"] for axis in told["evaluation"]["axes"]] == [0, 1]
    assert f"32 held-out rows, their nearest 10 looked for among {160} rows" in text
    assert f"group purity {found.teacher_purity:.4f}" in text
    for row in found.rows:
        [line] = [line for line in text.splitlines() if line.startswith(f"| {row.name} |")]
        assert line.count("|") == HEADER.count("|")
        assert f"| {row.recall:.4f} | {row.trustworthiness:.4f} | {row.purity:.4f} |" in line
    for sentence in found.words:
        assert f"- {sentence}\n" in text
    assert found.words[-1] == "Stopped."
    for axis in found.axes:
        assert f"| {axis.number} | {', '.join(axis.low)} | {', '.join(axis.high)} |" in text
    assert '"model": "abc"' in text


@pytest.mark.parametrize("dim", [1, 2, 7])
def test_codes_of_any_width_are_drawn(tmp_path: Path, dim: int) -> None:
    draw_map(tmp_path / "map.png", "codes", pca_codes(make_embeddings(), dim), None)
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    draw_map(tmp_path / "same.png", "codes", np.ones((20, dim)), None)
    assert (tmp_path / "same.png").read_bytes().startswith(b"\x89PNG")


def test_groups_are_named_in_the_map_whatever_they_are_called(tmp_path: Path) -> None:
    codes = pca_codes(make_embeddings(), 2)
    pictures = []
    for first in (r"$\no formula$", "$_{", "_left out", "_left in", "x" * 300, "plain"):
        names = [first, *(f"group {number}" for number in range(1, CLUSTERS))]
        groups = [names[row % CLUSTERS] for row in range(len(codes))]
        draw_map(tmp_path / "map.png", "codes", codes, groups)
        pictures.append((tmp_path / "map.png").read_bytes())
    assert len(set(pictures)) == len(pictures), "each is seen in the legend"


def drawn_at(path: Path, colour: str) -> int:
    """Count pixels of a colour inside the axes, without labels and legend."""
    picture = imread(path)[..., :3]
    height, width, _ = picture.shape
    inside = picture[height // 6 : -height // 6, width // 8 : -width // 5]
    return int((np.abs(inside - to_rgb(colour)).max(axis=2) < 0.02).sum())


def test_the_loss_is_drawn_a_curve_per_stage(tmp_path: Path) -> None:
    plain = [{key: row[key] for key in ("epoch", "loss", "validation_recall")} for row in HISTORY]
    pictures = []
    for name, history in (("staged", HISTORY), ("plain", plain)):
        draw_loss(tmp_path / f"{name}.png", history)
        pictures.append((tmp_path / f"{name}.png").read_bytes())
        assert drawn_at(tmp_path / f"{name}.png", STRONG) > 50
    assert pictures[0] != pictures[1]
    hotter = [{**row, "tau": row["tau"] + 1} for row in HISTORY]
    draw_loss(tmp_path / "hotter.png", hotter)
    assert (tmp_path / "hotter.png").read_bytes() != pictures[0], "temperatures are told"


def test_a_single_epoch_and_none_are_drawn_too(tmp_path: Path) -> None:
    draw_loss(tmp_path / "one.png", HISTORY[:1])
    draw_loss(tmp_path / "none.png", [])
    assert drawn_at(tmp_path / "one.png", STRONG) > 0, "the one score is a point"
    assert (tmp_path / "none.png").read_bytes().startswith(b"\x89PNG")
    assert drawn_at(tmp_path / "none.png", STRONG) == 0


def test_a_loss_of_nothing_and_many_stages_are_drawn(tmp_path: Path) -> None:
    many = [
        {"epoch": e, "loss": 0.0 if e == 3 else 1.0, "validation_cosine": 0.5, "stage": e, "tau": 1}
        for e in range(40)
    ]
    draw_loss(tmp_path / "many.png", many)
    assert (tmp_path / "many.png").read_bytes().startswith(b"\x89PNG")
