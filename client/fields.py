"""A kind's JSON schema as command-line options, and option values as a spec."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import click

from client import strict
from client.inputs import TEXT, Finite

Schema = Mapping[str, Any]

RESERVED = frozenset({"kind", "labels", "label", "file", "set", "watch", "url", "api_key", "json"})
RESERVED_MORE = frozenset({"patience", "cache_dir", "help", "from_file", "changes"})


@dataclass(frozen=True)
class Field:
    """One property of a schema, seen through ``$ref`` and ``| null``."""

    name: str
    schema: Schema
    """Of the value itself; several alternatives stay under ``oneOf``."""
    outer: Schema
    """Where description and default stand."""
    required: bool
    nullable: bool

    @property
    def described(self) -> str:
        """The description, with what is taken where nothing is given."""
        said = [str(self.outer.get("description") or self.schema.get("description") or "")]
        if self.required:
            said.append("[required]")
        elif (default := self.outer.get("default")) is not None:
            shown = default if isinstance(default, str) else json.dumps(default)
            said.append(f"[default: {shown}]")
        return " ".join(filter(None, said))

    @property
    def choices(self) -> list[str]:
        """The strings allowed, where the schema lists them."""
        listed = self.schema.get("enum", [self.schema["const"]] if "const" in self.schema else [])
        return listed if all(isinstance(value, str) for value in listed) else []

    @property
    def type_name(self) -> str:
        """The type as a person reads it."""
        if self.choices:
            return "|".join(self.choices)
        return str(self.schema.get("type", "object"))


def fields_of(schema: Schema, root: Schema) -> list[Field]:
    """Return the properties of an object schema."""
    required = schema.get("required", [])
    found = []
    for name, outer in schema.get("properties", {}).items():
        inner, nullable = _see(outer, root)
        found.append(Field(name, inner, outer, name in required, nullable))
    return found


def _see(schema: Schema, root: Schema) -> tuple[Schema, bool]:
    """Follow ``$ref`` and drop ``null`` from alternatives."""
    if "$ref" in schema:
        schema = root.get("$defs", {}).get(schema["$ref"].rsplit("/", 1)[-1], {})
    branches = schema.get("anyOf") or schema.get("oneOf")
    if not branches:
        return schema, False
    seen = [_see(branch, root)[0] for branch in branches]
    kept = [branch for branch in seen if branch.get("type") != "null"]
    nullable = len(kept) < len(seen)
    return (kept[0] if len(kept) == 1 else {**schema, "oneOf": kept}), nullable


def option(field: Field) -> click.Option | None:
    """Return the option for a scalar field; None where only ``--set`` can say it."""
    flag = "--" + field.name.replace("_", "-")
    if field.name in RESERVED | RESERVED_MORE or "oneOf" in field.schema:
        return None
    if field.schema.get("type") == "boolean":
        flag = f"{flag}/--no-{flag[2:]}"
        return click.Option([flag, field.name], default=None, help=field.described)
    kind = _type(field)
    if kind is None:
        return None
    return click.Option([flag, field.name], type=kind, default=None, help=field.described)


def _type(field: Field) -> click.ParamType[Any] | None:
    if field.choices:
        return click.Choice(field.choices)
    name, about = field.schema.get("type"), field.schema
    if name not in {"integer", "number"}:
        return TEXT if name == "string" else None
    low, high = about.get("minimum"), about.get("maximum")
    over, under = about.get("exclusiveMinimum"), about.get("exclusiveMaximum")
    if name == "integer" and over is None and under is None:
        return click.IntRange(low, high) if (low, high) != (None, None) else click.INT
    return Finite(
        low if over is None else over,
        high if under is None else under,
        min_open=over is not None,
        max_open=under is not None,
    )


def settable(schema: Schema) -> list[tuple[str, str]]:
    """Return (path and type, description) of what ``--set`` alone can say."""
    rows: dict[tuple[str, str], list[str]] = {}
    for field in fields_of(schema, schema):
        if option(field) is None and field.name not in {"kind", "labels"}:
            for path, variant, leaf in _leaves(field, schema, "", ""):
                rows.setdefault((f"{path} {leaf.type_name}", leaf.described), []).append(variant)
    return [(f"{head}{_only(variants)}", text) for (head, text), variants in rows.items()]


def _leaves(
    field: Field, root: Schema, prefix: str, variant: str
) -> Iterator[tuple[str, str, Field]]:
    """Yield (path, alternative it belongs to, field) for every value inside a field."""
    parts = [part for part in _alternatives(field) if part.get("properties")]
    path = prefix + field.name
    if not parts:
        yield path, variant, field
    tags: dict[str, list[str]] = {}
    for part in parts:
        inner = fields_of(part, root)
        tag = next((each for each in inner if "const" in each.schema and not each.nullable), None)
        if tag is not None:
            tags.setdefault(tag.name, []).extend(tag.choices)
        inside = tag.choices[0] if tag is not None and len(parts) > 1 else variant
        for each in (each for each in inner if each is not tag):
            yield from _leaves(each, root, f"{path}.", inside)
    for name, choices in tags.items():
        default = (field.outer.get("default") or {}).get(name)
        chosen = Field(
            name, {"enum": choices}, {"default": default}, required=False, nullable=False
        )
        yield f"{path}.{name}", "", chosen


def _alternatives(field: Field) -> list[Schema]:
    return [field.schema, *field.schema.get("oneOf", [])]


def _only(variants: list[str]) -> str:
    named = [variant for variant in variants if variant]
    return f" (for {', '.join(named)})" if named else ""


def read_change(text: str, schema: Schema) -> tuple[list[str], Any]:
    """Read ``path=value``: JSON where it is JSON, unless the schema wants text there."""
    path, equals, value = text.partition("=")
    names = path.split(".")
    if not equals or not all(names) or len(names) > strict.DEPTH:
        raise click.BadParameter(f"{text[:60]!r}; needed path=value", param_hint="--set")
    if _wants_text(path, schema):
        return names, value
    try:
        return names, strict.loads(value)
    except json.JSONDecodeError:
        return names, value
    except strict.NotTaken as error:
        raise click.BadParameter(f"{path}: {error}", param_hint="--set") from error


def _wants_text(path: str, schema: Schema) -> bool:
    """Whether every field the path may mean is a plain string."""
    level, found = [schema], []
    for name in path.split("."):
        found = [f for part in level for f in fields_of(part, schema) if f.name == name]
        level = [part for f in found for part in _alternatives(f)]
    return bool(found) and all(f.type_name == "string" and not f.nullable for f in found)


def apply(spec: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a nested value, making the objects on the way."""
    for name in path[:-1]:
        inner = spec.setdefault(name, {})
        if not isinstance(inner, dict):
            raise click.BadParameter(f"{name} is {inner!r}, not an object", param_hint="--set")
        spec = inner
    spec[path[-1]] = value


def complete(spec: dict[str, Any], schema: Schema) -> None:
    """Name the alternative meant where the spec does not: that of the field's default."""
    for field in fields_of(schema, schema):
        given, default = spec.get(field.name), field.outer.get("default")
        tag = field.outer.get("discriminator", field.schema.get("discriminator", {}))
        name = tag.get("propertyName")
        if isinstance(given, dict) and isinstance(default, dict) and name in default:
            given.setdefault(name, default[name])


def absent(spec: Mapping[str, Any], schema: Schema) -> list[str]:
    """Return the required fields a spec lacks."""
    return [name for name in schema.get("required", []) if name not in spec]
