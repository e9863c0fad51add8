"""Commands around the kernels: ``python -m benchmarks COMMAND --help``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# Each module has ``main(arguments) -> exit code`` and parses its own options; imported only when it is asked for.
COMMANDS = {
    "accuracy": ("benchmarks.accuracy.command", "measure the error of every quantity against the reference"),
    "compaction": (
        "benchmarks.experiments.compaction",
        "compact the architectures that people use, beside Torch-Pruning",
    ),
    "compaction-memory": (
        "benchmarks.experiments.compaction_memory",
        "measure the memory that compacting Llamas of rising size takes",
    ),
    "finite-training": (
        "benchmarks.experiments.finite_training",
        "train with the functions here and with the plain formulas, and look for NaN",
    ),
    "gpu-check": ("benchmarks.gpu.check", "test and time the kernels on this machine's GPU"),
    "paper": ("benchmarks.experiments.paper", "repeat the paper's experiment on its small networks"),
    "peers": (
        "benchmarks.experiments.peers.command",
        "compare the recipe with other ways to a network of the same size",
    ),
    "rules": ("benchmarks.experiments.peers.rules", "compare the decisions of rules on converged posteriors"),
    "small-networks": (
        "benchmarks.experiments.small_networks.command",
        "train the paper's networks once and judge each by all criteria",
    ),
    "scaling": ("benchmarks.speed.scaling", "time everything against its size, and fit the slopes"),
    "readme": ("benchmarks.tables.readme", "write the README's tables from the committed results"),
    "yardstick": (
        "benchmarks.experiments.yardstick.command",
        "prune the two networks of the literature on MNIST",
    ),
    "step": ("benchmarks.speed.step", "time training steps with noise against the same network without"),
    "pruning": ("benchmarks.speed.pruning", "time pruning decisions, compaction and the compacted networks"),
    "profile": ("benchmarks.gpu.profile", "have Nsight Compute say what bounds each kernel"),
    "machine-code": ("benchmarks.machine_code.command", "compile the kernels and read their machine code"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name and return its exit code."""
    commands = "\n".join(f"  {name:<19}{description}" for name, (_, description) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"commands:\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="see COMMAND --help")
    parsed = parser.parse_args(arguments)
    module = importlib.import_module(COMMANDS[parsed.command][0])
    exit_code: int = module.main(parsed.options)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
