"""Finds plugins: the file name is the registered name, one constant at its end is the thing."""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, TypeVar

T = TypeVar("T")


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
