"""What two transactions do to each other, on both databases."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine, select

from core.artifacts.store import LocalStore
from core.db.models import CacheEntry, Chunk, Job
from core.db.session import insert_new, reading, transaction
from core.errors import InFlight, SpecInvalid
from core.jobs import control, planning, recovery, service
from core.jobs.adoption import Stored
from core.jobs.lease import Claim
from core.kinds._base import kinds
from core.kinds.echo import Spec
from core.tensors.formats import Pairs, save_pairs
from tests.conftest import Clock
from tests.life import BY, PROJECT, RULES, claim, finish, state, submit, try_claim, uploaded


def model_file(store: LocalStore, clock: Clock) -> Stored:
    """What a fit hands over; the bytes do not matter to a plan."""
    path = store.root / "model"
    path.write_bytes(b"model")
    meta = {"clusters": 4, "dim": 16, "rows": 90, "held_out": 30, "temperature": 0.1, "pairs": None}
    return Stored(
        name="model",
        role="artifact",
        sha256=store.put(path).sha256,
        size_bytes=5,
        format="federated_model",
        media_type="application/octet-stream",
        file_name="model.safetensors",
        meta=meta,
        cache_key=None,
        cached=False,
    )


@pytest.fixture
def fit(engine: Engine, clock: Clock, store: LocalStore) -> str:
    """A fit whose last chunk is about to run."""
    path = store.root / "pairs.safetensors"
    some = np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)
    pairs = Pairs([str(row) for row in range(40)], some, some)
    save_pairs(path, pairs)
    blob = store.put(path)
    uploaded(engine, blob, clock, format_name="pairs", meta=pairs.meta())
    job_id = submit(engine, clock, kind="fit_federated", pairs=blob.sha256)
    while True:
        claimed = claim(engine, clock)
        if claimed.stage == "assemble":
            break
        finish(engine, claimed, clock)
    recovery.release_all(engine, owner_prefix="w", now=clock(), rules=RULES)
    return job_id


def together(*works: Callable[[], Any]) -> list[Any]:
    """Run at once; return results, or the errors."""

    def safely(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except InFlight as error:
            return error

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(safely, works))


def submit_while(engine: Engine, clock: Clock, fit: str, other: Callable[[], None]) -> str:
    """Submit a job that reads a fit's model; ``other`` happens in the middle of it."""
    submitting = threading.Event()
    spec = kinds()["cache_targets"].spec.model_validate(
        {"kind": "cache_targets", "model": f"{fit}/model"}
    )

    def submits() -> str:
        with transaction(engine) as session:
            planning.resolve(
                session, spec, project=PROJECT
            )  # the upstream's state is read, nothing written yet
            submitting.set()
            time.sleep(0.5)
            return service.submit(session, spec, project=PROJECT, by=BY, now=clock()).id

    def interferes() -> None:
        submitting.wait()
        other()

    job_id: str = together(submits, interferes)[0]
    return job_id


def test_a_job_submitted_while_its_upstream_finishes_is_planned(
    engine: Engine, clock: Clock, store: LocalStore, fit: str
) -> None:
    """Whoever commits first, the other must see it: else the job would wait for ever."""
    last: Claim = claim(engine, clock)
    made = model_file(store, clock)
    job_id = submit_while(engine, clock, fit, lambda: finish(engine, last, clock, made))

    assert state(engine, fit) == "succeeded"
    assert state(engine, job_id) == "queued"


def test_a_job_submitted_while_its_upstream_is_cancelled_does_not_wait(
    engine: Engine, clock: Clock, fit: str
) -> None:
    def cancels() -> None:
        with transaction(engine) as session:
            control.cancel(session, fit, project=PROJECT, now=clock())

    job_id = submit_while(engine, clock, fit, cancels)

    assert state(engine, job_id) == "failed"


def test_one_idempotency_key_makes_one_job(engine: Engine, clock: Clock) -> None:
    for round_number in range(5):
        key = f"key{round_number}"

        def once(key: str = key) -> str:
            with transaction(engine) as session:
                about = {"project": PROJECT, "by": BY, "now": clock()}
                job, _ = service.submit_once(
                    session, Spec(text="hi"), key=key, body_sha256="b", **about
                )
                return job.id

        answers = together(once, once, once)

        ids = {answer for answer in answers if isinstance(answer, str)}
        assert len(ids) == 1
        assert once() in ids
    with reading(engine) as session:
        assert len(session.scalars(select(Job.id)).all()) == 5


def test_insert_new_tells_whether_the_row_was_new(engine: Engine, clock: Clock) -> None:
    from core.db.models import ServiceFact

    with transaction(engine) as session:
        assert insert_new(session, ServiceFact, {"key": "k", "value": "1"})
        assert not insert_new(session, ServiceFact, {"key": "k", "value": "2"})
        assert session.get_one(ServiceFact, "k").value == "1"
        assert session.scalars(select(CacheEntry)).all() == []


def test_related_upstreams_may_be_cancelled_at_once(engine: Engine, clock: Clock, fit: str) -> None:
    """Everybody locks jobs in the order of their ids: no deadlock."""
    with reading(engine) as session:
        pairs = service.get(session, fit).spec["pairs"]
    for _ in range(8):
        first, second = (submit(engine, clock, kind="fit_federated", pairs=pairs) for _ in range(2))
        lost = []
        for model in (first, second, first, second):
            cache = submit(engine, clock, kind="cache_targets", model=f"{model}/model")
            below = {"kind": "distill", "targets": f"{cache}/targets"}
            lost += [cache]
            lost += [submit(engine, clock, model=f"{m}/model", **below) for m in (first, second)]

        def cancels(job_id: str) -> None:
            with transaction(engine) as session:
                control.cancel(session, job_id, project=PROJECT, now=clock())

        together(lambda f=first: cancels(f), lambda s=second: cancels(s))

        assert {state(engine, job_id) for job_id in (first, second)} == {"cancelled"}
        assert {state(engine, job_id) for job_id in lost} == {"failed"}


def test_many_claimers_never_share_a_chunk(engine: Engine, clock: Clock) -> None:
    for _ in range(30):
        submit(engine, clock)

    def claims() -> list[int]:
        mine = []
        while (found := try_claim(engine, clock)) is not None:
            mine.append(found.chunk_id)
        return mine

    taken = [chunk for mine in together(claims, claims, claims, claims) for chunk in mine]

    assert len(taken) == len(set(taken)) == 30
    with reading(engine) as session:
        assert set(session.scalars(select(Chunk.attempt))) == {1}


def test_labels_are_found_whatever_their_value(engine: Engine, clock: Clock) -> None:
    values = ["ключ", 'we"ird', "back\\slash", "a.b/c", "%", "x' OR 1=1"]
    ids = [submit(engine, clock, labels={"team.a/b": value}) for value in values]

    for job_id, value in zip(ids, values, strict=True):
        with reading(engine) as session:
            found, _ = service.list_jobs(session, limit=9, labels={"team.a/b": value})
        assert [job.id for job in found] == [job_id]
    for key in ('a"b', "ключ", "back\\slash", ""):
        with pytest.raises(SpecInvalid, match="label"), reading(engine) as session:
            service.list_jobs(session, limit=9, labels={key: "x"})
        with pytest.raises(ValueError, match="labels"):
            Spec(text="x", labels={key: "x"})
