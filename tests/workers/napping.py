"""``python -m workers`` for tests: it knows the kind ``nap`` too."""

import sys
from pathlib import Path

KINDS = str(Path(__file__).with_name("kinds"))

if __name__ == "__main__":
    import core.kinds
    from workers.__main__ import main

    core.kinds.__path__.append(KINDS)
    sys.exit(main())
