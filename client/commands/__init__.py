"""The subcommands of ``still``, one file per thing they deal with."""
