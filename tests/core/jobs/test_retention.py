"""Which checkpoints are kept, and what a sweep takes: never what a row still names."""

import json
import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import Engine, select

from core.artifacts.store import Blob, LocalStore
from core.db.models import Artifact, CacheEntry, Output, Upload
from core.db.session import reading, transaction
from core.errors import NotFound, OutOfMemory
from core.jobs import control, housekeeping
from core.jobs.runner import Runner
from core.tensors.formats import save_pairs
from tests.conftest import Clock
from tests.core.jobs.acts import (
    a_file,
    chunk_states,
    fanned,
    outputs_of,
    within,
)
from tests.core.kinds.world import CLUSTERING, tiny_pairs
from tests.life import (
    PROJECT,
    claim,
    finish,
    give_up,
    some_file,
    state,
    submit,
    uploaded,
)


def name(seed: int) -> str:
    return f"{seed:064x}"


def train(
    engine: Engine, clock: Clock, scores: list[float | None], *, first: int = 0, done: bool = False
) -> None:
    """Run chunks that leave a checkpoint each, named 1, 2 and so on."""
    for index, score in enumerate(scores, start=first):
        last = done and score == scores[-1] and index == first + len(scores) - 1
        held = claim(engine, clock)
        made = a_file("state", index + 1)
        finish(engine, held, clock, made, score=score, stage_done=last)


def pin(engine: Engine, job_id: str, index: int, *, pinned: bool = True) -> None:
    about = {"project": PROJECT, "stage": "lines", "index": index, "pinned": pinned}
    within(engine, control.pin, job_id, **about)


def test_of_a_chain_the_best_and_the_latest_are_kept(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock, times=9)
    kept = []
    for index, score in enumerate((0.5, 0.3, 0.4, 0.3, 0.2, 0.9)):
        train(engine, clock, [score], first=index)
        kept.append([int(one, 16) for one in outputs_of(engine, job_id)])

    assert kept == [[1], [2], [2, 3], [2, 4], [5], [5, 6]], "of equals the earlier is the best"


def test_without_scores_the_latest_alone_is_kept(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock, times=9)
    train(engine, clock, [None, None, None])

    assert outputs_of(engine, job_id) == [name(3)]


def test_the_latest_stays_though_the_last_chunk_leaves_none(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock, times=3)
    train(engine, clock, [None, None])
    finish(engine, claim(engine, clock), clock, some_file(name(9)))

    assert state(engine, job_id) == "succeeded"
    assert outputs_of(engine, job_id) == [name(2)]


def test_a_chunk_without_a_score_does_not_cost_the_best(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock, times=9)
    train(engine, clock, [0.1, 0.9, None, None])

    assert outputs_of(engine, job_id) == [name(1), name(4)]


def test_what_is_pinned_stays_until_it_is_let_go(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock, times=9)
    train(engine, clock, [0.5])
    pin(engine, job_id, 0)
    train(engine, clock, [0.4, 0.3], first=1)
    assert outputs_of(engine, job_id) == [name(1), name(3)]
    with pytest.raises(NotFound, match="no checkpoint of lines 1"):
        pin(engine, job_id, 1)
    with pytest.raises(NotFound, match="no checkpoint of lines 7"):
        pin(engine, job_id, 7)

    pin(engine, job_id, 0, pinned=False)
    train(engine, clock, [0.2], first=3, done=True)

    assert state(engine, job_id) == "succeeded"
    assert outputs_of(engine, job_id) == [name(4)]
    pin(engine, job_id, 3)


def test_a_chunk_may_pin_what_it_leaves_and_anybody_may_let_it_go(
    engine: Engine, clock: Clock
) -> None:
    job_id = submit(engine, clock, times=9)
    for index in range(4):
        made = a_file("state", index + 1, pinned=index in (0, 1))
        finish(engine, claim(engine, clock), clock, made, score=0.5 - index / 10)
    assert outputs_of(engine, job_id) == [name(1), name(2), name(4)]

    pin(engine, job_id, 1, pinned=False)
    give_up(engine, claim(engine, clock), OutOfMemory("no"), clock)
    about = {"project": PROJECT, "by": "tester", "now": clock()}
    [again] = within(engine, control.retry, job_id, **about)
    assert outputs_of(engine, again.id) == [name(1), name(2), name(4)]
    train(engine, clock, [0.9], first=4, done=True)

    assert state(engine, again.id) == "succeeded"
    assert outputs_of(engine, again.id) == [name(1), name(4), name(5)]


