"""Which sorts of job there are."""

from fastapi import APIRouter

from api.deps import PROBLEMS, Caller
from api.views import KindPage, KindView
from core.kinds._base import kinds

router = APIRouter(prefix="/v1/kinds", tags=["kinds"], responses=PROBLEMS)


@router.get("", summary="List the kinds of job")
def list_kinds(_by: Caller) -> KindPage:
    """Return each kind with its JSON Schema, an example that validates, its inputs and outputs."""
    return KindPage(items=[KindView.of(name, kind) for name, kind in kinds().items()])
