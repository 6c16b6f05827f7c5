"""``python -m client`` is the ``still`` command."""

from client.cli import main

main()
