"""Where the servers are missing, a test is skipped on a desk, and fails in CI."""

import os
import shutil

import pytest


@pytest.fixture(autouse=True, scope="session")
def redis_server() -> str:
    """The real redis-server."""
    found = shutil.which("redis-server")
    if found is None:
        reason = "redis-server is missing; run: sh scripts/servers.sh"
        if os.environ.get("CI"):  # noqa: TID251 - no setting of the service
            pytest.fail(reason)
        pytest.skip(reason)
    return found
