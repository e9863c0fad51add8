"""``python -m bmrs``: the same as the command ``bmrs``."""

import sys

from bmrs.cli import main

sys.exit(main())
