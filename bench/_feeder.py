"""Submits echo jobs over HTTP through every outage; the key makes a repeated call harmless."""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from client import ApiError, Retry, Stillroom, StillroomError
from scripts.team import Team

OUTAGE_S = 300.0
SENDERS = 2


@dataclass(frozen=True)
class Wanted:
    """One echo job."""

    key: str
    """Of idempotency; the job's name too."""
    text: str
    times: int


@dataclass(frozen=True)
class Sent:
    """A job that the service said it has taken."""

    wanted: Wanted
    job_id: str


class Feeder:
    """Threads that submit jobs in order, never further ahead of the blows than allowed."""

    def __init__(self, team: Team, jobs: Sequence[Wanted], *, ahead: int) -> None:
        self.sent: list[Sent] = []
        self.answers: Counter[str] = Counter()
        self._jobs = iter(jobs)
        self._count = len(jobs)
        self._ahead = self._allowed = ahead
        self._taken = 0
        self._stopped = False
        self._turn = threading.Condition()
        self._urls, self._key = list(team.urls), team.api_key
        self._threads = [
            threading.Thread(target=self._send_all, args=(index,), daemon=True)
            for index in range(SENDERS)
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def allow(self, chunk: int) -> None:
        """Let everything up to ``chunk`` be submitted, and some more."""
        with self._turn:
            self._allowed = max(self._allowed, chunk + self._ahead)
            self._turn.notify_all()

    def stop(self) -> None:
        """Submit no more."""
        with self._turn:
            self._stopped = True
            self._turn.notify_all()

    @property
    def finished(self) -> bool:
        """Whether every job was taken."""
        return len(self.sent) == self._count

    def _next(self) -> Wanted | None:
        with self._turn:
            self._turn.wait_for(lambda: self._stopped or self._taken < self._allowed)
            job = None if self._stopped else next(self._jobs, None)
            self._taken += job.times if job else 0
            return job

    def _send_all(self, index: int) -> None:
        retry = Retry(limit_s=OUTAGE_S, contact_s=OUTAGE_S, most_s=1.0, on_retry=self._note)
        url = self._urls[index % len(self._urls)]
        with Stillroom(url, api_key=self._key, retry=retry) as client:
            while (job := self._next()) is not None:
                taken = self._send(client, job)
                if taken is None:
                    return
                with self._turn:
                    self.sent.append(Sent(job, taken))

    def _send(self, client: Stillroom, job: Wanted) -> str | None:
        spec = {"kind": "echo", "name": job.key, "text": job.text, "times": job.times}
        while True:
            try:
                return client.submit(spec, idempotency_key=job.key)["id"]
            except StillroomError as error:
                # The client itself would have given up here: a person's script would have failed.
                self._note(error)
                with self._turn:
                    self.answers["given up by the client"] += 1
                    if self._stopped:
                        return None

    def _note(self, error: StillroomError) -> None:
        what = f"{error.status} {error.code}" if isinstance(error, ApiError) else "unreachable"
        with self._turn:
            self.answers[what] += 1
