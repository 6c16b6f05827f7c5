"""Every route of the real application, mounted ones too: no list of them to keep."""

from pathlib import Path
from typing import Any

from fastapi.routing import APIRoute
from starlette.routing import Mount

from api.app import create_app
from api.deps import scopes_of
from api.problems import leaves
from core.settings import Settings

APP = create_app(Settings(data_dir=Path("unused")), workers=False)


def every_leaf() -> list[Any]:
    found: list[Any] = []
    for route in leaves(APP.routes):
        inner = getattr(route, "routes", None) if isinstance(route, Mount) else None
        found += leaves(inner) if inner else [route]
    return found


def every_route() -> list[tuple[str, str, tuple[str, ...]]]:
    """Method, path and the scopes of which one is needed."""
    found = []
    for route in every_leaf():
        if isinstance(route, APIRoute):
            found += [(m, route.path, scopes_of(route)) for m in sorted(route.methods)]
    return found


ROUTES = every_route()
"""As they are when tests are collected."""
