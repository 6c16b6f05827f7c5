"""How jobs look in a terminal: words, bars and sparklines from plain values. No I/O."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime

from rich.text import Text

from client.session import clean
from client.views import STANDING_STILL, Estimate, Job, Progress

BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
COLOURS = {
    "waiting": "dim",
    "queued": "cyan",
    "running": "blue",
    "pausing": "yellow",
    "paused": "yellow",
    "cancelling": "yellow",
    "succeeded": "green",
    "failed": "red",
    "cancelled": "yellow",
}


def duration(seconds: float) -> str:
    """Return two units at most: ``3 s``, ``4 min 5 s``, ``2 h 1 min``, ``3 d 4 h``."""
    whole = max(0, round(seconds))
    for unit, size, lower, part in (
        ("d", 86_400, "h", 3600),
        ("h", 3600, "min", 60),
        ("min", 60, "s", 1),
    ):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {lower}" if rest else "")
    return f"{whole} s"


def seconds_since(instant: str, now: float) -> float:
    """Return the age of an ISO 8601 instant at ``now`` (seconds since 1970)."""
    at = datetime.fromisoformat(instant)
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return max(0.0, now - at.timestamp())


def size(count: int) -> str:
    """Return bytes in the unit that fits."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{count} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def bar(fraction: float, width: int = 12) -> str:
    """Return a bar of ``width`` characters."""
    full = round(min(max(fraction, 0.0), 1.0) * width)
    return "━" * full + "╌" * (width - full)


def number(value: float | None, digits: int = 4) -> str:
    """Return a measured value; ``?`` where the server has none."""
    return "?" if value is None else f"{value:.{digits}g}"


def sparkline(values: Sequence[float | None], *, width: int = 60, blocks: str = BLOCKS) -> str:
    """Return one character per point, lowest to highest; long curves are averaged.

    What is not finite, or not there, becomes ``?`` where a whole point is made of it.
    """
    step = max(1, math.ceil(len(values) / width))
    cut = [values[i : i + step] for i in range(0, len(values), step)]
    # Halved, so that no difference of finite values overflows.
    finite = [[v / 2 for v in part if v is not None and math.isfinite(v)] for part in cut]
    means = [sum(v / len(part) for v in part) if part else None for part in finite]
    known = [mean for mean in means if mean is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    span = (high - low) or 1.0
    top = len(blocks) - 1
    return "".join("?" if m is None else blocks[round((m - low) / span * top)] for m in means)


def pace(progress: Progress) -> str:
    """Return stage, chunks, rate and time left, as far as they are known."""
    parts = [progress["stage"]] if progress["stage"] else []
    if progress["total"]:
        parts.append(f"{progress['done']:.4g}/{progress['total']} chunks")
    if progress["rate"]:
        parts.append(f"{progress['rate']:.2g} chunks/s")
    if progress["eta_s"] is not None:
        parts.append(f"{duration(progress['eta_s'])} left")
    return ", ".join(parts)


def note(job: Job) -> str:
    """Return the one thing to know about a job now: why it waits, how it goes, what broke."""
    if job["error"] is not None:
        return f"{job['error']['code']}: {job['error']['message']}"
    if job["state"] in STANDING_STILL:
        place = job["queue_position"]
        number = f"number {place} in the queue" if place is not None else ""
        return job["waits_for"] or number
    if job["state"] in {"running", "pausing"}:
        return pace(job["progress"])
    return hits(job)


def start(job: Job | Estimate, now: float) -> str:
    """Return when a job will probably start, as far as that is foretold."""
    if job["predicted_start_at"] is None:
        return ""
    seconds = datetime.fromisoformat(job["predicted_start_at"]).timestamp() - now
    return f"probably in {duration(seconds)}" if seconds >= 1 else "probably at once"


def hits(job: Job) -> str:
    """Return how much was found instead of computed."""
    count = job["cache_hits"]
    return f"{count} cache hit{'s' * (count != 1)}" if count else ""


def percent(job: Job) -> str:
    """Return the job's progress."""
    return f"{job['progress']['fraction']:.0%}"


def line(job: Job) -> str:
    """Return a job in one plain line, as ``watch`` prints it where there is no terminal."""
    return "  ".join(filter(None, [job["id"], job["kind"], job["state"], percent(job), note(job)]))


def coloured(state: str) -> Text:
    """Return a state in its colour."""
    return Text(state, style=COLOURS.get(state, ""))


def plain(text: str | None) -> Text:
    """Return a stranger's text, which is never markup."""
    return Text(clean(text or "").replace("\n", " "))
