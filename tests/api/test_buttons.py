"""The life cycle from a browser: pages show what the state allows."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.api.conftest import ECHO, Desk, key_of, runner_of
from tests.api.test_pages import check_page


def press(desk: Desk, path: str, **more: Any) -> Any:
    """Send a form as a browser does, with the operator's cookie."""
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    return desk.server.post(path, headers={**desk.key, **form}, **more)


def test_the_buttons_of_the_page_are_those_that_the_state_allows(desk: Desk) -> None:
    job = desk.submit(times=3)

    def buttons() -> set[str]:
        answer = desk.server.get(f"/jobs/{job}", headers=desk.key)
        actions = [at.get("action") or "" for tag, at in check_page(answer).found if tag == "form"]
        return {action.removeprefix(f"/jobs/{job}/") for action in actions} - {"/logout"}

    assert buttons() == {"pause", "cancel", "priority"}
    assert press(desk, f"/jobs/{job}/pause").headers["location"] == f"/jobs/{job}"
    assert buttons() == {"resume", "cancel", "priority"}
    press(desk, f"/jobs/{job}/resume")
    runner_of(desk.server).run_one()
    assert buttons() == {"pause", "cancel", "priority", "checkpoints/lines/0/pin"}
    press(desk, f"/jobs/{job}/checkpoints/lines/0/pin")
    assert "checkpoints/lines/0/unpin" in buttons()
    press(desk, f"/jobs/{job}/checkpoints/lines/0/unpin")
    assert press(desk, f"/jobs/{job}/priority", data={"priority": "77"}).status_code == 303
    assert desk.show(job)["priority"] == 77
    press(desk, f"/jobs/{job}/cancel")
    assert "retry" in buttons()
    made = press(desk, f"/jobs/{job}/retry").headers["location"]
    assert "retry" not in buttons()
    assert f'href="{made}"' in desk.server.get(f"/jobs/{job}", headers=desk.key).text
    assert f'href="/jobs/{job}"' in desk.server.get(made, headers=desk.key).text


@pytest.mark.parametrize("text", ["", "high", "101", "-1", "5.5", "²", "1" * 50])
def test_a_wrong_priority_is_told_on_a_page(client: TestClient, text: str) -> None:
    job = client.post("/v1/jobs", json=ECHO).json()["id"]

    answer = client.post(f"/jobs/{job}/priority", data={"priority": text})

    check_page(answer, 422)
    assert "allowed: 0 to 100" in answer.text
    check_page(client.post("/jobs/nothing/priority", data={"priority": text}), 404)


def test_who_may_only_read_sees_no_button(desk: Desk) -> None:
    job = desk.submit()
    reader = key_of(desk.server, "prj_default", "read")

    answer = desk.server.get(f"/jobs/{job}", headers=reader)

    assert f"/jobs/{job}/" not in [at.get("action") for _, at in check_page(answer).found]
    assert "Pause" not in answer.text
    assert "no worker is alive" in answer.text