def test_all_checkpoints_are_kept_on_demand(engine: Engine, clock: Clock) -> None:
    chain = submit(engine, clock, times=9, keep_checkpoints="all")
    train(engine, clock, [0.3, 0.2, 0.9])
    assert len(outputs_of(engine, chain)) == 3
    within(engine, control.cancel, chain, project=PROJECT, now=clock())

    blocks = fanned(engine, clock, keep_checkpoints="all")
    for seed in range(7):
        finish(engine, claim(engine, clock), clock, a_file("block", 100 + seed))
    assert state(engine, blocks) == "succeeded"
    assert len(outputs_of(engine, blocks)) == 7


def test_what_a_chain_reads_next_is_never_dropped(engine: Engine, clock: Clock) -> None:
    """Whatever ends it: the latest of a job that failed is what its retry goes on from."""
    job_id = submit(engine, clock, times=9)
    train(engine, clock, [0.1, 0.5, 0.6])
    give_up(engine, claim(engine, clock), OutOfMemory("no"), clock)

    assert outputs_of(engine, job_id) == [name(1), name(3)]


def test_chains_of_other_jobs_and_stages_are_left_alone(engine: Engine, clock: Clock) -> None:
    first = submit(engine, clock, times=9, priority=60)
    train(engine, clock, [0.5])
    within(engine, control.pause, first, project=PROJECT, now=clock())
    second = submit(engine, clock, times=9)
    train(engine, clock, [0.4, 0.3])

    assert outputs_of(engine, first) == [name(1)]
    assert outputs_of(engine, second) == [name(2)]


def test_the_blocks_of_a_finished_job_go_unless_others_may_find_them(
    engine: Engine, clock: Clock
) -> None:
    job_id = fanned(engine, clock)
    for seed in range(6):
        shared = {"cache_key": f"key{seed}"} if seed >= 4 else {}
        finish(engine, claim(engine, clock), clock, a_file("block", seed, **shared))
    pinned = {"stage": "bivectors", "index": 1, "pinned": True}
    within(engine, control.pin, job_id, project=PROJECT, **pinned)
    assert len(outputs_of(engine, job_id)) == 6
    last = [a_file("block", 6), some_file(name(7))]
    finish(engine, claim(engine, clock), clock, *last)

    assert outputs_of(engine, job_id) == [name(1), name(4), name(5)]
    assert outputs_of(engine, job_id, "artifact") == [name(7)]


def test_blocks_stay_that_another_job_wrote_under_the_key_first(
    engine: Engine, clock: Clock
) -> None:
    """On a GPU the same work may give other bytes; a list of blocks names its own job's."""
    for seed in (0, 10):
        job_id = fanned(engine, clock)
        for number in range(6):
            made = a_file("block", seed + number, cache_key=f"key{number}")
            finish(engine, claim(engine, clock), clock, made)
        finish(engine, claim(engine, clock), clock, some_file(name(seed + 9)))

        assert outputs_of(engine, job_id) == [name(seed + number) for number in range(6)]


def stored(store: LocalStore, clock: Clock, text: str) -> str:
    """Put a file that is as old as the test's clock."""
    path = store.root / "made"
    path.write_text(text)
    blob = store.put(path)
    at = clock().timestamp()
    os.utime(store.path(blob.sha256), (at, at))
    return blob.sha256


def swept(engine: Engine, store: LocalStore, clock: Clock, *, dry_run: bool = False) -> list[str]:
    return housekeeping.sweep(engine, store, now=clock(), dry_run=dry_run)


def artifacts(engine: Engine) -> set[str]:
    with reading(engine) as session:
        return set(session.scalars(select(Artifact.sha256)))


