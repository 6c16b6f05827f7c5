"""The whole service in numbers, as Prometheus reads them; what they mean is core.jobs.figures."""

import platform
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from api.deps import PROBLEMS, Context, Ctx, Scraper
from core.jobs import figures
from core.jobs.figures import Figure
from core.jobs.lease import Rules

router = APIRouter(tags=["health"], responses=PROBLEMS)
REMEMBERED_FOR = timedelta(seconds=1)
FAMILIES = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily}


class Scrapes:
    """What was measured last, for a second: hasty scrapers cost one look a second, not many."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: tuple[datetime, Sequence[Figure]] | None = None

    def get(self, measure: Callable[[], Sequence[Figure]], *, now: datetime) -> Sequence[Figure]:
        """Return what ``measure`` says, or said less than a second ago."""
        with self._lock:
            if self._last is None or not timedelta(0) <= now - self._last[0] < REMEMBERED_FOR:
                self._last = (now, measure())
            return self._last[1]


class Collected(Collector):
    """Figures, as the library wants them."""

    def __init__(self, found: Sequence[Figure]) -> None:
        self._found = found

    def collect(self) -> Iterator[Metric]:
        """Yield one family per figure."""
        for figure in self._found:
            family = FAMILIES[figure.type](figure.name, figure.help, labels=figure.labels)
            for labels, value in sorted(figure.samples.items()):
                family.add_metric(labels, value)
            yield family


async def _scrapes(request: Request) -> Scrapes:
    """Return the memory of this application."""
    state = request.app.state
    if not hasattr(state, "scrapes"):
        state.scrapes = Scrapes()
    found: Scrapes = state.scrapes
    return found


@router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def metrics(
    request: Request, ctx: Ctx, by: Scraper, scrapes: Annotated[Scrapes, Depends(_scrapes)]
) -> Response:
    """Return every figure, computed from the database: any replica tells the same.

    Opens to STILL_METRICS_KEY and to keys with the scope admin.
    """
    found = scrapes.get(lambda: _measure(ctx), now=ctx.clock())
    registry = CollectorRegistry()
    registry.register(Collected(found))
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(registry), media_type=content_type)


def _measure(ctx: Context) -> Sequence[Figure]:
    rules = Rules.of(ctx.settings)
    with ctx.reading() as session:
        return [_build(ctx), *figures.measure(session, now=ctx.clock(), rules=rules)]


def _build(ctx: Context) -> Figure:
    try:
        release = version("stillroom")
    except PackageNotFoundError:
        release = "unknown"
    labels = {
        "version": release,
        "python": platform.python_version(),
        "database": ctx.engine.dialect.name,
        "mode": "team" if ctx.settings.team else "embedded",
    }
    told = "1; what runs here."
    return Figure("stillroom_build_info", "gauge", told, tuple(labels), {tuple(labels.values()): 1})
