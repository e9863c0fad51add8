"""What can be done with finished runs: a module for each command, with its parser and its action.

These modules load what their actions need when one begins, so that help is there at once.
"""

from types import ModuleType

from bmrs.runs import compare_command, curve_command, export_command

COMMANDS: dict[str, ModuleType] = {
    "export": export_command,
    "compare": compare_command,
    "curve": curve_command,
}
"""By name: modules with ``HELP``, ``parser(make)`` and ``action(options)``."""

__all__ = ["COMMANDS"]
