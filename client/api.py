"""The Python client: one method per thing the service does. Every method may be called again."""

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import httpx2

from client import downloads, events, packing, uploads
from client.downloads import Report
from client.errors import NoSuchArtifact
from client.events import Event
from client.references import artifact_path, job_path
from client.views import TERMINAL, Artifact, Curve, Job, KindView, Output, Progress
from client.wire import Retry, Wire

DEFAULT_URL = "http://127.0.0.1:8321"
REFRESH_S = 0.25
"""A burst of events costs one look at the job per so many seconds."""
WAITING_S = 2.0
"""A job that waits is looked at so often at least."""


class Stillroom:
    """A Stillroom service.

    Calls are repeated through outages as ``retry`` says; what is still wrong then is raised as
    Unreachable or ApiError. What is no job's id and no SHA-256 is never sent: BadReference.

    Args:
        base_url: Where the service is, ``http://127.0.0.1:8321``.
        api_key: Sent as a bearer token.
        timeout: Of one connection attempt and one read, in seconds.
        transport: Instead of the network.
        retry: How long to put up with an absent server.
        cache_dir: Where unfinished uploads are remembered; None takes ``~/.cache/stillroom``.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float = 30.0,
        transport: httpx2.BaseTransport | None = None,
        retry: Retry | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        headers = {"Accept": "application/json"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        http = httpx2.Client(
            base_url=base_url, headers=headers, timeout=timeout, transport=transport
        )
        self._wire = Wire(http, retry or Retry())
        folder = cache_dir or Path.home() / ".cache" / "stillroom"
        self._memory = uploads.Memory(folder / "uploads")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._wire.http.close()

    @property
    def url(self) -> str:
        """The server's address, without a slash at the end."""
        return self._wire.url

    def ready(self) -> dict[str, Any]:
        """Ask once whether the service is ready, without retries.

        Raises:
            ApiError: it answers 503.
            Unreachable: it does not answer.
        """
        found: dict[str, Any] = self._wire.once("GET", "/readyz")
        return found

    def kinds(self) -> Sequence[KindView]:
        """Return every kind of job, with its JSON schema and an example."""
        found: Sequence[KindView] = self._wire.call("GET", "/v1/kinds")["items"]
        return found

    def submit(self, spec: Mapping[str, Any], *, idempotency_key: str | None = None) -> Job:
        """Submit a job. The key makes a repeated call return the first call's job."""
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        job: Job = self._wire.call("POST", "/v1/jobs", json=dict(spec), headers=headers)
        return job

    def get(self, job_id: str) -> Job:
        """Return a job."""
        job: Job = self._wire.call("GET", job_path(job_id))
        return job

    def list(
        self,
        *,
        state: str | None = None,
        kind: str | None = None,
        name: str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Iterator[Job]:
        """Yield jobs, newest first, a page at a time as they are asked for."""
        asked = {"state": state, "kind": kind, "name": name, "limit": 50, "cursor": None}
        label = [f"{key}:{value}" for key, value in (labels or {}).items()]
        while True:
            params = {key: value for key, value in asked.items() if value is not None}
            page = self._wire.call("GET", "/v1/jobs", params={**params, "label": label})
            yield from page["items"]
            asked["cursor"] = page["next_cursor"]
            if asked["cursor"] is None:
                return

    def cancel(self, job_id: str) -> Job:
        """Cancel a job; the answer is ``cancelled``, or ``cancelling`` where a chunk still runs."""
        job: Job = self._wire.call("POST", job_path(job_id, "cancel"))
        return job

    def events(self, job_id: str, *, after: int = 0) -> Iterator[Event]:
        """Yield a job's events until its last; lives through cut connections and restarts."""
        return events.follow(self._wire, job_id, after=after)

    def wait(self, job_id: str, on_progress: Callable[[Job], None] | None = None) -> Job:
        """Return the job when it has succeeded, failed or been cancelled.

        ``on_progress`` gets the job whenever something about it changed.
        """
        tell = on_progress or (lambda _: None)
        job = self._wait_for_start(job_id, tell)
        looked_at = time.monotonic()
        while job["state"] not in TERMINAL:
            for event in self.events(job_id):
                if event.type == "progress":
                    job = {**job, "progress": cast(Progress, event.data)}
                elif time.monotonic() - looked_at >= REFRESH_S:
                    job, looked_at = self.get(job_id), time.monotonic()
                tell(job)
            job = self.get(job_id)
            tell(job)
        return job

    def _wait_for_start(self, job_id: str, tell: Callable[[Job], None]) -> Job:
        """Look at a job until it runs: why it waits may change without an event of its own."""
        pause_s = REFRESH_S / 2
        while True:
            job = self.get(job_id)
            tell(job)
            if job["state"] not in {"waiting", "queued"}:
                return job
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, WAITING_S)

    def metrics(self, job_id: str) -> Mapping[str, Curve]:
        """Return a job's curves: name -> (step, value) points; None where a value is not finite."""
        found: Mapping[str, Curve]
        found = self._wire.call("GET", job_path(job_id, "metrics"))["metrics"]
        return found

    def artifacts(self, job_id: str) -> Sequence[Output]:
        """Return what a job offers so far."""
        found: Sequence[Output] = self._wire.call("GET", job_path(job_id, "artifacts"))["items"]
        return found

    def artifact(self, sha256: str) -> Artifact:
        """Return an artifact's facts and where it came from."""
        found: Artifact = self._wire.call("GET", artifact_path(sha256))
        return found

    def download(
        self,
        source: str,
        path: Path | str,
        *,
        overwrite: bool = False,
        on_progress: Report | None = None,
    ) -> Path:
        """Fetch ``source`` (a SHA-256, or ``job_id/name``) into the file ``path``.

        A fetch that broke off goes on where it stopped; the bytes are checked against their
        SHA-256 before the file appears.
        """
        job_id, slash, name = source.partition("/")
        sha256 = self._sha256(job_id, name) if slash else source
        return downloads.fetch(
            self._wire, sha256, Path(path), overwrite=overwrite, on_progress=on_progress
        )

    def _sha256(self, job_id: str, name: str) -> str:
        offered = self.get(job_id)["artifacts"]
        if name not in offered:
            has = ", ".join(sorted(offered)) or "none yet"
            raise NoSuchArtifact(f"{job_id} has no artifact {name!r}; it has: {has}")
        return offered[name]

    def upload(self, path: Path | str, *, on_progress: Report | None = None) -> Artifact:
        """Send a file and return the artifact made of it.

        ``NAME.pkl`` with a folder ``NAME/`` beside it goes as one .tar of both. A file that was
        begun earlier, also by another process, goes on where the server stands.
        """
        with packing.packed(Path(path)) as file:
            return uploads.send(self._wire, self._memory, file, on_progress)
