"""What the suites over every plugin need where a plugin's extra may be missing."""

import pytest

from tests.core._jax import require_jax


@pytest.fixture
def jax_there() -> None:
    """For a test that goes through every teacher by itself."""
    require_jax()


@pytest.fixture(autouse=True)
def jax_where_named(request: pytest.FixtureRequest) -> None:
    """A test with JAX in its name or its parameters needs it."""
    if "jax" in request.node.name.lower():
        require_jax()
