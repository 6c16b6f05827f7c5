"""The body of a submission: one spec of any kind, read strictly and described whole."""

import json
from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Body
from pydantic import Field, GetCoreSchemaHandler, TypeAdapter
from pydantic_core import CoreSchema, core_schema

from core.kinds._base import kinds
from core.specs.base import JobSpec


def _any_spec() -> Any:
    """Return the union of all kinds' specs, told apart by ``kind``; true is no 1, "3" no 3."""
    specs = [kind.spec for kind in kinds().values()]
    union: Any = specs[0]
    if len(specs) > 1:
        union = Annotated[reduce(or_, specs), Field(discriminator="kind")]
    adapter: TypeAdapter[JobSpec] = TypeAdapter(union)

    def strictly(value: Any, _lax: Any) -> JobSpec:
        # As JSON: only there does strict mode take a list for a tuple and a text for an enum.
        return adapter.validate_json(json.dumps(value), strict=True)

    examples: Any = {
        name: {"summary": kind.summary, "value": dict(kind.example)}
        for name, kind in kinds().items()
    }
    return Annotated[JobSpec, _Strictly(union, strictly), Body(openapi_examples=examples)]


class _Strictly:
    """Reads values by a function, and describes them as the union that they are one of.

    A WrapValidator around the union would do the first alone: Pydantic would move the discriminator
    outside of it, and write a mapping into the OpenAPI document that is none.
    """

    def __init__(self, union: Any, read: Callable[[Any, Any], JobSpec]) -> None:
        self._union, self._read = union, read

    def __get_pydantic_core_schema__(
        self, _source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        inner = handler.generate_schema(self._union)
        return core_schema.no_info_wrap_validator_function(self._read, inner)


if TYPE_CHECKING:
    AnySpec = JobSpec
else:
    AnySpec = _any_spec()
