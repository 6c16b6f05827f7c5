"""A fit of an LDA teacher is what its rule says, looks at no held-out row, and chooses soundly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from core.distill.choosing import STRENGTHS, choose
from core.distill.lda import MultiHeadLDA
from core.distill.lda_fitting import TEMPERATURES, fit, fit_maps, prepare, routing_scores
from core.distill.retrieval import Index
from core.errors import SpecInvalid
from core.specs.clusterings import Groups, KMeans
from core.tensors.formats import Pairs
from core.tensors.lda import check_lda, load_lda, save_lda
from core.tensors.lda_db import load_lda_db, save_lda_db
from core.tensors.shards import Array
from tests.core.distill._lda_formula import drawn, reference

_FILE = "shared/data/lda_qa/embeddings_minilm_l6_v2.npz"
QA = next((up / _FILE for up in Path(__file__).parents if (up / _FILE).exists()), None)


def toy_pairs(rows: int = 90, heads: int = 3, dim: int = 8, noise: float = 0.3) -> Pairs:
    """Questions near one of a few directions; all of a group have the same answer."""
    random = np.random.default_rng(0)
    centres, answers = random.normal(size=(2, heads, dim))
    group = np.arange(rows) % heads
    queries = centres[group] + noise * random.normal(size=(rows, dim))
    queries *= random.uniform(0.5, 2, size=(rows, 1))
    return Pairs(
        ids=[str(row) for row in range(rows)],
        queries=queries.astype(np.float32),
        targets=answers[group].astype(np.float32),
        groups=[f"answer {number}" for number in group],
    )


def test_a_head_is_the_mean_of_its_questions_directions_and_its_answer() -> None:
    pairs = toy_pairs()

    model = fit(pairs, Groups(), seed=0)

    check_lda(model)
    assert sorted(model.cluster_ids) == ["answer 0", "answer 1", "answer 2"]
    for number, name in enumerate(model.cluster_ids):
        rows = [row for row in model.train_rows if pairs.groups and pairs.groups[row] == name]
        units = pairs.queries[rows].astype(np.float64)
        units /= np.linalg.norm(units, axis=1, keepdims=True)
        np.testing.assert_allclose(model.centroids[number], units.mean(axis=0), atol=1e-6)
        assert model.answers is not None
        np.testing.assert_allclose(model.answers[number], pairs.targets[rows[0]], atol=1e-6)
    assert model.temperature in TEMPERATURES
    assert len(model.manifest["scores"]) == len(TEMPERATURES)
    assert not set(model.train_rows) & set(model.held_out_rows)
    queries = torch.from_numpy(pairs.queries[model.held_out_rows])
    found = MultiHeadLDA.of(model)(queries).numpy()
    assert (Index(pairs.targets).ranks(found, model.held_out_rows) < 1).mean() > 0.9


def test_no_held_out_row_has_a_say() -> None:
    pairs = toy_pairs()
    before = fit(pairs, Groups(), seed=0)
    assert pairs.groups is not None
    targets, groups = pairs.targets.copy(), list(pairs.groups)
    for row in before.held_out_rows:
        targets[row], groups[row] = -targets[row], "an answer never seen"

    after = fit(Pairs(pairs.ids, pairs.queries, targets, groups), Groups(), seed=0)

    for name in ("centroids", "answers", "cluster_of"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
    assert after.cluster_ids == before.cluster_ids
    assert after.manifest == before.manifest


def test_routing_scores_are_what_hiding_by_hand_gives() -> None:
    pairs = toy_pairs(rows=30)
    prepared = prepare(pairs, Groups(), seed=4, test_fraction=0.2)

    [score] = routing_scores(prepared, [0.2], seed=4)

    order = np.random.default_rng(5).permutation(len(prepared.queries))
    _, which = np.unique(np.arange(len(prepared.queries)), return_inverse=True)
    logs = []
    for fold in range(5):
        hidden = order[which] % 5 == fold
        units = prepared.queries.astype(np.float64)
        units /= np.linalg.norm(units, axis=1, keepdims=True)
        heads = np.stack(
            [units[~hidden & (prepared.cluster_of == c)].mean(axis=0) for c in range(3)]
        )
        weights, _ = reference(prepared.queries[hidden], heads, heads, 0.2)
        logs += list(np.log(weights[np.arange(hidden.sum()), prepared.cluster_of[hidden]]))
    assert len(logs) == len(prepared.queries)
    assert score.log_score == pytest.approx(np.mean(logs), abs=1e-5)


def test_equal_questions_are_hidden_together_and_lonely_ones_not_judged() -> None:
    single = Pairs(
        ids=list("abcd"),
        queries=np.eye(4, dtype=np.float32),
        targets=np.eye(4, dtype=np.float32),
        groups=list("abcd"),
    )
    with pytest.raises(SpecInvalid, match="no cluster of the training rows has two different"):
        fit(single, Groups(), seed=0)
    twice = np.repeat(single.queries, 3, axis=0)
    repeated = Pairs([str(row) for row in range(12)], twice, twice, [*"aaabbbcccddd"])
    with pytest.raises(SpecInvalid, match="no cluster of the training rows has two different"):
        fit(repeated, Groups(), seed=0)
    model = fit(single, Groups(), seed=0, temperature=0.1)
    assert len(model.centroids) == 3
    assert model.manifest["scores"] == []


def test_clusters_held_out_make_no_sense_for_answers() -> None:
    with pytest.raises(SpecInvalid, match="allowed: split 'query', or mode 'maps'"):
        prepare(toy_pairs(), Groups(), seed=0, test_fraction=0.3, split="cluster")
    model = fit(toy_pairs(), Groups(), mode="maps", split="cluster", seed=0, test_fraction=0.34)
    assert len(model.cluster_ids) == 2


@pytest.mark.parametrize(("rows", "strength"), [(4, 0.5), (4, 1e9), (40, 2.0)])
def test_maps_are_ridge_regression_to_the_global_map(rows: int, strength: float) -> None:
    x, y = drawn(1, rows, 6), drawn(2, rows, 6)
    half = np.arange(rows) % 2

    maps = fit_maps(x, y, half, strength=strength)

    penalty = strength * np.square(x).sum(axis=1).mean()
    anchor = ridge(x, y, np.eye(6), penalty)
    for number in range(2):
        own = half == number
        exact = ridge(x[own], y[own], anchor, penalty)
        np.testing.assert_allclose(maps[number], exact, atol=2e-6)
    if strength == 1e9:
        np.testing.assert_allclose(maps[0], np.eye(6), atol=1e-5)


def ridge(x: Array, y: Array, anchor: Array, penalty: float) -> Array:
    """Least squares with the anchor's rows beside the data: an other way to the same minimum."""
    d = x.shape[1]
    stacked = np.concatenate([x, np.sqrt(penalty) * np.eye(d)])
    wanted = np.concatenate([y, np.sqrt(penalty) * anchor])
    solved: Array = np.linalg.lstsq(stacked, wanted, rcond=None)[0]
    return solved


