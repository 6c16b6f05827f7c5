"""``still submit KIND``, ``still estimate KIND``: options made from the schema the server gives."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

import click

from client import fields, render, strict
from client.commands.jobs import follow
from client.errors import StillroomError
from client.inputs import TEXT
from client.session import (
    FAILED,
    OK,
    Session,
    clean,
    connected,
    connection_options,
    labels_of,
    say,
    say_json,
    screen,
    session,
)
from client.views import Cost, Estimate, KindView, StageCost, StageEstimate

SHARED_HELP = "Objects and lists: --set training.epochs=5, --set 'list=[1, 2]'. May be repeated."


def shared_options() -> list[click.Option]:
    """Return the options every kind has beside its own fields."""
    return [
        click.Option(
            ["--set", "changes"], multiple=True, type=TEXT, metavar="PATH=VALUE", help=SHARED_HELP
        ),
        click.Option(
            ["--label", "label"], multiple=True, type=TEXT, metavar="KEY=VALUE", help="A free tag."
        ),
        click.Option(
            ["--file", "from_file"],
            type=click.File("r", encoding="utf-8"),
            help="Start from this JSON spec; - reads standard input.",
        ),
    ]


Finish = Callable[..., None]
"""What is done with a whole spec: called with the session, the spec and the command's own flags."""


class ByKind(click.Group):
    """A command whose subcommands are the server's kinds; ``finish`` gets the spec."""

    def __init__(
        self, name: str, *, finish: Finish, flags: Sequence[click.Option] = (), help_text: str
    ) -> None:
        self._finish = finish
        self._flags = flags
        super().__init__(
            name,
            callback=self._from_file,
            params=[*shared_options(), *flags, *connection_options()],
            help=help_text,
            invoke_without_command=True,
            subcommand_metavar="[KIND] [OPTIONS]...",
        )

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Ask the server."""
        return [kind["kind"] for kind in _kinds(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Make the command of one kind."""
        for kind in _kinds(ctx):
            if kind["kind"] == cmd_name:
                return kind_command(kind, finish=self._finish, flags=self._flags)
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Read --url and its like from behind the kind first: they say whom to ask."""
        peek = click.Command(
            None,
            params=list(connection_options()),
            add_help_option=False,
            context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
        )
        peek.make_context(None, args[1:], parent=ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the kinds, or say that the server does not answer."""
        try:
            rows = [(kind["kind"], clean(kind["summary"])) for kind in _kinds(ctx)]
        except StillroomError as error:
            rows = [("?", clean(str(error)))]
        with formatter.section("Kinds"):
            formatter.write_dl(rows)

    def _from_file(
        self,
        changes: tuple[str, ...],
        label: tuple[str, ...],
        from_file: TextIO | None,
        **flags: bool,
    ) -> None:
        """Take a spec that names its kind itself, where no subcommand does."""
        context = click.get_current_context()
        if context.invoked_subcommand is not None:
            if changes or label or from_file is not None or any(flags.values()):
                raise click.UsageError(
                    f"options stand after the kind: {context.invoked_subcommand}"
                )
            return
        if from_file is None:
            raise click.UsageError("name a KIND or give --file; `still kinds` lists the kinds")
        spec = _read(from_file)
        kind = next((k for k in _kinds(context) if k["kind"] == spec.get("kind")), None)
        if kind is None:
            known = ", ".join(k["kind"] for k in _kinds(context))
            raise click.UsageError(f"kind {spec.get('kind')!r} in the file; there are: {known}")
        self._finish(session(), whole(spec, kind["schema"], changes, label), **flags)


def _kinds(context: click.Context) -> Sequence[KindView]:
    """Return the server's kinds, asked for once per command."""
    here = session(context)
    key = f"stillroom.kinds.{here.url}"
    if key not in context.meta:
        with here.client() as client:
            context.meta[key] = client.kinds()
    found: Sequence[KindView] = context.meta[key]
    return found


def kind_command(kind: KindView, *, finish: Finish, flags: Sequence[click.Option]) -> click.Command:
    """Return the command for one kind: an option per scalar field."""
    schema = kind["schema"]
    options = [fields.option(field) for field in fields.fields_of(schema, schema)]

    def run(**given: Any) -> None:
        source, changes, label = given.pop("from_file"), given.pop("changes"), given.pop("label")
        chosen = {str(flag.name): given.pop(str(flag.name)) for flag in flags}
        spec = _read(source) if source is not None else {}
        if spec.setdefault("kind", kind["kind"]) != kind["kind"]:
            raise click.UsageError(f"the file is a spec of kind {spec['kind']!r}")
        spec |= {name: value for name, value in given.items() if value is not None}
        finish(session(), whole(spec, schema, changes, label), **chosen)

    command = click.Command(
        kind["kind"],
        params=[*(made for made in options if made is not None), *shared_options(), *flags],
        callback=run,
        help=_help(kind),
        epilog=_epilog(kind),
        context_settings={"max_content_width": 100},
    )
    return connected(command)


def _help(kind: KindView) -> str:
    reads = [f"{name}: {' or '.join(formats)}" for name, formats in kind["inputs"].items()]
    lines = [kind["summary"]]
    if reads:
        lines.append(f"Reads {', '.join(reads)}; each a SHA-256 or JOB/OUTPUT of any job.")
    if kind["outputs"]:
        lines.append(f"Makes {', '.join(kind['outputs'])}.")
    return clean("\n\n".join(lines))


