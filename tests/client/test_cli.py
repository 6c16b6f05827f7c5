import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from client.bars import JobLines
from client.cli import still
from client.commands import up
from client.commands.files import file_names, safe_name
from tests.client.conftest import Run
from tests.client.fake import Fault, World
from tests.client.samples import CANCELLED, FAILED, JOB, UNKNOWN, job_view

FAILURE = {"code": "out_of_memory", "message": "32 GiB needed", "retryable": False, "chunk": None}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["kinds"], 0),
        (["ls"], 0),
        (["ls", "--json"], 0),
        (["ls", "--state", "asleep"], 2),
        (["ls", "--label", "novalue"], 2),
        (["show", JOB], 0),
        (["show", UNKNOWN], 1),
        (["show"], 2),
        (["watch", JOB], 0),
        (["watch", FAILED], 1),
        (["watch", CANCELLED], 3),
        (["cancel", JOB], 1),
        (["get", UNKNOWN], 1),
        (["get", JOB, "nothing_so_named"], 2),
        (["upload", "no-such-file"], 2),
        (["upload", "."], 1),
        (["submit"], 2),
        (["submit", "nokind", "--x", "1"], 2),
        (["submit", "echo"], 2),
        (["submit", "echo", "--text", "hi"], 0),
        (["submit", "echo", "--text", "refused"], 1),
        (["submit", "echo", "--times", "0", "--text", "hi"], 2),
        (["submit", "echo", "--times", "many", "--text", "hi"], 2),
        (["submit", "echo", "--text", "hi", "--set", "novalue"], 2),
        (["submit", "echo", "--text", "hi", "--label", "novalue"], 2),
        (["submit", "--watch", "echo", "--text", "hi"], 2),
        (["--url", "http://127.0.0.1:9", "ls"], 4),
        (["ls", "--url", "http://127.0.0.1:9"], 4),
        (["submit", "echo", "--url", "http://127.0.0.1:9", "--text", "hi"], 4),
        (["ls", "--url", "nonsense"], 4),
        (["ls", "--url", "http://[::1"], 2),
        (["ls", "--api-key", "clé"], 2),
        (["--version"], 0),
        (["no-such-command"], 2),
    ],
)
def test_exit_codes(run: Run, world: World, arguments: list[str], code: int) -> None:
    world.offer("text", b"hello\n")
    world.jobs[FAILED] = job_view(id=FAILED, state="failed", error=FAILURE)
    world.jobs[CANCELLED] = job_view(id=CANCELLED, state="cancelled")

    assert run(*arguments).exit_code == code


@pytest.mark.parametrize("last", [("succeeded", 0), ("failed", 1), ("cancelled", 3)])
def test_watch_ends_with_the_job(run: Run, world: World, last: tuple[str, int]) -> None:
    world.jobs[JOB] = job_view(state="running")
    world.events = [(1, "job.submitted", {}), (2, f"job.{last[0]}", {})]
    assert run("watch", JOB).exit_code == last[1]


@contextmanager
def soon(act: Callable[[], object]) -> Iterator[None]:
    """Call ``act`` in the main thread a moment later, as a signal would."""
    before = signal.signal(signal.SIGALRM, lambda *_: act())
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_ctrl_c_leaves_the_job_running(run: Run, world: World) -> None:
    world.jobs[JOB] = job_view(state="running")
    world.cut_stream_after = 0
    world.events = [(1, "job.submitted", {})]

    with soon(interrupt):
        result = run("watch", JOB)

    assert result.exit_code == 130
    assert "keeps running" in result.stderr
    assert world.jobs[JOB]["state"] == "running"
    assert world.requests("POST", "cancel") == []


def test_help_of_a_kind_shows_fields_defaults_and_descriptions(run: Run) -> None:
    text = run("submit", "echo", "--help").output
    for part in ("--text", "What to say.", "[required]", "--times", "Lines. [default: 1]"):
        assert part in text
    for part in (
        "--loud / --no-loud",
        "[calm|cross]",
        "voice.depth integer (for bass)",
        "voice.name bass|alto",
        "echoes",
    ):
        assert part in text


def test_help_lists_the_kinds_or_says_that_nobody_answers(run: Run) -> None:
    assert "Write a text file." in run("submit", "--help").output
    away = run("submit", "--url", "http://127.0.0.1:9", "--help")
    assert away.exit_code == 0
    assert "no answer" in away.output


def test_submit_and_watch_share_exit_codes(run: Run, world: World) -> None:
    def end_it() -> None:
        if not world.jobs:  # not submitted yet
            signal.setitimer(signal.ITIMER_REAL, 0.1)
        for job in world.jobs.values():
            job["state"] = "failed"

    with soon(end_it):
        assert run("submit", "echo", "--text", "hi", "--watch").exit_code == 1


def test_ls_tells_why_a_job_waits(run: Run, world: World) -> None:
    why = "waits for job_x/model, which is running"
    world.jobs = {
        "a": job_view(id="a", state="waiting", waits_for=why, name="n\x1b[31mred"),
        "b": job_view(id="b", state="failed", error=FAILURE),
    }

    lines = run("ls").stdout.splitlines()

    assert why in lines[0]
    assert "\x1b" not in lines[0]
    assert "32 GiB needed" in lines[1]
    assert len(run("ls", "-n", "1").stdout.splitlines()) == 1
    assert [job["id"] for job in json.loads(run("ls", "--json").stdout)] == ["a", "b"]


