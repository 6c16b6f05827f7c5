"""Finds plugins: the file name is the registered name, one constant at its end is the thing."""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

T = TypeVar("T")
LOSS_PLUGINS = "stillroom.losses"
"""Entry point group of loss terms that other packages bring."""


@cache
def scan(package: str, attribute: str, sort: type[T]) -> Mapping[str, T]:
    """Map each public module of ``package`` to its ``attribute``, sorted by name.

    Raises:
        TypeError: a file does not define the attribute, or defines it as another type.
    """
    found: dict[str, Any] = {}
    paths = importlib.import_module(package).__path__
    for name in sorted(module.name for module in pkgutil.iter_modules(paths)):
        if name.startswith("_"):
            continue
        plugin = getattr(importlib.import_module(f"{package}.{name}"), attribute, None)
        if not isinstance(plugin, sort):
            file = f"{package.replace('.', '/')}/{name}.py"
            raise TypeError(f"{file} must define {attribute}: {sort.__name__}")
        found[name] = plugin
    return MappingProxyType(found)


@cache
def installed(group: str, sort: type[T]) -> Mapping[str, T]:
    """Map each entry point of an installed package in ``group`` to what it names, sorted by name.

    Raises:
        TypeError: an entry point is of another type.
    """
    found: dict[str, T] = {}
    for point in sorted(entry_points(group=group), key=lambda each: each.name):
        plugin = point.load()
        if not isinstance(plugin, sort):
            raise TypeError(f"entry point {point.name} = {point.value} must be a {sort.__name__}")
        found[point.name] = plugin
    return MappingProxyType(found)


def names(package: str, group: str) -> list[str]:
    """List what ``scan`` and ``installed`` would find, without importing any of it."""
    folder = Path(__file__).parents[1].joinpath(*package.split("."))
    files = {path.stem for path in folder.glob("[!_]*.py")}
    return sorted(files | {point.name for point in entry_points(group=group)})
