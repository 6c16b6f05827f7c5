"""Files on their way in: parts are appended in order, then checked, imported and adopted."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO

from sqlalchemy import Engine, delete, func, select, update
from sqlalchemy.orm import Session

from core.artifacts.limits import Limits
from core.artifacts.sandbox import Imported, import_file
from core.artifacts.store import Blob, Store
from core.db.models import Artifact, Upload
from core.db.session import insert_or_touch, reading, transaction
from core.errors import (
    Conflict,
    DataInvalid,
    NotFound,
    StillroomError,
    TooLarge,
    UploadIncomplete,
)
from core.jobs import audit, projects
from core.jobs.ids import new_id

DISCARDABLE = ("open", "failed")
UNFINISHED = ("open", "importing")
KEPT_FOR = timedelta(days=7)
"""An unfinished upload is dropped when nobody touched it for so long."""


@dataclass(frozen=True, kw_only=True)
class Uploads:
    """The one door for bytes from outside. Server-made paths only; names are metadata."""

    engine: Engine
    store: Store
    folder: Path
    scratch: Path
    clock: Callable[[], datetime]
    limits: Limits
    upload_limit_bytes: int
    open_limit: int

    def create(
        self, *, project: str, file_name: str, size_bytes: int, sha256: str, by: str
    ) -> Upload:
        """Announce a file of a project; ``by`` is who asks, for the audit.

        Raises:
            TooLarge: the file, or the number of unfinished uploads, passes its limit.
            QuotaExceeded: the project's storage would pass its limit.
        """
        if size_bytes > self.upload_limit_bytes:
            raise TooLarge(
                f"size_bytes: {size_bytes}; allowed: up to {self.upload_limit_bytes}",
                pointer="/size_bytes",
            )
        now = self.clock()
        upload = Upload(
            id=new_id("up"),
            project_id=project,
            file_name=file_name,
            size_bytes=size_bytes,
            sha256=sha256,
            state="open",
            created_at=now,
            updated_at=now,
        )
        with transaction(self.engine) as session:
            self._expire(session)
            unfinished = select(func.count()).where(
                Upload.project_id == project, Upload.state.in_(UNFINISHED)
            )
            if (session.scalar(unfinished) or 0) >= self.open_limit:
                raise TooLarge(
                    f"{self.open_limit} uploads are unfinished; complete or delete one first"
                )
            projects.check_storage(session, project, now=now, adding_bytes=size_bytes)
            session.add(upload)
            self._note(session, upload, by, "upload.create")
        self._part(upload.id).touch()
        return upload

    def get(self, upload_id: str, *, project: str | None = None) -> Upload:
        """Return an upload (of ``project``, where one is named) or raise NotFound."""
        with reading(self.engine) as session:
            upload = session.get(Upload, upload_id)
        if upload is None or project not in (None, upload.project_id):
            raise NotFound(f"no upload {upload_id}")
        return upload

    def list(self, *, project: str, state: str | None, limit: int) -> Sequence[Upload]:
        """Return a project's uploads, newest first."""
        query = select(Upload).where(Upload.project_id == project)
        query = query.order_by(Upload.created_at.desc(), Upload.id).limit(limit)
        if state is not None:
            query = query.where(Upload.state == state)
        with reading(self.engine) as session:
            return session.scalars(query).all()

    def received_bytes(self, upload: Upload) -> int:
        """Return how much has arrived: where the next part must start."""
        if upload.state == "complete":
            return upload.size_bytes
        part = self._part(upload.id)
        return part.stat().st_size if part.exists() else 0

    def append(
        self, upload_id: str, *, offset: int, stream: Iterable[bytes], project: str | None = None
    ) -> Upload:
        """Write one part at ``offset``; what arrived before a broken connection is kept.

        Raises:
            UploadIncomplete: the part does not start where the last one ended.
            TooLarge: more bytes than announced; those of this part are dropped.
            Conflict: the upload is over, or another part is being written.
        """
        upload = self._open_upload(upload_id, project=project)
        with self._locked(upload) as part:
            start = part.seek(0, os.SEEK_END)
            if offset != start:
                raise UploadIncomplete(
                    f"Upload-Offset: {offset}; {start} bytes have arrived, continue there"
                )
            for piece in stream:
                if part.tell() + len(piece) > upload.size_bytes:
                    part.truncate(start)
                    raise TooLarge(f"more than the {upload.size_bytes} bytes announced")
                part.write(piece)
        with transaction(self.engine) as session:
            touched = session.execute(
                update(Upload)
                .where(Upload.id == upload_id)
                .values(updated_at=self.clock())
                .returning(Upload.id)
            )
            if touched.scalar_one_or_none() is None:
                raise NotFound(f"no upload {upload_id}: it was deleted")
        return upload

    def complete(self, upload_id: str, *, by: str, project: str | None = None) -> Artifact:
        """Check size and hash, import in the sandbox and store; again: the same artifact.

        Raises:
            UploadIncomplete: bytes are missing.
            DataInvalid: the hash is another, or the content is refused; the upload has failed
                and its bytes are gone.
            TooLarge: the content passes a limit; likewise.
        """
        upload = self.get(upload_id, project=project)
        if upload.artifact is not None:
            with reading(self.engine) as session:
                return session.get_one(Artifact, upload.artifact)
        upload = self._open_upload(upload_id)
        with self._locked(upload) as part:
            missing = upload.size_bytes - part.seek(0, os.SEEK_END)
            if missing:
                raise UploadIncomplete(f"{missing} of {upload.size_bytes} bytes are missing")
            self._move(upload_id, "open", "importing")
            try:
                self._check_hash(upload)
                return self._import(upload, by=by)
            except BaseException as error:
                # The content's own fault is final; anything else (disk, memory) may pass.
                if isinstance(error, StillroomError) and not error.retryable:
                    self._fail(upload, error, by=by)
                else:
                    self._move(upload_id, "importing", "open")
                raise

    def discard(self, upload_id: str, *, by: str, project: str | None = None) -> None:
        """Forget an unfinished or failed upload and its bytes.

        Raises:
            Conflict: it is complete, being imported, or a part is being written.
        """
        upload = self.get(upload_id, project=project)
        if upload.state not in DISCARDABLE:
            raise Conflict(f"upload {upload_id} is {upload.state}; allowed: open, failed")
        with self._locked(upload), transaction(self.engine) as session:
            gone = session.execute(
                delete(Upload)
                .where(Upload.id == upload_id, Upload.state.in_(DISCARDABLE))
                .returning(Upload.id)
            )
            if gone.scalar_one_or_none() is None:
                raise NotFound(f"no upload {upload_id}")
            self._note(session, upload, by, "upload.discard")
        self._part(upload_id).unlink(missing_ok=True)

    def recover(self) -> None:
        """At a server's start: imports that were cut short are open again; leftovers go.

        An import that goes on elsewhere holds its part's lock, and is left alone.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with reading(self.engine) as session:
            cut = session.scalars(select(Upload).where(Upload.state == "importing")).all()
        for upload in cut:
            with suppress(Conflict), self._locked(upload):
                self._move(upload.id, "importing", "open")
        with transaction(self.engine) as session:
            self._expire(session)
            kept = set(session.scalars(select(Upload.id).where(Upload.state.in_(UNFINISHED))))
        for part in self.folder.glob("*.part"):
            if part.stem not in kept:
                part.unlink(missing_ok=True)

    def _expire(self, session: Session) -> None:
        """Drop uploads that nobody touched for long."""
        stale = delete(Upload).where(
            Upload.state == "open", Upload.updated_at < self.clock() - KEPT_FOR
        )
        for upload_id in session.scalars(stale.returning(Upload.id)).all():
            self._part(upload_id).unlink(missing_ok=True)

    def _part(self, upload_id: str) -> Path:
        return self.folder / f"{upload_id}.part"

    def _open_upload(self, upload_id: str, *, project: str | None = None) -> Upload:
        upload = self.get(upload_id, project=project)
        if upload.state != "open":
            raise Conflict(f"upload {upload_id} is {upload.state}")
        return upload

    @contextmanager
    def _locked(self, upload: Upload) -> Iterator[IO[bytes]]:
        with self._part(upload.id).open("ab") as part:
            try:
                fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Conflict(f"another request is writing upload {upload.id}") from None
            yield part

    def _move(self, upload_id: str, old: str, new: str) -> None:
        with transaction(self.engine) as session:
            moved = session.execute(
                update(Upload)
                .where(Upload.id == upload_id, Upload.state == old)
                .values(state=new, updated_at=self.clock())
                .returning(Upload.id)
            )
            if moved.scalar_one_or_none() is None:
                raise Conflict(f"upload {upload_id} is no longer {old}")

    def _check_hash(self, upload: Upload) -> None:
        with self._part(upload.id).open("rb") as part:
            found = hashlib.file_digest(part, "sha256").hexdigest()
        if found != upload.sha256:
            raise DataInvalid(
                f"sha256: the bytes hash to {found}, not to {upload.sha256} as announced; "
                "upload the file again"
            )

    def _import(self, upload: Upload, *, by: str) -> Artifact:
        workdir = self.scratch / upload.id
        workdir.mkdir(parents=True, exist_ok=True)
        try:
            imported = import_file(
                self._part(upload.id),
                file_name=upload.file_name,
                workdir=workdir,
                limits=self.limits,
            )
            blob = self.store.put(imported.path)
            return self._adopt(upload, imported, blob, by=by)
        finally:
            shutil.rmtree(workdir, ignore_errors=True)

    def _adopt(self, upload: Upload, imported: Imported, blob: Blob, *, by: str) -> Artifact:
        now = self.clock()
        values = {
            "sha256": blob.sha256,
            "size_bytes": blob.size_bytes,
            "format": imported.format,
            "media_type": imported.media_type,
            "file_name": imported.file_name,
            "meta": dict(imported.meta),
            "created_at": now,
        }
        with transaction(self.engine) as session:
            insert_or_touch(session, Artifact, values, touch="created_at")  # see adoption
            notes = list(imported.notes)
            done = {"state": "complete", "artifact": blob.sha256, "notes": notes, "updated_at": now}
            session.execute(update(Upload).where(Upload.id == upload.id).values(**done))
            artifact = session.get_one(Artifact, blob.sha256)
            self._note(session, upload, by, "upload.complete", artifact=blob.sha256)
        self._part(upload.id).unlink(missing_ok=True)
        return artifact

    def _note(self, session: Session, upload: Upload, by: str, action: str, **data: str) -> None:
        audit.record(
            session,
            project=upload.project_id,
            actor=by,
            action=action,
            target=upload.id,
            now=self.clock(),
            data=data,
        )

    def _fail(self, upload: Upload, error: StillroomError, *, by: str) -> None:
        facts = {"code": error.code(), "message": error.message}
        with transaction(self.engine) as session:
            session.execute(
                update(Upload)
                .where(Upload.id == upload.id)
                .values(state="failed", error=facts, updated_at=self.clock())
            )
            self._note(session, upload, by, "upload.fail", code=error.code())
        self._part(upload.id).unlink(missing_ok=True)
