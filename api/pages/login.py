"""Asks for the key once and leaves a cookie that proves it, without holding it."""

import re

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import RedirectResponse, Response

from api.deps import Caller, Ctx
from api.pages.render import PageRoute, form_of, page
from api.principals import COOKIE, COOKIE_FOR, METRICS, Proof
from core.errors import Unauthorized

router = APIRouter(route_class=PageRoute)
_OUR_PAGE = re.compile(r"/(?:jobs/\w{1,64}|pool|submit|upload|docs)?", re.ASCII)


@router.get("/login")
def ask(request: Request, ctx: Ctx, next: str = "/") -> Response:
    """Show the form, or go on where no key is set."""
    if ctx.settings.api_key is None:
        return RedirectResponse("/", 303)
    return page(request, "login.html", following=_checked(next), wrong="")


@router.post("/login")
async def check(request: Request, ctx: Ctx) -> Response:
    """Set the cookie where the key is right."""
    fields = await form_of(request)
    following = _checked(fields.get("next", "/"))
    if ctx.settings.api_key is None:
        return RedirectResponse("/", 303)
    proof = Proof(bearer=fields.get("key", "").strip())
    try:
        principal = await run_in_threadpool(ctx.principals.find, proof)
        if principal.actor == METRICS:
            raise Unauthorized("that key opens /metrics alone")
    except Unauthorized as error:
        return await run_in_threadpool(
            page, request, "login.html", status=401, following=following, wrong=error.message
        )
    response = RedirectResponse(following, 303)
    response.set_cookie(
        COOKIE,
        ctx.principals.cookie_for(principal),
        max_age=int(COOKIE_FOR.total_seconds()),
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return response


@router.post("/logout")
def leave(_by: Caller) -> Response:
    """Drop the cookie."""
    response = RedirectResponse("/login", 303)
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return response


def _checked(path: str) -> str:
    """Only our own pages: a link to the login must not lead elsewhere."""
    return path if _OUR_PAGE.fullmatch(path) else "/"
