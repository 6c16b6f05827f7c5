"""Forms that send a file and a spec. The spec goes the same way as through the API."""

import json
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from api.bodies import parse_json
from api.deps import Context, Ctx, Submitter
from api.pages.render import PageRoute, form_of, page
from api.problems import Blame, blame_all, shown
from api.routes.jobs import parse_pairs, take
from api.specs import AnySpec
from core.errors import QuotaExceeded, SpecInvalid
from core.jobs.keys import Principal
from core.kinds._base import Kind, kinds
from core.specs.base import JobSpec, inputs_of

router = APIRouter(route_class=PageRoute)
_SPEC: TypeAdapter[JobSpec] = TypeAdapter(AnySpec)


@router.get("/upload")
def upload(request: Request, _by: Submitter) -> Response:
    """Show the form that sends a file in parts."""
    uses = {
        format_: uses_of(format_)
        for kind in kinds().values()
        for reads in inputs_of(kind.spec).values()
        for format_ in reads.formats
    }
    return page(request, "upload.html", uses=uses)


@router.get("/submit")
def form(
    request: Request,
    _by: Submitter,
    kind: str = "",
    given: Annotated[list[str] | None, Query(alias="input", description="field:sha256")] = None,
) -> Response:
    """Show a kind's example, ready to be changed, the given inputs filled in."""
    check_kind(kind)
    name = kind or next(iter(kinds()))
    filled = parse_pairs(given or [], parameter="input")
    allowed = inputs_of(kinds()[name].spec).keys()
    if not filled.keys() <= allowed:
        told = f"input: {name} reads no {', '.join(sorted(filled.keys() - allowed))}; "
        told += f"allowed: {', '.join(allowed) or 'none'}"
        raise SpecInvalid(told, pointer="/query/input")
    example = kinds()[name].example
    given_values = {
        field: [value] if isinstance(example.get(field), list) else value
        for field, value in filled.items()
    }
    return _form(request, name, {**example, **given_values}, [])


def check_kind(kind: str) -> None:
    """Refuse a name that no kind has; an empty one means any."""
    if kind and kind not in kinds():
        told = f"kind: no kind {shown(kind)}; allowed: {', '.join(kinds())}"
        raise SpecInvalid(told, pointer="/query/kind")


@router.post("/submit")
async def submit(request: Request, ctx: Ctx, by: Submitter) -> Response:
    """Take the spec and show the job, or the form again with what is wrong."""
    fields = await form_of(request)
    return await run_in_threadpool(_submit, request, ctx, by, fields.get("spec", ""))


def _submit(request: Request, ctx: Context, by: Principal, text: str) -> Response:
    body: Any = None
    try:
        body = parse_json(text)
        spec = _SPEC.validate_python(body)
        job, _ = take(ctx, by, spec)
    except HTTPException as error:
        blames = [Blame("", error.detail)]
    except ValidationError as error:
        found = error.errors(include_url=False)
        blames = blame_all([{**e, "loc": ("body", *e["loc"])} for e in found], body)
    except (SpecInvalid, QuotaExceeded) as error:
        blames = [Blame(error.pointer or "", error.message)]
    else:
        return RedirectResponse(f"/jobs/{job.id}", 303)
    kind = body.get("kind") if isinstance(body, dict) else None
    name = kind if isinstance(kind, str) and kind in kinds() else next(iter(kinds()))
    return _form(request, name, text, blames)


def _form(request: Request, name: str, spec: Any, blames: list[Blame]) -> Response:
    kind = kinds()[name]
    return page(
        request,
        "submit.html",
        status=422 if blames else 200,
        kinds=kinds(),
        name=name,
        kind=kind,
        spec=spec,
        blames=blames,
        fields=fields_of(kind),
    )


def fields_of(kind: Kind) -> list[dict[str, str]]:
    """Return what may be said in a spec, one row per field, from its JSON Schema."""
    schema = kind.spec.model_json_schema()
    asked = set(schema.get("required", ()))
    rows = []
    for name, field in schema["properties"].items():
        default = repr_json(field["default"]) if "default" in field else ""
        default = "required" if name in asked else default
        about = str(field.get("description", ""))
        rows.append({"name": name, "type": type_of(field), "default": default, "about": about})
    return rows


def repr_json(value: Any) -> str:
    """Return a default as it would stand in JSON."""
    return json.dumps(value, ensure_ascii=False)


def type_of(field: Mapping[str, Any]) -> str:
    """Return a field's JSON Schema as a few words."""
    for several in ("anyOf", "oneOf"):
        if several in field:
            return " or ".join(dict.fromkeys(type_of(part) for part in field[several]))
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if "const" in field:
        return f'"{field["const"]}"'
    if "enum" in field:
        return " | ".join(str(value) for value in field["enum"])
    if field.get("type") == "array":
        return f"list of {type_of(field.get('items', {}))}"
    return str(field.get("type", "any")) + _bounds(field)


def _bounds(field: Mapping[str, Any]) -> str:
    signs = {
        "minimum": "≥ ",
        "exclusiveMinimum": "> ",
        "maximum": "≤ ",
        "exclusiveMaximum": "< ",
        "maxLength": "length ≤ ",
    }
    told = [f"{sign}{field[key]}" for key, sign in signs.items() if key in field]
    return f" ({', '.join(told)})" if told else ""


def uses_of(format_: str) -> list[tuple[str, str]]:
    """Return the (kind, field) pairs that take an artifact of this format."""
    return [
        (name, field)
        for name, kind in kinds().items()
        for field, reads in inputs_of(kind.spec).items()
        if format_ in reads.formats
    ]
