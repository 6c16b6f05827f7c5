"""``python -m workers``: one worker for one device, or the beat; of a team, or of one server."""

import argparse
import os
import sys

from core.settings import Settings
from workers.settings import DEVICE, StartRefused, read_settings

USAGE_ERROR = 2
KEYS = ("STILL_API_KEY", "STILL_KEY_SECRET", "STILL_METRICS_KEY")


def main() -> int:
    """Do what the command line says; return the exit status."""
    parser = _parser()
    told = parser.parse_args()
    if told.beat and told.embedded:
        parser.error("an embedded server has no beat: its workers do those duties")
    for key in KEYS:  # what a chunk's own processes need not inherit
        os.environ.pop(key, None)  # noqa: TID251 - nothing is read from it
    team = not told.embedded
    try:
        settings = read_settings(team=team)
        if told.check:
            return _check(settings, told.device)
        # Here, for --check runs every few seconds and needs next to nothing of it.
        from workers.process import run  # noqa: PLC0415

        return run(settings, device=told.device, team=team)
    except StartRefused as error:
        sys.stderr.write(f"stillroom: {' '.join(str(error).split())}\n")
        return USAGE_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m workers", description=__doc__)
    role = parser.add_mutually_exclusive_group(required=True)
    role.add_argument("--device", type=_device, help="run chunks on it: cpu, or cuda:N")
    role.add_argument("--beat", action="store_true", help="send the ticks, and do them")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--embedded", action="store_true", help="poll, and end when standard input closes"
    )
    mode.add_argument(
        "--check", action="store_true", help="end with 0 if it is running here and well"
    )
    return parser


def _device(text: str) -> str:
    if not DEVICE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: cpu, cuda:0, cuda:1, ...")
    return text


def _check(settings: Settings, device: str | None) -> int:
    if device is None:
        from workers.alive import AliveFile  # noqa: PLC0415 - the beat's needs no database

        wrong = AliveFile.of(settings).wrong()
    else:
        from workers.check import check_worker  # noqa: PLC0415 - see main()

        wrong = check_worker(settings, device)
    if wrong is not None:
        sys.stderr.write(f"stillroom: {wrong}\n")
    return 0 if wrong is None else 1


if __name__ == "__main__":
    sys.exit(main())