def _epilog(kind: KindView) -> str:
    """List the fields that only --set reaches, with an example."""
    rows = [f"  {path}  {text}".rstrip() for path, text in fields.settable(kind["schema"])]
    parts = [["Fields for --set:", *rows]] if rows else []
    parts.append(["Example spec:", f"  {json.dumps(kind['example'])}"])
    # A leading \b keeps click from rewrapping the paragraph.
    return "\n\n".join("\b\n" + clean("\n".join(part)) for part in parts)


def _read(source: TextIO) -> dict[str, Any]:
    try:
        spec = strict.loads(source.read())
    except ValueError as error:
        raise click.BadParameter(f"{source.name}: {error}", param_hint="--file") from error
    if not isinstance(spec, dict):
        raise click.BadParameter(f"{source.name} holds no JSON object", param_hint="--file")
    return spec


def whole(
    spec: dict[str, Any],
    schema: Mapping[str, Any],
    changes: tuple[str, ...],
    label: tuple[str, ...],
) -> dict[str, Any]:
    """Return the spec with what the options change; end the command where something lacks."""
    for change in changes:
        fields.apply(spec, *fields.read_change(change, schema))
    if label:
        had = spec.get("labels", {})
        if not isinstance(had, dict):
            raise click.BadParameter(
                "the labels it is added to are no object of texts", param_hint="--label"
            )
        spec["labels"] = {**had, **labels_of(label)}
    fields.complete(spec, schema)
    lacking = fields.absent(spec, schema)
    if lacking:
        named = ", ".join("--" + name.replace("_", "-") for name in lacking)
        raise click.UsageError(f"missing: {named}")
    return spec


def _send(here: Session, spec: dict[str, Any], *, watch: bool) -> None:
    """Submit, and say what became of it."""
    with here.client() as client:
        job = client.submit(spec)
        if watch:
            if not here.as_json and screen().is_terminal:
                say(f"{job['id']} submitted")
            follow(client, here, job["id"])
    if here.as_json:
        say_json(job)
    elif screen().is_terminal:
        say(f"{job['id']} {job['state']}  (`still watch {job['id']}`)")
    else:
        say(job["id"])
    click.get_current_context().exit(OK)


def _ask(here: Session, spec: dict[str, Any]) -> None:
    """Print what the job would take; exit 1 where no live worker could run it."""
    with here.client() as client:
        found = client.estimate(spec)
    if here.as_json:
        say_json(found)
    else:
        for key, value in _estimated(found):
            say(f"{key:<12} {value}")
    click.get_current_context().exit(OK if found["can_run"] else FAILED)


def _estimated(found: Estimate) -> list[tuple[str, str]]:
    seconds, hits = found["device_seconds"], found["cache_hits"]
    facts = [
        ("can run", "yes" if found["can_run"] else f"no: {found['why_not']}"),
        ("starts", render.start(found, time.time())),
        ("waits", found["waits_for"] or ""),
        *(("stage", _stage(stage)) for stage in found["stages"] or ()),
        ("chunks", str(found["chunks"] or "")),
        ("device time", f"{render.duration(seconds)}: " if seconds is not None else "unknown: "),
        ("from cache", f"{hits} files: " if hits is not None else "unknown: "),
        *_counted(found["cost"]),
    ]
    why = {"device time": found["device_seconds_from"], "from cache": found["cache_hits_from"]}
    return [(key, value + why.get(key, "")) for key, value in facts if value]


def _counted(cost: Cost | None) -> list[tuple[str, str]]:
    """List what a kind counts before it runs: stage by stage, in all, and what that rests on."""
    if cost is None:
        return []
    lines = [("counted", _stage_cost(stage)) for stage in cost["stages"]]
    total = sum(stage["seconds"] for stage in cost["stages"])
    lines.append(("in all", f"{_seconds(total)} of one device"))
    lines += [("passes", f"{model}: {tokens:,} tokens") for model, tokens in cost["passes"].items()]
    return lines + [("assumes", f"{what}: {rate}") for what, rate in cost["assumes"].items()]


def _seconds(seconds: float) -> str:
    return render.duration(seconds) if seconds >= 1 else "less than 1 s"


def _stage_cost(stage: StageCost) -> str:
    return (
        f"{stage['stage']}: {stage['operations']:.2g} operations, "
        f"{render.size(int(stage['read_bytes']))} read, "
        f"{render.size(int(stage['written_bytes']))} written, "
        f"{_seconds(stage['seconds'])}"
    )


def _stage(stage: StageEstimate) -> str:
    each = stage["seconds_per_chunk"]
    parts = [
        f"{stage['name']}: {stage['chunks']} chunks",
        "one after another" if stage["chained"] else "side by side",
        f"on {stage['device'] or 'any device'}",
        f"{render.size(stage['memory_bytes'])} each" if stage["memory_bytes"] else "",
        f"{each:.2g} s each" if each is not None else "",
    ]
    return ", ".join(filter(None, parts))


submit = ByKind(
    "submit",
    finish=_send,
    flags=[click.Option(["--watch", "watch"], is_flag=True, help="Follow the job until it ends.")],
    help_text="Submit a job. `still submit KIND --help` shows a kind's fields.",
)
estimate = ByKind(
    "estimate",
    finish=_ask,
    help_text="Tell what a job would take and when it would start; nothing is submitted. "
    "Takes what `still submit` takes.",
)