def test_show_draws_curves_and_lists_artifacts(run: Run, world: World) -> None:
    sha256 = world.offer("text", b"hello\n")
    world.metrics = {"loss": [[0, 4.0], [1, 2.0], [2, 1.0]], "nothing": [], "one": [[0, 5.0]]}

    text = run("show", JOB).stdout

    assert "4 -> 1" in text
    assert sha256 in text
    assert json.loads(run("show", JOB, "--json").stdout)["metrics"]["loss"][0] == [0, 4.0]


def test_show_lives_with_values_that_are_no_numbers(run: Run, world: World) -> None:
    world.offer("text", b"hello\n")
    world.metrics = {
        "one": [[0, None]],
        "ends": [[0, None], [1, 2.0], [2, None]],
        "odd": [[0, float("inf")], [1, float("nan")], [2, 1e308], [3, -1e308], [4, 1e308]],
    }
    text = run("show", JOB).stdout
    assert "? -> ?" in text
    assert "inf -> 1e+308" in text


def test_get_checks_and_refuses_to_overwrite(run: Run, world: World, tmp_path: Path) -> None:
    world.offer("text", b"hello\n", "../../evil\x1b.txt")
    world.offer("log", b"log\n", "log.txt")
    out = tmp_path / "out"

    assert run("get", JOB, "-o", str(out)).exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == ["evil_.txt", "log.txt"]
    (out / "log.txt").write_bytes(b"mine")
    refused = run("get", JOB, "log", "-o", str(out))
    assert refused.exit_code == 1
    assert "log.txt exists" in refused.stderr
    assert run("get", JOB, "log", "-o", str(out), "--force").exit_code == 0
    assert (out / "log.txt").read_bytes() == b"log\n"
    found = json.loads(run("get", JOB, "-o", str(out), "--json").stdout)
    assert {row["name"] for row in found} == {"text", "log"}


def test_get_of_an_unfinished_job_says_so(run: Run, world: World) -> None:
    world.jobs[JOB] = job_view(state="running")
    result = run("get", JOB)
    assert result.exit_code == 1
    assert "is running" in result.stderr


def test_upload_prints_hash_format_and_facts(run: Run, world: World, tmp_path: Path) -> None:
    (tmp_path / "p.npz").write_bytes(b"0123456789" * 300)
    text = run("upload", str(tmp_path / "p.npz")).stdout
    for part in (world.uploads["up_0"]["artifact"], "pairs", "rows=6", "dim=3", "mended"):
        assert part in text


def test_json_errors_are_json(run: Run, world: World) -> None:
    world.api_key = "k" * 16
    result = run("ls", "--json", "--api-key", "wrong")
    assert json.loads(result.stderr)["error"]["code"] == "unauthorized"
    assert run("ls").exit_code == 0, "the key comes from STILL_API_KEY"


def test_an_outage_is_told_once_and_ends_the_command(run: Run, world: World) -> None:
    world.faults.append(Fault("GET", "/v1/jobs", "drop", times=10_000))
    result = run("ls")
    assert result.exit_code == 4
    assert result.stderr.count("trying again") == 1


def test_watch_json_is_a_line_per_view(run: Run, world: World) -> None:
    world.jobs[JOB] = job_view(state="running")
    world.events = [(1, "job.submitted", {}), (2, "job.succeeded", {})]
    lines = run("watch", JOB, "--json").stdout.splitlines()
    assert [json.loads(line)["state"] for line in lines] == ["running", "succeeded"]


def test_plain_progress_is_a_line_per_change(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    lines = JobLines(clock=lambda: now[0])
    for state, at in (("queued", 0), ("queued", 1), ("running", 2), ("running", 3), ("running", 9)):
        now[0] = at
        lines.show(job_view(state=state))  # type: ignore[arg-type]
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    ("offered", "kept"),
    [
        ("report.json", "report.json"),
        ("/etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("..", "out"),
        ("", "out"),
        (".bashrc", "bashrc"),
        ("a\nb:c", "a_b_c"),
        ("é" * 300, "é" * 100),
    ],
)
def test_names_from_the_server_are_base_names(offered: str, kept: str) -> None:
    assert safe_name(offered, "out") == kept


def test_files_of_one_name_do_not_fall_on_each_other() -> None:
    outputs: Any = [{"name": n, "file_name": "model.pt"} for n in ("best", "last")]
    assert file_names(outputs) == {"best": "model.pt", "last": "last-model.pt"}


def test_up_becomes_the_server_with_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(up, "_replace_process", lambda *told: became.append(told))
    monkeypatch.setattr(up, "missing", list)

    result = CliRunner().invoke(
        still,
        ["up", "--port", "9000", "--data-dir", "d", "--devices", "cpu,cuda:0", "--threads", "2"],
    )

    assert result.exit_code == 0
    assert result.output == ""  # the server says where it is once it listens
    (arguments, variables) = became[0]
    assert arguments[-2:] == ["-m", "api"]
    assert variables == {
        "STILL_PORT": "9000", "STILL_DATA_DIR": "d", "STILL_DEVICES": '["cpu", "cuda:0"]',
        "STILL_THREADS": "2",
    }  # fmt: skip


def test_up_without_the_server_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up, "missing", lambda: ["fastapi", "torch"])
    result = CliRunner().invoke(still, ["up"])
    assert result.exit_code == 1
    assert "pip install 'stillroom[worker]'" in result.output


def test_every_command_has_help() -> None:
    for name, command in still.commands.items():
        assert command.help, name
        assert isinstance(command, click.Command)
