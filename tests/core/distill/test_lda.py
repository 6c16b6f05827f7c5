"""The LDA teacher is its formula, in float64 too, whatever the sizes; and fits choose soundly."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from core.distill import lda as lda_module
from core.distill.choosing import STRENGTHS, choose
from core.distill.lda import MultiHeadLDA
from core.distill.lda_fitting import TEMPERATURES, fit, fit_maps, prepare, routing_scores
from core.distill.retrieval import Index
from core.errors import DataInvalid, SpecInvalid
from core.specs.clusterings import Groups, KMeans
from core.tensors.formats import Pairs
from core.tensors.lda import Mode, check_lda, load_lda, save_lda
from core.tensors.lda_db import load_lda_db, save_lda_db
from core.tensors.shards import Array
from tests.core.tensors._lda import DIM, HEADS, WIDTH, some_lda

MODES: tuple[Mode, ...] = get_args(Mode)
_FILE = "shared/data/lda_qa/embeddings_minilm_l6_v2.npz"
QA = next((up / _FILE for up in Path(__file__).parents if (up / _FILE).exists()), None)


def reference(
    queries: Array, centroids: Array, heads: Array, temperature: float
) -> tuple[Array, Array]:
    """The formula in float64, a head at a time: weights [B, N], answers [B, m]."""
    q, c, heads = (array.astype(np.float64) for array in (queries, centroids, heads))
    weights = np.empty((len(q), len(c)))
    for row, number in itertools.product(range(len(q)), range(len(c))):
        cosine = q[row] @ c[number] / np.linalg.norm(q[row]) / np.linalg.norm(c[number])
        weights[row, number] = cosine / temperature
    weights = np.exp(weights - weights.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    answers = np.zeros((len(q), heads.shape[-1]))
    for number, head in enumerate(heads):
        said = head if head.ndim == 1 else q @ head
        answers += weights[:, number, None] * said
    return weights, answers


def drawn(seed: int, *shape: int) -> Array:
    array: Array = np.random.default_rng(seed).normal(size=shape)
    return array


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    rows=st.integers(1, 7),
    heads=st.integers(1, 9),
    dim=st.integers(2, 8),
    width=st.integers(2, 8),
    temperature=st.floats(0.01, 10),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**16),
)
def test_the_formula_in_float64(
    mode: Mode,
    rows: int,
    heads: int,
    dim: int,
    width: int,
    temperature: float,
    scale: float,
    seed: int,
) -> None:
    queries, centroids = drawn(seed, rows, dim) * scale, drawn(seed + 1, heads, dim)
    values = drawn(seed + 2, heads, width) if mode == "answers" else drawn(3, heads, dim, width)
    module = MultiHeadLDA(
        torch.from_numpy(centroids), **{mode: torch.from_numpy(values)}, temperature=temperature
    )

    weights, answers = reference(queries, centroids, values, temperature)

    given_queries = torch.from_numpy(queries)
    np.testing.assert_allclose(module.weights(given_queries), weights, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        module(given_queries), answers, rtol=1e-9, atol=1e-9 * (1 + np.abs(answers).max())
    )
    assert module.num_heads == heads


@pytest.mark.parametrize("mode", MODES)
def test_float32_is_near_float64(mode: Mode) -> None:
    model = some_lda(mode)
    heads = model.answers if model.maps is None else model.maps
    assert heads is not None
    weights, answers = reference(model.queries, model.centroids, heads, 0.03)

    module = MultiHeadLDA.of(model)

    found = module(torch.from_numpy(model.queries))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, answers, atol=1e-4)
    np.testing.assert_allclose(module.weights(torch.from_numpy(model.queries)), weights, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_one_query_is_a_batch_of_one_and_none_is_none(mode: Mode) -> None:
    module = MultiHeadLDA.of(some_lda(mode))
    query = torch.from_numpy(some_lda().queries[0])

    assert module(query).shape == (WIDTH,)
    assert module.weights(query).shape == (HEADS,)
    torch.testing.assert_close(module(query), module(query[None])[0])
    assert module(query[None][:0]).shape == (0, WIDTH)
    with pytest.raises(DataInvalid, match=r"queries: shape \[5\]; needed \[B, 6\] or \[6\]"):
        module(query[:5])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-44, 1e30, 3e38])
def test_no_length_gives_nan_and_zero_weighs_all_alike(mode: Mode, value: float) -> None:
    module = MultiHeadLDA.of(some_lda(mode))
    queries = torch.zeros(2, DIM)
    queries[0, 1] = value
    queries[1] = torch.nan

    weights = module.weights(queries)

    assert weights[0].isfinite().all()
    assert weights[0].sum().item() == pytest.approx(1)
    if value == 0:
        torch.testing.assert_close(weights[0], torch.full((HEADS,), 1 / HEADS))
        if mode == "maps":
            assert not module(queries)[0].any()
    else:
        towards = torch.zeros(DIM)
        towards[1] = 1
        torch.testing.assert_close(weights[0], module.weights(towards), atol=1e-5, rtol=1e-4)
    assert module(queries)[1].isnan().all(), "NaN stays in its own row"


def test_maps_in_blocks_are_the_same() -> None:
    heads, dim, rows = 4096, 64, 200
    maps = torch.from_numpy(drawn(1, heads, dim, 2)).float()
    module = MultiHeadLDA(
        torch.from_numpy(drawn(0, heads, dim)).float(), maps=maps, temperature=0.1
    )
    queries = torch.from_numpy(drawn(2, rows, dim)).float()
    assert rows * heads * dim > 3 * lda_module.BLOCK_ENTRIES

    found = module(queries)

    each = torch.cat([module(query[None]) for query in queries[::37]])
    torch.testing.assert_close(found[::37], each, atol=1e-4, rtol=1e-4)


def test_the_dtype_is_the_buffers_and_gradients_reach_the_query() -> None:
    module = MultiHeadLDA.of(some_lda()).double()
    query = torch.from_numpy(some_lda().queries).requires_grad_()

    answer = module(query)
    answer.sum().backward()

    assert answer.dtype == torch.float64
    assert query.grad is not None
    assert query.grad.any()
    assert not list(module.parameters())
    half = MultiHeadLDA.of(some_lda()).bfloat16()
    assert half(query.detach()).dtype == torch.bfloat16


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["lda.db", "lda.safetensors"])
def test_heads_come_back_exactly_from_either_file(tmp_path: Path, mode: Mode, name: str) -> None:
    module = MultiHeadLDA.of(some_lda(mode))

    module.save(tmp_path / name)
    back = MultiHeadLDA.load(str(tmp_path / name))

    assert back.cluster_ids == module.cluster_ids
    assert back.temperature == module.temperature
    for key, value in module.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key
    queries = torch.from_numpy(some_lda().queries)
    assert torch.equal(back(queries), module(queries))


def test_load_tells_files_by_their_bytes_and_takes_a_projection(tmp_path: Path) -> None:
    save_lda_db(tmp_path / "a.safetensors", {"one": some_lda(), "two": some_lda("maps")})
    save_lda(tmp_path / "b.db", some_lda())

    assert MultiHeadLDA.load(tmp_path / "a.safetensors").maps is not None
    assert MultiHeadLDA.load(tmp_path / "a.safetensors", "one").answers is not None
    assert MultiHeadLDA.load(tmp_path / "b.db").num_heads == HEADS
    with pytest.raises(DataInvalid, match="holds one model"):
        MultiHeadLDA.load(tmp_path / "b.db", "one")
    (tmp_path / "c").write_bytes(b"neither of the two")
    with pytest.raises(DataInvalid, match="not a readable"):
        MultiHeadLDA.load(tmp_path / "c")
    with pytest.raises(FileNotFoundError):
        MultiHeadLDA.load(tmp_path / "d")


def test_what_float32_cannot_hold_is_not_saved(tmp_path: Path) -> None:
    module = MultiHeadLDA(torch.full((2, 2), 1 / 3).double() + 1e-12, torch.eye(2).double(),
                          temperature=1.0)  # fmt: skip
    with pytest.raises(DataInvalid, match=r"centroids: torch.float64 that float32 cannot hold"):
        module.save(tmp_path / "lda.db")
    module.float().save(tmp_path / "lda.db")


ONES = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("heads", "match"),
    [
        ({}, "exactly one of the two"),
        ({"answers": ONES, "maps": torch.ones(3, 4, 4)}, "exactly one of the two"),
        ({"answers": ONES[:2]}, r"answers: shape \[2, 4\]; needed \[3, 'm >= 1'\]"),
        ({"maps": ONES}, r"maps: shape \[3, 4\]; needed \[3, 4, 'm >= 1'\]"),
        ({"maps": torch.ones(3, 5, 4)}, r"maps: shape \[3, 5, 4\]"),
        ({"answers": ONES.double()}, "answers: torch.float64 on cpu"),
        ({"answers": ONES / 0}, "answers: holds NaN or infinity"),
        ({"answers": ONES, "centroids": ONES * 0}, "centroids: row 0 is all zeros"),
        ({"answers": ONES, "centroids": ONES[0]}, r"centroids: shape \[4\]"),
        ({"answers": ONES, "centroids": [[1.0]]}, "centroids: a list; needed a tensor"),
        ({"maps": np.ones((3, 4, 4))}, "maps: a ndarray; needed a tensor"),
        ({"answers": ONES, "centroids": ONES.long()}, "centroids: torch.int64"),
        ({"answers": ONES, "temperature": 0.0}, "temperature: 0.0"),
        ({"answers": ONES, "temperature": float("nan")}, "temperature: nan"),
        ({"answers": ONES, "cluster_ids": ["a", "a", "b"]}, "'a' appears 2 times"),
    ],
)
def test_what_is_no_teacher_is_refused(heads: dict[str, Any], match: str) -> None:
    with pytest.raises(DataInvalid, match=match):
        MultiHeadLDA(**{"centroids": ONES, "temperature": 0.1, **heads})


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