def test_maps_beat_the_raw_question_where_questions_are_turned() -> None:
    random = np.random.default_rng(0)
    turn = np.linalg.qr(random.normal(size=(8, 8)))[0]
    queries = random.normal(size=(200, 8)).astype(np.float32)
    pairs = Pairs([str(row) for row in range(200)], queries, (queries @ turn).astype(np.float32))

    model = fit(pairs, KMeans(max_clusters=3), mode="maps", seed=0)

    rows = model.held_out_rows
    found = MultiHeadLDA.of(model)(torch.from_numpy(queries[rows])).numpy()
    index = Index(pairs.targets)
    assert (index.ranks(found, rows) < 1).mean() > 0.9
    assert (index.ranks(queries[rows], rows) < 1).mean() < 0.3
    assert model.manifest["strength"] in STRENGTHS
    assert len(model.manifest["scores"]) == len(STRENGTHS) * len(TEMPERATURES)


def qa() -> tuple[Pairs, Tensor, Array]:
    if QA is None:
        pytest.skip(f"{_FILE} is in no folder above this one")
    with np.load(QA) as found:
        which, answers = found["query_cluster"], found["answer_embeddings"]
        ids, queries = found["cluster_ids"].tolist(), found["query_embeddings"]
    pairs = Pairs(
        ids=[str(row) for row in range(len(queries))],
        queries=queries,
        targets=answers[which],
        groups=[ids[number] for number in which],
    )
    return pairs, torch.from_numpy(answers), which


def accuracy(found: Tensor, answers: Tensor, right: Array) -> float:
    units = torch.nn.functional.normalize(answers, dim=1)
    return float((np.asarray((found @ units.T).argmax(dim=1)) == right).mean())


def test_public_questions_find_their_answers_on_held_out_rows() -> None:
    """Raw and teacher on the same held-out questions of the public set, seeds 0 to 4."""
    pairs, answers, which = qa()
    rows: dict[str, list[float]] = {"raw": [], "answers": [], "at 0.03": [], "maps": []}
    for seed in range(5):
        for name, mode, temperature in (
            ("answers", "answers", None),
            ("at 0.03", "answers", 0.03),
            ("maps", "maps", None),
        ):
            model = fit(pairs, Groups(), mode=mode, seed=seed, temperature=temperature)  # type: ignore[arg-type]
            held = model.held_out_rows
            queries = torch.from_numpy(pairs.queries[held])
            found = MultiHeadLDA.of(model)(queries)
            rows[name].append(accuracy(found, answers, which[held]))
        rows["raw"].append(accuracy(queries, answers, which[held]))
        assert choose(routing_scores(
            prepare(pairs, Groups(), seed=seed, test_fraction=0.2), TEMPERATURES, seed=seed
        )).temperature in (0.05, 0.07)  # fmt: skip
    means = {name: round(float(np.mean(found)), 3) for name, found in rows.items()}
    print(means)
    assert means["answers"] > 0.7
    assert abs(means["answers"] - means["at 0.03"]) < 0.03
    assert means["maps"] > means["raw"]


def test_a_public_teacher_survives_both_files(tmp_path: Path) -> None:
    pairs, _, _ = qa()
    model = fit(pairs, Groups(), seed=0)
    save_lda(tmp_path / "model.safetensors", model)
    save_lda_db(tmp_path / "lda.db", {"questions": model})
    queries = torch.from_numpy(pairs.queries)

    wanted = MultiHeadLDA.of(model)(queries)

    for name in ("model.safetensors", "lda.db"):
        assert torch.equal(MultiHeadLDA.load(tmp_path / name)(queries), wanted)
    assert load_lda(tmp_path / "model.safetensors").meta() == model.meta()
    assert load_lda_db(tmp_path / "lda.db").meta()["rows"] == len(model.queries)
