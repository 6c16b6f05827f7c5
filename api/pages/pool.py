"""The pool: devices and what runs on them, the projects' queues and shares."""

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from api.deps import Admin, Ctx, Reader
from api.pages.render import PageRoute, page
from api.routes import pool as resource
from api.routes.pool import NodePath

router = APIRouter(route_class=PageRoute)


@router.get("/pool")
def show(request: Request, ctx: Ctx, by: Reader) -> Response:
    """Show the pool."""
    found = resource.get(ctx, by)
    return page(
        request,
        "pool.html",
        pool=found,
        nodes={node.id: node for node in found.nodes},
        now=ctx.clock(),
    )


@router.post("/pool/nodes/{node_id}/drain")
def drain(node_id: NodePath, ctx: Ctx, by: Admin) -> Response:
    """Drain the node and show the pool again."""
    resource.drain(node_id, ctx, by)
    return RedirectResponse("/pool", 303)


@router.post("/pool/nodes/{node_id}/resume")
def resume(node_id: NodePath, ctx: Ctx, by: Admin) -> Response:
    """Use the node again and show the pool."""
    resource.resume(node_id, ctx, by)
    return RedirectResponse("/pool", 303)
