"""The command ``bmrs``, and ``python -m bmrs``."""

import contextlib
import os
import sys


def main() -> int:
    """Run the command line, and return its exit code."""
    try:
        from bmrs.cli import main as run

        # For networks and data as package.module:factory; python -m looks there first, a script does not.
        with contextlib.suppress(FileNotFoundError):  # of a folder that has been deleted
            if os.getcwd() not in sys.path:
                sys.path.append(os.getcwd())
        return run()
    except KeyboardInterrupt:  # while importing, or for the second time
        print("bmrs: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
