"""The command ``bmrs``, and ``python -m bmrs``."""

import os
import sys


def main() -> int:
    """Run the command line, and return its exit code."""
    try:
        from bmrs.cli import main as run  # which takes seconds, as torch does
    except KeyboardInterrupt:
        print("bmrs: interrupted", file=sys.stderr)
        return 130
    # For networks and data as package.module:factory; python -m looks there first, a script does not.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return run()


if __name__ == "__main__":
    sys.exit(main())
