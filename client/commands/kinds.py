"""``still kinds``: what may be asked of this service."""

import click
from rich.table import Table

from client.render import plain
from client.session import say, say_json, screen, session


@click.command()
def kinds() -> None:
    """List the kinds of job the service runs."""
    here = session()
    with here.client() as client:
        found = client.kinds()
    if here.as_json:
        say_json(list(found))
        return
    console = screen()
    rows = [
        (
            kind["kind"],
            ", ".join(f"{name}: {'|'.join(of)}" for name, of in kind["inputs"].items()),
            ", ".join(kind["outputs"]),
            kind["summary"],
        )
        for kind in found
    ]
    if not console.is_terminal:
        for row in rows:
            say("\t".join(row))
        return
    table = Table("kind", "reads", "makes", "what it does", box=None, header_style="bold")
    for row in rows:
        table.add_row(*(plain(cell) for cell in row))
    console.print(table)
    console.print("\n`still submit KIND --help` shows a kind's fields.", style="dim")
