"""Print the oldest versions that pyproject.toml allows, as constraints for pip."""

from __future__ import annotations

import re
from pathlib import Path

REQUIREMENT = re.compile(r'"([A-Za-z0-9_-]+)>=([0-9.]+)')


def main() -> None:
    """Print a line for each package of the library and its extras, but for the tools of the gate."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    dependencies = text[text.index("dependencies = [") : text.index("dev = [")]
    for name, version in REQUIREMENT.findall(dependencies):
        exact = version if "." in version else f"{version}.0"
        print(f"{name}=={exact}" + ("" if exact.count(".") > 1 else ".*"))


if __name__ == "__main__":
    main()
