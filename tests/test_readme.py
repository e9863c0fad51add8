"""The README does what it says: its example runs, its commands exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import bmrs
from benchmarks.__main__ import COMMANDS
from benchmarks.__main__ import main as benchmarks
from benchmarks.tables import readme

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def blocks() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```", README.read_text("utf-8"), re.M | re.S):
        found.setdefault(language, []).append(text)
    return found


def test_library_example(blocks, tmp_path, monkeypatch, capsys):
    (example,) = blocks["python"]
    assert len([line for line in example.splitlines() if line.strip()]) <= 20
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(compile(example, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert printed.count("pruned by BMRSOdds") == 1
    assert "posteriors settled after" in printed
    assert "Linear" in printed
    # It really is smaller, as good, and what was saved.
    small, loaded = names["small"], bmrs.load("small")
    sizes = [sum(p.numel() for p in model.parameters()) for model in (names["model"], small)]
    assert sizes[1] < sizes[0] / 2
    inputs = torch.randn(4000, 20)
    labels = (inputs[:, 0] * inputs[:, 1] > 0).long()
    dense, pruned = ((model(inputs).argmax(1) == labels).double().mean() for model in (names["model"], small))
    assert dense > 0.9
    assert pruned > dense - 0.04
    assert torch.equal(loaded(inputs), small(inputs))


def test_commands_for_newcomers_stand_on_one_line(blocks):
    install_and_run = [line for block in blocks["sh"] for line in block.splitlines() if "pip install" in line]
    assert len(install_and_run) == 2
    assert install_and_run[0].endswith("bmrs train")
    assert install_and_run[1].endswith("-m pytest")


def test_options_on_the_command_line_exist(blocks, capsys):
    from bmrs.cli import main

    assert main(["train", "--help"]) == 0
    known = capsys.readouterr().out
    commands = [
        line for block in blocks["sh"] for line in block.splitlines() if line.startswith("bmrs train")
    ]
    options = {option for line in commands for option in re.findall(r"--[\w-]+", line.split("#")[0])}
    assert options
    for option in options:
        assert option in known, f"{option} stands in the README and not in bmrs train --help"


def test_every_public_name_is_described(blocks):
    import bmrs_kernels

    text = README.read_text("utf-8")
    for name in bmrs_kernels.__all__:
        assert f"`{name}`" in text


def test_tables_are_those_of_the_committed_results(tmp_path, monkeypatch, capsys):
    assert benchmarks(["readme", "--check"]) == 0
    changed = tmp_path / "README.md"
    changed.write_text(README.read_text("utf-8").replace("| `kl_divergence` |", "| `kl` |"), "utf-8")
    monkeypatch.setattr(readme, "README", changed)
    assert benchmarks(["readme", "--check"]) == 1
    assert "run python -m benchmarks readme" in capsys.readouterr().err
    assert benchmarks(["readme"]) == 0
    assert changed.read_text("utf-8") == README.read_text("utf-8")


def test_a_table_of_no_results_is_an_error(tmp_path):
    with pytest.raises(KeyError, match="unknown-table"):
        readme.with_results("<!-- results: unknown-table -->\n<!-- end -->", tmp_path)


def test_commands_of_the_benchmarks_exist(blocks):
    commands = re.findall(r"python -m benchmarks ([\w-]+)", README.read_text("utf-8"))
    assert {"accuracy", "gpu-check", "machine-code"} <= set(commands) <= set(COMMANDS)


def test_links_lead_somewhere():
    text = README.read_text("utf-8")
    headings = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", text, re.M)
    }
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert link[1:] in headings if link.startswith("#") else (README.parent / link).exists(), link
