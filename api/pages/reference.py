"""The API reference, drawn from the OpenAPI document the application makes itself."""

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from api.deps import Caller
from api.pages.render import PageRoute, page
from api.pages.submit import type_of
from api.problems import CODES, RETRYABLE
from core.errors import StillroomError

router = APIRouter(route_class=PageRoute)


@router.get("/openapi.json")
def document(request: Request, _by: Caller) -> JSONResponse:
    """Return the OpenAPI document."""
    return JSONResponse(request.app.openapi())


@router.get("/docs")
def reference(request: Request, _by: Caller) -> Response:
    """Show every call, every shape and every error code."""
    document = request.app.openapi()
    return page(
        request,
        "reference.html",
        about=re.sub(r"[*`]", "", document["info"]["description"]),
        calls=list(_calls(document)),
        shapes=list(_shapes(document)),
        codes=list(_codes()),
    )


def _calls(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for path, methods in document["paths"].items():
        for method, call in methods.items():
            body = call.get("requestBody", {}).get("content", {})
            answer = _success(call.get("responses", {}))
            yield {
                "method": method.upper(),
                "path": path,
                "summary": call.get("summary", ""),
                "about": call.get("description", ""),
                "parameters": [
                    {**parameter, "type": type_of(parameter.get("schema", {}))}
                    for parameter in call.get("parameters", ())
                ],
                "body": {media: type_of(said.get("schema", {})) for media, said in body.items()},
                "answer": answer,
                "scopes": [
                    scope for one in call.get("security", ()) for scope in one["HTTPBearer"]
                ],
            }


def _success(responses: Mapping[str, Any]) -> list[str]:
    told = []
    for status, response in responses.items():
        if status.startswith(("2", "3")):
            shapes = [
                f"{media} {type_of(said.get('schema', {}))}"
                for media, said in response.get("content", {}).items()
            ]
            told.append(f"{status} {', '.join(shapes) or response.get('description', '')}")
    return told


def _shapes(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name, schema in sorted(document["components"]["schemas"].items()):
        asked = set(schema.get("required", ()))
        yield {
            "name": name,
            "about": schema.get("description", ""),
            "fields": [
                {
                    "name": field,
                    "type": type_of(said),
                    "about": said.get("description", ""),
                    "required": field in asked,
                }
                for field, said in schema.get("properties", {}).items()
            ],
        }


def _codes() -> Iterator[dict[str, Any]]:
    told = {}
    for status, code in CODES.items():
        told[code] = {"code": code, "status": status, "about": "", "retryable": status in RETRYABLE}
    for error in sorted(StillroomError.__subclasses__(), key=lambda error: error.__name__):
        about = inspect.getdoc(error) or ""
        told[error.code()] = {
            "code": error.code(),
            "status": error.status,
            "about": about.partition("\n")[0],
            "retryable": error.retryable,
        }
    yield from sorted(told.values(), key=lambda row: (row["status"], row["code"]))
