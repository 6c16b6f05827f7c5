"""How the figures are served; what they say is tests/core/jobs/test_figures.py."""

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text
from starlette.testclient import TestClient

from core.jobs.projects import FIRST_PROJECT
from tests.api.conftest import ECHO, KEY, make_settings, problem_of, runner_of, serving
from tests.conftest import Clock

METRICS_KEY = "only-for-the-metrics"


def families(answer: Any) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    return {family.name: family for family in text_string_to_metric_families(answer.text)}


def test_the_page_is_what_prometheus_reads(tmp_path: Path, clock: Clock) -> None:
    with serving(make_settings(tmp_path / "data"), clock) as client:
        client.post("/v1/jobs", json=ECHO)
        client.post("/v1/jobs", json=ECHO)
        runner = runner_of(client)
        for _ in range(3):
            runner.run_one()
        answer = client.get("/metrics")

    found = families(answer)
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert all(name.startswith("stillroom_") for name in found)
    assert all(family.documentation for family in found.values())
    [finished] = found["stillroom_jobs_finished"].samples
    labels = {"project": FIRST_PROJECT, "kind": "echo", "state": "succeeded"}
    assert (finished.name, finished.labels, finished.value) == (
        "stillroom_jobs_finished_total",
        labels,
        1,
    )
    [build] = found["stillroom_build_info"].samples
    assert (build.labels["database"], build.labels["mode"]) == ("sqlite", "embedded")


def test_the_handbook_names_every_figure_and_no_other(client: TestClient) -> None:
    handbook = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    named = set(re.findall(r"stillroom_[a-z_]+[a-z]", handbook))

    assert named == set(re.findall(r"(?m)^# TYPE (\w+)", client.get("/metrics").text))


def test_openmetrics_is_spoken_to_who_asks(client: TestClient) -> None:
    accept = {"Accept": "application/openmetrics-text;version=1.0.0"}
    answer = client.get("/metrics", headers=accept)

    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


def test_a_scrape_is_remembered_for_a_second_at_most(tmp_path: Path, clock: Clock) -> None:
    def queued(client: TestClient) -> float:
        family = families(client.get("/metrics"))["stillroom_jobs"]
        return sum(s.value for s in family.samples if s.labels["state"] == "queued")

    with serving(make_settings(tmp_path / "data"), clock) as client:
        assert queued(client) == 0
        client.post("/v1/jobs", json=ECHO)
        clock.tick(milliseconds=999)
        assert queued(client) == 0
        clock.tick(milliseconds=1)
        assert queued(client) == 1
        client.post("/v1/jobs", json=ECHO)
        clock.now -= timedelta(hours=1)
        assert queued(client) == 2, "a clock set back makes nothing last"


def test_the_metrics_key_opens_the_metrics_and_nothing_else(tmp_path: Path, clock: Clock) -> None:
    settings = make_settings(tmp_path / "data", api_key=KEY, metrics_key=METRICS_KEY)
    with serving(settings, clock) as client:
        problem_of(client.get("/metrics"), 401, "unauthorized")
        scraper = {"Authorization": f"Bearer {METRICS_KEY}"}
        assert families(client.get("/metrics", headers=scraper))
        assert families(client.get("/metrics", headers={"Authorization": f"Bearer {KEY}"}))
        for path in ("/v1/jobs", "/v1/kinds", "/openapi.json", "/"):
            assert client.get(path, headers=scraper).status_code in (401, 403), path
        problem_of(client.post("/v1/jobs", json=ECHO, headers=scraper), 403, "forbidden")


def test_a_database_that_is_away_is_a_503(tmp_path: Path, clock: Clock) -> None:
    with serving(make_settings(tmp_path / "data"), clock) as client:
        with client.app.state.context.engine.begin() as connection:  # type: ignore[attr-defined]
            connection.execute(text("ALTER TABLE workers RENAME TO gone"))

        problem_of(client.get("/metrics"), 503, "database_unavailable")
