"""Reads docker-compose.yml and Dockerfile as Docker does: variables put in, stages followed."""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[2]
_VARIABLE = re.compile(r"\$\$|\$\{(?P<name>\w+)(?::(?P<sort>[?-])(?P<rest>[^}]*))?\}")


class VariableMissing(KeyError):
    """A required variable has no value; its message says what to set."""


def read_compose() -> dict[str, Any]:
    """Return the file with its anchors resolved and its variables as they stand."""
    document: dict[str, Any] = YAML(typ="safe").load(ROOT / "docker-compose.yml")
    return document


def strings(value: object) -> Iterator[str]:
    """Yield every string at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)


def put_in(text: str, env: Mapping[str, str]) -> str:
    """Replace ``${NAME}``, ``${NAME:-default}``, ``${NAME:?message}`` and ``$$``."""

    def one(match: re.Match[str]) -> str:
        name, sort = match["name"], match["sort"]
        if name is None:
            return "$"
        if sort == "?" and not env.get(name):
            raise VariableMissing(match["rest"])
        return env.get(name) or (match["rest"] if sort == "-" else "")

    return _VARIABLE.sub(one, text)


def required() -> set[str]:
    """Return the variables without which nothing starts."""
    found = (match for text in strings(read_compose()) for match in _VARIABLE.finditer(text))
    return {match["name"] for match in found if match["sort"] == "?"}


@dataclass(frozen=True)
class Stage:
    """One FROM and what follows it."""

    base: str
    steps: tuple[tuple[str, str], ...]
    """Instruction and the rest of its line, joined over line ends."""

    def all(self, instruction: str) -> list[str]:
        """Return the arguments of every such instruction."""
        return [rest for name, rest in self.steps if name == instruction]


def read_dockerfile() -> dict[str, Stage]:
    """Return the stages by name, in their order."""
    text = (ROOT / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    stages: dict[str, list[tuple[str, str]]] = {}
    bases: dict[str, str] = {}
    for line in joined.splitlines():
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            stages[name], bases[name] = [], base
        elif stages:
            stages[name].append((instruction, rest.strip()))
    return {name: Stage(bases[name], tuple(steps)) for name, steps in stages.items()}


def target(name: str) -> Stage:
    """Return a stage with the steps of those it stands on before its own."""
    stages = read_dockerfile()
    stage = stages[name]
    if stage.base not in stages:
        return stage
    return Stage(stage.base, target(stage.base).steps + stage.steps)


def image_env(name: str) -> dict[str, str]:
    """Return the variables that an image sets, but PATH."""
    pairs = [pair for step in target(name).all("ENV") for pair in shlex.split(step)]
    return {key: value for key, _, value in (p.partition("=") for p in pairs) if key != "PATH"}
