"""What docker-compose.yml and Dockerfile promise, read from the files themselves."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from datetime import timedelta
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from core.settings import Settings
from tests.team.compose import (
    ROOT,
    VariableMissing,
    image_env,
    put_in,
    read_compose,
    read_dockerfile,
    required,
    strings,
    target,
)

SERVICES: dict[str, Any] = read_compose()["services"]
BIN = Path(sys.executable).parent
each_service = pytest.mark.parametrize("name", SERVICES)


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, text=True, capture_output=True, check=False, **options)


def test_docker_accepts_the_compose_file() -> None:
    schema = ("--builtin-schema", "vendor.compose-spec")
    done = run(BIN / "check-jsonschema", *schema, ROOT / "docker-compose.yml")

    assert done.returncode == 0, done.stdout


def test_hadolint_has_nothing_to_say_of_the_dockerfile() -> None:
    done = run(BIN / "hadolint", ROOT / "Dockerfile")

    assert (done.returncode, done.stdout) == (0, "")


def test_services_and_volumes() -> None:
    compose = read_compose()

    assert set(SERVICES) == {"api", "worker", "worker-gpu", "beat", "postgres", "redis"}
    assert set(compose["volumes"]) == {"database", "data", "models"}
    assert SERVICES["api"]["volumes"] == ["data:/var/lib/stillroom"]
    for name in ("api", "worker", "worker-gpu"):
        assert "data:/var/lib/stillroom" in SERVICES[name]["volumes"]
        assert (
            image_env(SERVICES[name]["build"]["target"])["STILL_DATA_DIR"] == "/var/lib/stillroom"
        )
    assert SERVICES["beat"]["volumes"] == []
    assert SERVICES["postgres"]["volumes"] == ["database:/var/lib/postgresql"]


@pytest.mark.parametrize("name", ["worker", "worker-gpu"])
@pytest.mark.parametrize(
    ("folder", "mounted"),
    [("", "models:/models:ro"), ("/srv/models", "/srv/models:/models:ro")],
)
def test_workers_alone_read_models_and_cannot_write_them(
    name: str, folder: str, mounted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = SERVICES[name]
    roots = put_in(service["environment"]["STILL_MODEL_ROOTS"], {})

    assert [put_in(text, {"STILL_MODELS_FOLDER": folder}) for text in service["volumes"]] == [
        "data:/var/lib/stillroom",
        mounted,
    ]
    monkeypatch.setenv("STILL_MODEL_ROOTS", roots)
    assert Settings(data_dir=tmp_path).model_roots == (Path("/models"),)
    for other in ("api", "beat"):
        assert "STILL_MODEL_ROOTS" not in SERVICES[other]["environment"]
        assert not any("/models" in text for text in SERVICES[other]["volumes"])


@each_service
def test_a_service_can_do_little_harm(name: str) -> None:
    service = SERVICES[name]
    uid, gid = map(int, service["user"].split(":"))

    assert min(uid, gid) > 0
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert service["restart"] == "unless-stopped"
    assert "privileged" not in service


@each_service
def test_a_service_says_whether_it_is_healthy(name: str) -> None:
    check = SERVICES[name]["healthcheck"]

    assert check["test"][0] in ("CMD", "CMD-SHELL")
    assert {"interval", "timeout", "retries", "start_period"} <= set(check)


@each_service
def test_images_are_pinned(name: str) -> None:
    service = SERVICES[name]
    image = put_in(service["image"], {})

    assert re.search(r":\d+\.\d+(\.\d+)?(-bookworm)?$", image), image
    if "build" in service:
        assert service["build"]["target"] in read_dockerfile()


def test_nothing_starts_before_what_it_needs() -> None:
    healthy = {"condition": "service_healthy"}

    assert SERVICES["api"]["depends_on"] == {"postgres": healthy, "redis": healthy}
    for name in ("worker", "worker-gpu", "beat"):
        assert SERVICES[name]["depends_on"]["api"] == healthy, "the API migrates"


def test_only_the_gpu_worker_needs_a_profile_and_a_gpu() -> None:
    assert [name for name in SERVICES if "profiles" in SERVICES[name]] == ["worker-gpu"]
    gpu = SERVICES["worker-gpu"]
    [device] = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert gpu["profiles"] == ["gpu"]
    assert device["capabilities"] == ["gpu"]
    assert gpu["command"][-1] == "cuda:0"


def test_the_api_is_bound_to_this_machine_and_the_rest_to_none() -> None:
    published = {name: s["ports"] for name, s in SERVICES.items() if "ports" in s}

    assert {name: [put_in(p, {}) for p in ports] for name, ports in published.items()} == {
        "api": ["127.0.0.1:8321:8321"]
    }
    assert read_compose()["networks"]["back"] == {"internal": True}


def test_a_worker_has_time_to_hand_its_chunk_back() -> None:
    for name in ("worker", "worker-gpu"):
        said = put_in(SERVICES[name]["stop_grace_period"], {})
        both = (Settings.model_fields[field].default for field in ("soft_stop", "stop_limit"))
        assert timedelta(seconds=int(said.removesuffix("s"))) > sum(both, timedelta(seconds=5))


def test_no_file_holds_a_secret() -> None:
    secret = {"POSTGRES_PASSWORD", "REDIS_PASSWORD", "STILL_OPERATOR_KEY", "STILL_KEY_SECRET"}
    example = dict(
        line.split("=", 1)
        for line in (ROOT / ".env.example").read_text().splitlines()
        if "=" in line and not line.startswith("#")
    )

    assert required() == secret
    assert example == dict.fromkeys(secret, "")
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if value is None:
                continue  # taken from .env as it is, or not at all
            if re.search(r"PASSWORD|KEY|SECRET|TOKEN", name):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), name
            elif "@" in value:
                assert re.search(r":\$\{\w+:\?[^}]+\}@", value), name
    steps = [step for stage in read_dockerfile().values() for step in stage.steps]
    assert not re.search(r"(?i)password|secret|_key", str(steps))


def test_every_setting_that_is_passed_on_exists() -> None:
    known = {f"STILL_{name.upper()}" for name in Settings.model_fields}
    asked = {name for s in SERVICES.values() for name in s.get("environment", {})}

    assert {name for name in asked if name.startswith("STILL_")} <= known


@pytest.mark.parametrize("name", sorted(required()))
def test_a_missing_secret_is_named(name: str) -> None:
    others = dict.fromkeys(required() - {name}, "x")

    with pytest.raises(VariableMissing, match=f"set {name} in .env"):
        [put_in(text, others) for text in strings(SERVICES)]


def test_workers_and_beat_get_no_key() -> None:
    for name in ("worker", "worker-gpu", "beat"):
        asked = SERVICES[name]["environment"]
        assert not {"STILL_API_KEY", "STILL_KEY_SECRET", "STILL_METRICS_KEY"} & set(asked)


def test_passwords_stand_on_no_command_line() -> None:
    for service in SERVICES.values():
        *command, script = service.get("command", [""])
        assert "PASSWORD" not in "".join(command)
        assert "PASSWORD" not in script or "<<CONF" in script, "a here-document is no argument"


@pytest.mark.parametrize("name", ["api", "worker"])
def test_an_image_runs_as_nobody_in_particular(name: str) -> None:
    image = target(name)

    assert image.all("USER") == ["10001:10001"]
    assert json.loads(image.all("CMD")[-1]) == SERVICES[name]["command"]
    [health] = image.all("HEALTHCHECK")
    command = json.loads(health[health.index("[") :])
    assert ["CMD", *command] == SERVICES[name]["healthcheck"]["test"]


def test_what_is_built_on_and_installed_is_pinned() -> None:
    text = (ROOT / "Dockerfile").read_text()
    installs = [
        step
        for stage in read_dockerfile().values()
        for step in stage.all("RUN")
        if " install " in f" {step}" and "pip" in step
    ]

    assert re.search(r"^ARG PYTHON_IMAGE=python:3\.11\.\d+-slim-bookworm$", text, re.MULTILINE)
    assert len(installs) == 4
    assert all(re.search(r" -c (/dist/)?constraints\.txt ", step) for step in installs)


def extras_of(venv: str) -> set[str]:
    """The extras that a stage installs, as the Dockerfile says it."""
    found = re.findall(r"stillroom-\*\.whl\)\[([a-z,]+)\]", " ".join(target(venv).all("RUN")))
    assert len(found) == 1
    return set(found[0].split(","))


def closure(package: str, extras: Iterable[str], seen: set[str] | None = None) -> set[str]:
    """Every package that an installation brings, by the metadata of what is installed here."""
    seen = set() if seen is None else seen
    for text in requires(package) or []:
        need = Requirement(text)
        asked = need.marker is None or any(
            need.marker.evaluate({"extra": extra}) for extra in ("", *extras)
        )
        name = canonicalize_name(need.name)
        key = f"{name}[{','.join(sorted(need.extras))}]"
        if asked and key not in seen:
            seen.add(key)
            closure(name, need.extras, seen)
    return seen


def test_torch_is_in_the_workers_image_alone() -> None:
    api, worker = extras_of("api-venv"), extras_of("worker-venv")

    assert api == {"server", "team", "tracing"}
    assert worker == {"llm", "team", "tracing"}
    assert "torch[]" not in closure("stillroom", api)
    assert {"torch[]", "transformers[]", "accelerate[]", "celery[]", "fastapi[]"} <= closure(
        "stillroom", worker
    )
    assert "COPY --from=api-venv" in (ROOT / "Dockerfile").read_text()
    assert SERVICES["beat"]["build"]["target"] == "api"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel that the Dockerfile's own steps make of the files it copies."""
    folder = tmp_path_factory.mktemp("wheel")
    stage = read_dockerfile()["wheel"]
    for step in stage.all("COPY"):
        *sources, _ = step.split()
        for source in sources:
            path, place = ROOT / source, folder / source
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, place, ignore=ignored) if path.is_dir() else shutil.copy(
                path, place
            )
    build = stage.all("RUN")[-1].replace("/dist", "dist").split()
    done = run(sys.executable, "-m", *build, cwd=folder)
    assert done.returncode == 0, done.stderr
    [found] = (folder / "dist").glob("stillroom-*.whl")
    return zipfile.ZipFile(found)


def test_the_wheel_holds_all_that_the_service_reads(wheel: zipfile.ZipFile) -> None:
    there = set(wheel.namelist())
    shipped = [
        path.relative_to(ROOT)
        for package in ("api", "client", "core", "migrations", "workers")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]

    assert {str(path) for path in shipped} <= there
    assert not [name for name in there if name.startswith(("tests/", "scripts/", "bench/"))]


def test_the_build_sees_only_what_it_copies() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        source
        for stage in read_dockerfile().values()
        for step in stage.all("COPY")
        if not step.startswith("--from")
        for source in step.split()[:-1]
    }

    assert next(line for line in lines if not line.startswith("#")) == "*"
    assert allowed == copied
