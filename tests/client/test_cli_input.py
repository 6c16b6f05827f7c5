"""What a user types or writes into a file: taken as meant, or told."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.client.conftest import Run
from tests.client.fake import World
from tests.client.samples import JOB


def submitted(world: World) -> dict[str, Any]:
    spec: dict[str, Any] = list(world.keys.values())[-1]["spec"]
    return spec


def test_options_come_from_the_schema(run: Run, world: World) -> None:
    result = run(
        *("submit", "echo", "--text", "5", "--times", "3", "--loud", "--mood", "cross"),
        *("--pitch", "0.5", "--priority", "7", "--name", "night", "--label", "a=b"),
        *("--label", "c=d"),
    )

    assert result.exit_code == 0, result.output
    assert submitted(world) == {
        "kind": "echo", "text": "5", "times": 3, "loud": True, "mood": "cross", "pitch": 0.5,
        "priority": 7, "name": "night", "labels": {"a": "b", "c": "d"},
    }  # fmt: skip
    assert result.stdout.strip() in world.jobs, "a pipe gets the id alone"


def test_set_reaches_what_options_cannot(run: Run, world: World) -> None:
    result = run(
        *("submit", "echo", "--set", "text=12", "--set", "voice.depth=9"),
        *("--set", "echoes=[1,2]", "--set", "times=4"),
    )

    assert result.exit_code == 0, result.output
    assert submitted(world) == {
        "kind": "echo",
        "text": "12",
        "voice": {"name": "bass", "depth": 9},
        "echoes": [1, 2],
        "times": 4,
    }


def test_a_file_is_the_start_and_options_win(run: Run, world: World, tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text(json.dumps({"kind": "echo", "text": "from file", "times": 2}))

    assert run("submit", "--file", str(path)).exit_code == 0
    assert submitted(world)["text"] == "from file"
    assert run("submit", "echo", "--file", str(path), "--times", "9").exit_code == 0
    assert submitted(world) == {"kind": "echo", "text": "from file", "times": 9}
    assert run("submit", "--file", "-", stdin=path.read_text()).exit_code == 0


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", '{"kind": "other"}', "{}", "NaN", "9" * 5000),
        '{"kind": "echo", "text": "hi", "pitch": NaN}',
        '{"kind": "echo", "text": "hi", "pitch": -Infinity}',
        '{"kind": "echo", "text": "hi", "pitch": 1e999}',
        '{"kind": "echo", "text": "hi", "text": "ho"}',
        '{"kind": "echo", "text": "\\ud800"}',
        '{"kind": "echo", "text": "hi", "\\ud800": 1}',
        '{"kind": "echo", "text": "hi", "echoes": ' + "[" * 500 + "]" * 500 + "}",
        '{"kind": ' + "[" * 100_000,
    ],
)
def test_a_file_that_is_no_spec_is_told(run: Run, text: str) -> None:
    result = run("submit", "--file", "-", stdin=text)
    assert result.exit_code == 2
    assert "--file" in result.stderr or "kind" in result.stderr


STRAY = "\udcff"
"""What Python makes of the byte 0xff on a command line."""


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["submit", "echo", "--text", STRAY], "--text"),
        (["submit", "echo", "--text", "hi", "--name", STRAY], "--name"),
        (["submit", "echo", "--text", "hi", "--mood", STRAY], "--mood"),
        (["submit", "echo", "--text", "hi", "--label", f"a={STRAY}"], "--label"),
        (["submit", "echo", "--set", f"text={STRAY}"], "--set"),
        (["submit", "echo", "--set", f"{STRAY}=1"], "--set"),
        (["submit", "echo", "--text", "hi", "--set", "seed=NaN"], "--set"),
        (["submit", "echo", "--text", "hi", "--set", "seed=1e999"], "--set"),
        (["submit", "echo", "--text", "hi", "--set", "seed=" + "9" * 5000], "--set"),
        (["submit", "echo", "--text", "hi", "--set", 'voice={"depth":1,"depth":2}'], "--set"),
        (["submit", "echo", "--text", "hi", "--set", 'voice={"name":"\\ud800"}'], "--set"),
        (["submit", "echo", "--text", "hi", "--set", "echoes=" + "[" * 9000], "--set"),
        (["submit", "echo", "--text", "hi", "--set", "a." * 9000 + "b=1"], "--set"),
        (["submit", "echo", "--text", "hi", "--pitch", "nan"], "--pitch"),
        (["submit", "echo", "--text", "hi", "--pitch", "inf"], "--pitch"),
        (["submit", "echo", "--text", "hi", "--set", "labels=[1]", "--label", "a=b"], "--label"),
        (["ls", "--name", STRAY], "--name"),
        (["ls", "--kind", STRAY], "--kind"),
        (["ls", "--label", f"{STRAY}=b"], "--label"),
        (["ls", "--url", f"http://{STRAY}"], "--url"),
        (["ls", "--api-key", STRAY], "--api-key"),
        (["ls", "--patience", "nan"], "--patience"),
        (["get", JOB, STRAY], "NAME"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_its_option(
    run: Run, world: World, arguments: list[str], named: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert named in result.stderr
    assert world.keys == {}


@pytest.mark.parametrize("command", ["show", "watch", "cancel", "get"])
@pytest.mark.parametrize(
    "job_id",
    ["", ".", "..", "../kinds", "a\nb", STRAY, "job_none", JOB.upper(), f"{JOB}x", f"{JOB}/text",
     f"{JOB}?a", f"{JOB}\n", JOB.replace("0", "o")],
)  # fmt: skip
def test_what_is_no_job_id_is_told_and_never_sent(
    run: Run, world: World, command: str, job_id: str
) -> None:
    result = run(command, job_id)
    assert result.exit_code == 2
    assert "JOB" in result.stderr
    assert "job_ and 26" in result.stderr or "UTF-8" in result.stderr
    assert world.seen == []


def test_labels_of_a_file_that_are_no_object_are_told(run: Run) -> None:
    spec = json.dumps({"kind": "echo", "text": "hi", "labels": [1]})
    result = run("submit", "--file", "-", "--label", "a=b", stdin=spec)
    assert result.exit_code == 2
    assert "--label" in result.stderr


def test_a_file_whose_name_is_no_text_is_sent_all_the_same(
    run: Run, world: World, tmp_path: Path
) -> None:
    path = tmp_path / f"p{STRAY}.npz"
    path.write_bytes(b"0123456789")
    assert run("upload", str(path)).exit_code == 0
    assert world.uploads["up_0"]["file_name"] == "p?.npz"


def test_the_real_command_line_takes_any_bytes(world: World, tmp_path: Path) -> None:
    for arguments in ([b"show", b"a\xff"], [b"nokind\xff"], [b"upload", b"\xff.npz"],
                      [b"submit", b"--file", b"\xff"], [b"submit", b"echo", b"--text", b"\xff"],
                      [b"submit", b"echo", b"--mood", b"\xff"]):  # fmt: skip
        command = [sys.executable, "-m", "client", "--url", world.url]
        ran = subprocess.run(
            [*map(os.fsencode, command), *arguments], capture_output=True, timeout=60, check=False
        )
        assert ran.returncode == 2, ran.stderr
        assert b"Traceback" not in ran.stderr
