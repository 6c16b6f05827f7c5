"""Reads JSON bodies strictly: UTF-8, no NaN, no NUL, no key twice, no deep nesting; never a 500."""

import json
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

DEPTH_LIMIT = 64
TOO_DEEP = f"the body is nested too deeply; allowed: {DEPTH_LIMIT} levels"


def parse_json(raw: bytes | str) -> Any:
    """Return the value, or raise HTTPException 400 that says what is wrong and where."""
    try:
        text = raw.decode() if isinstance(raw, bytes) else raw
        value = json.loads(text, parse_constant=_refuse, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise HTTPException(400, f"the body is not UTF-8: byte {error.start}") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise HTTPException(400, f"the body is not JSON: {error.msg} at {place}") from error
    except RecursionError as error:
        raise HTTPException(400, TOO_DEEP) from error
    except ValueError as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from error
    _check(value)
    return value


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number; leave the field out, or send null")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise HTTPException(400, f"an object of the body names {twice[:80]!r} twice; say it once")
    return found


def _check(value: Any) -> None:
    """Refuse deep nesting, and texts that no database can hold: NUL, halves of surrogate pairs."""
    rest = [(value, 0)]
    while rest:
        item, depth = rest.pop()
        if depth > DEPTH_LIMIT:
            raise HTTPException(400, TOO_DEEP)
        if isinstance(item, dict):
            rest += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list):
            rest += [(part, depth + 1) for part in item]
        elif isinstance(item, str) and (
            "\0" in item or any("\ud800" <= c <= "\udfff" for c in item)
        ):
            raise HTTPException(400, "a text holds \\u0000 or half a surrogate pair; remove it")


class StrictRequest(Request):
    """A request whose json() is strict."""

    async def json(self) -> Any:
        """Return the parsed body, once."""
        if not hasattr(self, "_parsed"):
            self._parsed = parse_json(await self.body())
        return self._parsed


class StrictRoute(APIRoute):
    """A route that takes application/json alone, parsed strictly."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the framework's handler."""
        handle = super().get_route_handler()
        takes_body = self.body_field is not None

        async def strict(request: Request) -> Response:
            if takes_body:
                _check_headers(request)
            return await handle(StrictRequest(request.scope, request.receive))

        return strict


def _check_headers(request: Request) -> None:
    """Refuse what would change the meaning of the body and be overlooked."""
    for name in ("Content-Type", "Content-Encoding", "Idempotency-Key"):
        if len(request.headers.getlist(name)) > 1:
            raise HTTPException(400, f"{name} is given more than once")
    encoded = request.headers.get("content-encoding", "identity")
    if encoded.lower() != "identity":
        raise HTTPException(415, f"Content-Encoding is {encoded!r}; send the body as it is")
    found = request.headers.get("content-type", "")
    if found.partition(";")[0].strip().lower() != "application/json":
        told = f"Content-Type is {found!r}" if found else "Content-Type is missing"
        raise HTTPException(415, f"{told}; send application/json")
    for parameter in found.split(";")[1:]:
        name, _, value = parameter.strip().lower().partition("=")
        if name == "charset" and value.strip('"') not in ("utf-8", "utf8"):
            raise HTTPException(415, f"Content-Type is {found!r}; send it in UTF-8")
