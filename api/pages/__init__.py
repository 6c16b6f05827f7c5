"""The dashboard: HTML from templates, a little JavaScript of our own, nothing from elsewhere."""

from fastapi import APIRouter

from api.pages import jobs, login, pool, reference, submit

router = APIRouter(include_in_schema=False)
for _page in (jobs, pool, submit, login, reference):
    router.include_router(_page.router)
