"""The Python client: one method per thing the service does. Every method may be called again."""

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import httpx2

from client import downloads, events, folders, packing, uploads
from client.downloads import Report
from client.errors import NoSuchArtifact
from client.events import Event
from client.references import artifact_path, job_path, key_path, node_path, project_path
from client.views import (
    STANDING_STILL,
    TERMINAL,
    Artifact,
    Checkpoint,
    Curve,
    Estimate,
    Job,
    Key,
    KindView,
    Me,
    NewKey,
    Node,
    Output,
    Pool,
    Progress,
    Project,
    Retried,
    Swept,
)
from client.wire import Retry, Wire

DEFAULT_URL = "http://127.0.0.1:8321"
REFRESH_S = 0.25
"""A burst of events costs one look at the job per so many seconds."""
STEERED = frozenset(
    {"job.pausing", "job.paused", "job.unpaused", "job.resumed", "job.changed", "job.cancelling"}
)
"""After such an event nothing more may come for long: the job is looked at in any case."""
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

    def pause(self, job_id: str) -> Job:
        """Pause a job; the answer is ``paused``, or ``pausing`` where a chunk still runs."""
        job: Job = self._wire.call("POST", job_path(job_id, "pause"))
        return job

    def resume(self, job_id: str) -> Job:
        """Let a paused job go on."""
        job: Job = self._wire.call("POST", job_path(job_id, "resume"))
        return job

    def retry(self, job_id: str) -> Retried:
        """Go on with a failed or cancelled job as a new one, and with what failed for want of it.

        Again, or after a lost answer, it is an ApiError ``conflict`` that names the new job.
        """
        made: Retried = self._wire.call("POST", job_path(job_id, "retry"))
        return made

    def change(self, job_id: str, *, priority: int | None = None, name: str | None = None) -> Job:
        """Change a job's priority or name; None leaves it."""
        asked = {"priority": priority, "name": name}
        values = {field: value for field, value in asked.items() if value is not None}
        job: Job = self._wire.call("PATCH", job_path(job_id), json=values)
        return job

    def estimate(self, spec: Mapping[str, Any]) -> Estimate:
        """Return what a job would take and when it would start; nothing is submitted."""
        found: Estimate = self._wire.call("POST", "/v1/jobs/estimate", json=dict(spec))
        return found

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
                    job = _moved(job, event.data)
                elif event.type in STEERED or time.monotonic() - looked_at >= REFRESH_S:
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
            if job["state"] not in STANDING_STILL:
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

    def checkpoints(self, job_id: str) -> Sequence[Checkpoint]:
        """Return what retention has left of what the job's chunks made for later chunks."""
        found: Sequence[Checkpoint]
        found = self._wire.call("GET", job_path(job_id, "checkpoints"))["items"]
        return found

    def pin(self, job_id: str, stage: str, index: int) -> Sequence[Checkpoint]:
        """Keep the checkpoints of one chunk, whatever retention says."""
        return self._set_pin("POST", job_id, stage, index)

    def unpin(self, job_id: str, stage: str, index: int) -> Sequence[Checkpoint]:
        """Leave the checkpoints of one chunk to retention again."""
        return self._set_pin("DELETE", job_id, stage, index)

    def _set_pin(self, method: str, job_id: str, stage: str, index: int) -> Sequence[Checkpoint]:
        path = job_path(job_id, "checkpoints", stage, str(index), "pin")
        found: Sequence[Checkpoint] = self._wire.call(method, path)["items"]
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

    def download_folder(
        self,
        source: str,
        folder: Path | str,
        *,
        overwrite: bool = False,
        reports: Callable[[str], Report] | None = None,
    ) -> Sequence[Path]:
        """Fetch the files of a language model (a SHA-256, or ``job_id/name``) into ``folder``.

        ``reports`` is asked, with each file's name, for what is told how far that file is.
        """
        job_id, slash, name = source.partition("/")
        sha256 = self._sha256(job_id, name) if slash else source
        return folders.fetch_folder(
            self._wire, sha256, Path(folder), overwrite=overwrite, reports=reports
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

    def pool(self) -> Pool:
        """Return devices, what runs on them, and the queue of each project."""
        found: Pool = self._wire.call("GET", "/v1/pool")
        return found

    def drain(self, node_id: str, *, note: str | None = None) -> Node:
        """Let a node's chunk end and give it no other. Needs the scope admin, as do the next."""
        params = {} if note is None else {"note": note}
        node: Node = self._wire.call("POST", node_path(node_id, "drain"), params=params)
        return node

    def undrain(self, node_id: str) -> Node:
        """Use a draining or excluded node again."""
        node: Node = self._wire.call("POST", node_path(node_id, "resume"))
        return node

    def sweep(self, *, dry_run: bool = True) -> Swept:
        """Remove what no job, upload or cache entry names; ``dry_run`` only lists it."""
        params = {"dry_run": str(dry_run).lower()}
        swept: Swept = self._wire.call("POST", "/v1/sweep", params=params)
        return swept

    def me(self) -> Me:
        """Return whom the key in use stands for: project, scopes, limits and use."""
        found: Me = self._wire.call("GET", "/v1/me")
        return found

    def projects(self) -> Sequence[Project]:
        """Return every project, by name. Needs the scope admin, as all that follows."""
        found: Sequence[Project] = self._wire.call("GET", "/v1/projects")["items"]
        return found

    def create_project(self, name: str, **values: float | None) -> Project:
        """Make a project; ``values``: weight, running_limit, queued_limit, storage_limit_bytes."""
        made: Project = self._wire.call("POST", "/v1/projects", json={"name": name, **values})
        return made

    def change_project(self, project_id: str, values: Mapping[str, Any]) -> Project:
        """Set name, weight or limits of a project; a limit of None is none."""
        changed: Project
        changed = self._wire.call("PATCH", project_path(project_id), json=dict(values))
        return changed

    def keys(self, *, project_id: str | None = None) -> Sequence[Key]:
        """Return keys, newest first: of one project, or all."""
        params = {} if project_id is None else {"project": project_id}
        found: Sequence[Key] = self._wire.call("GET", "/v1/keys", params=params)["items"]
        return found

    def create_key(
        self,
        project_id: str,
        *,
        name: str,
        scopes: Sequence[str] = ("read", "submit"),
        expires_at: str | None = None,
    ) -> NewKey:
        """Make a key; the answer is the only one that holds the key itself.

        A call repeated after a lost answer makes another key; nobody knows the first.
        """
        asked = {"project": project_id, "name": name, "scopes": list(scopes)}
        made: NewKey
        made = self._wire.call("POST", "/v1/keys", json={**asked, "expires_at": expires_at})
        return made

    def revoke_key(self, key_id: str) -> None:
        """End a key for good, within two seconds; again changes nothing."""
        self._wire.call("DELETE", key_path(key_id))


def _moved(job: Job, data: Mapping[str, Any]) -> Job:
    """Return a job with the progress of an event, which also says why one does not run."""
    progress = {field: value for field, value in data.items() if field != "waits_for"}
    return {**job, "progress": cast(Progress, progress), "waits_for": data.get("waits_for")}
