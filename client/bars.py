"""Live progress of jobs and transfers: bars in a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from client.downloads import Report
from client.render import line, note, plain
from client.session import clean, say
from client.views import TERMINAL, Job

LINE_S = 5.0
"""Without a terminal a running job says something so often at most, beside changes of state."""


class JobBars:
    """One bar per job, in the order they are first shown."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            TextColumn("{task.fields[state]:<10}"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "JobBars":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, job: Job) -> None:
        """Draw a job as it is now."""
        if job["id"] not in self._tasks:
            title = plain(job["name"] or job["kind"]).markup
            self._tasks[job["id"]] = self._bars.add_task(title, total=1.0, state="", note="")
        self._bars.update(
            self._tasks[job["id"]],
            completed=job["progress"]["fraction"],
            state=job["state"],
            note=plain(note(job)).markup,
        )


class JobLines:
    """A line whenever a job's state or stage changes, and now and then between."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._said: dict[str, tuple[object, float]] = {}

    def show(self, job: Job) -> None:
        """Print the job unless that was just done."""
        now, what = self._clock(), (job["state"], job["progress"]["stage"], job["waits_for"])
        before, at = self._said.get(job["id"], (None, 0.0))
        if what != before or (now - at >= LINE_S and job["state"] not in TERMINAL):
            say(line(job))
            self._said[job["id"]] = (what, now)


@contextmanager
def job_display(console: Console) -> Iterator[Callable[[Job], None]]:
    """Yield what to call with every new view of a job."""
    if console.is_terminal:
        with JobBars(console) as bars:
            yield bars.show
    else:
        yield JobLines().show


@contextmanager
def transfers(console: Console) -> Iterator[Callable[[str], Report]]:
    """Yield a function that starts a bar for a file and returns what to call with its bytes."""
    if not console.is_terminal:
        yield lambda _: lambda done, total: None
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as bars:

        def start(name: str) -> Report:
            task = bars.add_task(plain(clean(name)).markup, total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        yield start
