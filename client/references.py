"""The ids that stand in URLs. Only what has an id's form is ever sent as one."""

import re
from urllib.parse import quote

from client.errors import BadReference

_JOB_ID = re.compile(r"job_[0-9a-hjkmnp-tv-z]{26}")
_KEY_ID = re.compile(r"key_[0-9a-hjkmnp-tv-z]{12}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_job_id(text: str) -> bool:
    """Tell whether a text has the form of a job's id."""
    return _JOB_ID.fullmatch(text) is not None


def is_sha256(text: str) -> bool:
    """Tell whether a text has the form of a SHA-256."""
    return _SHA256.fullmatch(text) is not None


def not_a_job(text: str) -> str:
    """Say what is wrong with a text that is no job's id."""
    return f"{text[:80]!r} is not a job's id: job_ and 26 letters and digits"


def job_path(job_id: str, *more: str) -> str:
    """Return the URL path of a job, or of something of it.

    Raises:
        BadReference: that is no job's id.
    """
    if not is_job_id(job_id):
        raise BadReference(not_a_job(job_id))
    return _path("jobs", job_id, *more)


def artifact_path(sha256: str, *more: str) -> str:
    """Return the URL path of an artifact, or of its content.

    Raises:
        BadReference: that is no SHA-256.
    """
    if not is_sha256(sha256):
        raise BadReference(f"{sha256[:80]!r} is not a SHA-256: 64 lower-case hex digits")
    return _path("artifacts", sha256, *more)


def upload_path(upload_id: str, *more: str) -> str:
    """Return the URL path of an upload; its id is the server's own and is not looked into."""
    return _path("uploads", upload_id, *more)


def node_path(node_id: str, *more: str) -> str:
    """Return the URL path of a node; its id is the server's own and is not looked into."""
    return _path("pool", "nodes", node_id, *more)


def project_path(project_id: str) -> str:
    """Return the URL path of a project; its id is the server's own and is not looked into."""
    return _path("projects", project_id)


def key_path(key_id: str) -> str:
    """Return the URL path of a key.

    Raises:
        BadReference: that is no key's id; a key itself is never sent in an address.
    """
    if _KEY_ID.fullmatch(key_id) is None:
        raise BadReference(
            f"{key_id[:10]!r}... is not a key's id: key_ and 12 letters and digits, "
            "as `still key ls` shows"
        )
    return _path("keys", key_id)


def _path(*parts: str) -> str:
    return "/v1/" + "/".join(quote(part, safe="") for part in parts)