def test_a_sweep_takes_what_nothing_names_after_an_hour(
    engine: Engine, clock: Clock, store: LocalStore
) -> None:
    job_id = submit(engine, clock, times=9)
    shas = [stored(store, clock, f"state {number}") for number in range(3)]
    for sha256, score in zip(shas, (0.1, 0.9, 0.8), strict=True):
        made = replace(a_file("state", 0), sha256=sha256)
        finish(engine, claim(engine, clock), clock, made, score=score)
    assert outputs_of(engine, job_id) == [shas[0], shas[2]]
    orphan = stored(store, clock, "no row was ever written")
    clock.tick(minutes=60)
    assert swept(engine, store, clock) == []

    clock.tick(seconds=1)
    wanted = sorted([shas[1], orphan])
    before = artifacts(engine)
    assert sorted(swept(engine, store, clock, dry_run=True)) == wanted
    assert artifacts(engine) == before
    assert all(store.has(one) for one in (*shas, orphan))
    assert sorted(swept(engine, store, clock)) == wanted
    assert artifacts(engine) == before - {shas[1]}
    assert [store.has(one) for one in (*shas, orphan)] == [True, False, True, False]
    assert swept(engine, store, clock) == []


def test_nothing_that_a_row_names_is_ever_swept(
    engine: Engine, clock: Clock, store: LocalStore
) -> None:
    made, sent, found, read = (stored(store, clock, text) for text in "abcd")
    submit(engine, clock)
    held = claim(engine, clock)
    finish(engine, held, clock, some_file(made))
    for sha256 in (sent, read):
        uploaded(engine, Blob(sha256, 1), clock, format_name="pairs", meta={"rows": 9, "dim": 2})
    submit(engine, clock, kind="fit_federated", pairs=read)
    with transaction(engine) as session:
        for row in session.scalars(select(Upload).where(Upload.artifact == read)):
            session.delete(row)
        session.add(
            Artifact(
                sha256=found,
                size_bytes=1,
                format="text",
                media_type="text/plain",
                file_name="x",
                meta={},
                created_at=clock(),
            )
        )
        session.flush()
        session.add(CacheEntry(key="k", sha256=found, created_at=clock()))
    clock.tick(days=4000)

    assert swept(engine, store, clock) == []
    assert all(store.has(one) for one in (made, sent, found, read))


def test_a_file_that_is_made_again_is_not_swept(
    engine: Engine, clock: Clock, store: LocalStore
) -> None:
    """Its row is old and unnamed; its bytes were put a moment ago and will be named again."""
    job_id = submit(engine, clock, times=3)
    sha256 = stored(store, clock, "again and again")
    made = replace(a_file("state", 0), sha256=sha256)
    finish(engine, claim(engine, clock), clock, made)
    finish(engine, claim(engine, clock), clock, a_file("state", 7))
    assert outputs_of(engine, job_id) == [name(7)]
    clock.tick(days=1)
    stored(store, clock, "again and again")

    swept(engine, store, clock)
    assert store.has(sha256)
    finish(engine, claim(engine, clock), clock, made)
    assert outputs_of(engine, job_id) == [sha256]
    assert swept(engine, store, clock) == []


def test_every_block_of_a_target_list_outlives_the_job_that_made_it(
    engine: Engine, store: LocalStore, runner: Runner, tmp_path: Path
) -> None:
    now = Clock()
    now.now = datetime.now(UTC)  # noqa: TID251 - the age of files is the real one
    runner.clock = now
    path = tmp_path / "pairs.safetensors"
    pairs = tiny_pairs()
    save_pairs(path, pairs)
    known = {"format_name": "pairs", "meta": pairs.meta()}
    sha256 = uploaded(engine, store.put(path), now, **known)
    asked = {"clustering": CLUSTERING, "strength": 1.0, "temperature": 0.1}
    fitted = submit(engine, now, kind="fit_federated", pairs=sha256, **asked)
    listed = submit(engine, now, kind="cache_targets", model=f"{fitted}/model", rows_per_chunk=50)
    while runner.run_one():
        pass
    assert (state(engine, listed), chunk_states(engine, fitted)[-1]) == ("succeeded", "done")
    now.tick(days=400)
    gone = swept(engine, store, now)

    [targets] = outputs_of(engine, listed, "artifact")
    blocks = json.loads(store.path(targets).read_text())["blocks"]
    assert len(blocks) == 2
    assert all(store.has(block["sha256"]) for block in blocks)
    assert all(store.has(one) for one in outputs_of(engine, fitted, "artifact"))
    assert gone, "what the fit left between its stages went"
    assert outputs_of(engine, fitted) == []
    with reading(engine) as session:
        named = set(session.scalars(select(Output.sha256)))
    assert not named & set(gone)
