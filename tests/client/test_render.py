import io
import subprocess
import sys

import pytest
from rich.console import Console

from client import render
from client.bars import job_display, transfers
from tests.client.samples import job_view

HEAVY = ("torch", "numpy", "fastapi", "sqlalchemy", "pydantic", "api", "core", "workers")


def test_the_client_loads_nothing_heavy() -> None:
    said = f"import sys, client.cli; print([m for m in {HEAVY!r} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.6, "1 min"), (245, "4 min 5 s"), (7260, "2 h 1 min"), (273_600, "3 d 4 h")],
)
def test_durations_have_two_units_at_most(seconds: float, text: str) -> None:
    assert render.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 40, "3.0 TiB")]
)
def test_sizes(count: int, text: str) -> None:
    assert render.size(count) == text


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        ([1.0, 1.0], "▁▁"),
        ([0.0, 7.0], "▁█"),
        ([float("nan"), 0.0, 1.0], "?▁█"),
        ([float("nan")], "?"),
        ([None], "?"),
        ([None, 0.0, float("inf"), 1.0], "?▁?█"),
        ([-1.7e308, 1.7e308], "▁█"),
    ],
)
def test_sparklines(values: list[float | None], line: str) -> None:
    assert render.sparkline(values) == line


def test_long_curves_are_averaged_into_the_width() -> None:
    assert render.sparkline([-1.7e308, -1.7e308, 1.7e308, 1.7e308], width=2) == "▁█"
    assert len(render.sparkline([float(n) for n in range(1000)], width=40)) == 40
    assert render.sparkline([0.0, 2.0, 4.0, 6.0], width=2) == "▁█"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"state": "waiting", "waits_for": "waits for a/model"}, "waits for a/model"),
        ({"state": "queued", "queue_position": 3}, "number 3 in the queue"),
        ({"cache_hits": 1}, "1 cache hit"),
        ({"state": "failed", "error": {"code": "c", "message": "m"}}, "c: m"),
    ],
)
def test_a_note_is_the_one_thing_to_know(changes: dict[str, object], text: str) -> None:
    assert render.note(job_view(**changes)) == text  # type: ignore[arg-type]


def test_bars_show_strangers_text_as_text() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, color_system=None)
    with job_display(console) as show:
        show(job_view(name="a [red]b\x1b[2J"))  # type: ignore[arg-type]
    with transfers(console) as start:
        start("[bold]f")(5, 10)
    assert "a [red]b?[2J" in out.getvalue()
    assert "[bold]f" in out.getvalue()
