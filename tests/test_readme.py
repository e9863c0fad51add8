"""The READMEs do what they say: their examples run, their commands and links exist, their tables are of the results."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bmrs
import bmrs_kernels
from benchmarks.__main__ import COMMANDS
from benchmarks.__main__ import main as benchmarks
from benchmarks.tables import readme

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path
    for path in (
        *readme.readmes(),
        ROOT / ".github" / "CONTRIBUTING.md",
        ROOT / "bmrs" / "CHANGELOG.md",
        ROOT / "benchmarks" / "TUNING.md",
    )
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def blocks(document: str, language: str) -> list[str]:
    """The code blocks of a document in a language, in their order."""
    return [code for of, code in FENCE.findall(DOCUMENTS[document].read_text("utf-8")) if of == language]


def commands() -> Iterator[tuple[str, str]]:
    """All command lines of the documents, without their comments, and where they stand."""
    for document in DOCUMENTS:
        for block in blocks(document, "sh"):
            yield from ((document, line.split("#")[0].strip()) for line in block.splitlines())


def prose(path: Path) -> str:
    """A document without its code."""
    return FENCE.sub("", path.read_text("utf-8"))


def headings(path: Path) -> set[str]:
    """The anchors of a document's headings."""
    lines = re.findall(r"^#+ (.+)$", prose(path), re.M)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}


def run_blocks(document: str) -> dict[str, Any]:
    """Run the Python blocks of a document one after the other, and return the names that they leave."""
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "example"}
    for number, block in enumerate(blocks(document, "python"), start=1):
        exec(compile(block, f"{document}, block {number}", "exec", dont_inherit=True), names)
    return names


def test_the_documents_are_found():
    assert {"README.md", "bmrs/README.md", "bmrs_kernels/README.md", "benchmarks/README.md"} <= set(DOCUMENTS)


def test_first_example(tmp_path, monkeypatch, capsys):
    (example,) = blocks("README.md", "python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 20
    monkeypatch.chdir(tmp_path)
    names = run_blocks("README.md")
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


@pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning")  # Lightning's
def test_guide(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run_blocks("bmrs/README.md")
    printed = capsys.readouterr().out
    # Each step shows what the text says of it.
    assert "stem.1 and block.1" in printed
    assert "'hidden.noise': StructureCost(parameters=" in printed
    assert re.search(r"stem\.1\.noise +16 +8 +8 +0\n", printed)  # of the trial before any training
    accuracies = [float(value) for value in re.findall(r" network: (\d+\.\d)%", printed)]
    assert len(accuracies) == 2
    assert min(accuracies) > 90
    assert "posteriors settled after" in printed
    assert "judged together: stem.1.noise, block.1.noise" in printed
    assert "nothing is left of" not in printed
    at_home, anywhere, images = names["at_home"], names["anywhere"], names["images"]
    assert type(at_home) is names["Network"]
    assert isinstance(anywhere, torch.fx.GraphModule)
    assert at_home.hidden.out_features < names["model"].hidden.out_features
    torch.testing.assert_close(anywhere(images), at_home(images))
    assert (at_home(images).argmax(1) == names["labels"]).double().mean() > 0.9
    assert names["description"]["version"] == 3


OTHERS = [
    name for name in DOCUMENTS if name not in ("README.md", "bmrs/README.md") and blocks(name, "python")
]


@pytest.mark.parametrize("document", OTHERS)
def test_other_examples_run(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_blocks(document)


def test_the_first_commands_stand_on_one_line():
    install_and_run = [line for _, line in commands() if "pip install" in line]
    assert len(install_and_run) == 2
    assert install_and_run[0].endswith("bmrs train")
    # This one is run by .ci/run, which looks for it.
    assert [line for line in README.read_text("utf-8").splitlines() if line.endswith("-m pytest")] == [
        install_and_run[1]
    ]


def test_hints_to_install_work_from_a_checkout():
    """The distribution is on no index, so that its extras have no name but the checkout's."""
    sources = [
        path for name in ("bmrs", "bmrs_kernels", "benchmarks") for path in (ROOT / name).rglob("*.py")
    ]
    hints = {
        path.relative_to(ROOT).as_posix(): re.findall(r"pip install ([^`\n]+)", path.read_text("utf-8"))
        for path in (*sources, *DOCUMENTS.values())
    }
    assert len([hint for of in hints.values() for hint in of]) > 5
    assert not {path: of for path, of in hints.items() if any("bmrs-kernels" in hint for hint in of)}


def test_options_of_bmrs_train_exist(capsys):
    from bmrs.cli import main

    assert main(["train", "--help"]) == 0
    known = capsys.readouterr().out
    options = {
        (document, option)
        for document, line in commands()
        if line.startswith("bmrs train")
        for option in re.findall(r"--[\w-]+", line)
    }
    assert options
    assert not [(document, option) for document, option in options if option not in known]


def test_commands_of_the_benchmarks_exist_and_are_all_described():
    named = {
        document: set(re.findall(r"python -m benchmarks ([\w-]+)", path.read_text("utf-8")))
        for document, path in DOCUMENTS.items()
    }
    assert not {(document, name) for document, names in named.items() for name in names - set(COMMANDS)}
    assert named["benchmarks/README.md"] == set(COMMANDS)


@pytest.mark.parametrize("package", [bmrs, bmrs.compat, bmrs_kernels], ids=lambda package: package.__name__)
def test_every_public_name_is_described(package):
    text = DOCUMENTS[f"{package.__name__.replace('.', '/')}/README.md"].read_text("utf-8")
    code = "\n".join([*(block for _, block in FENCE.findall(text)), *re.findall(r"`([^`\n]+)`", text)])
    assert not [name for name in package.__all__ if not re.search(rf"\b{name}\b", code)]


def test_every_network_is_described():
    code = " ".join(re.findall(r"`([^`\n]+)`", DOCUMENTS["bmrs/README.md"].read_text("utf-8")))
    names = {*bmrs.models.NETWORKS, *bmrs.models.__all__}
    assert not [name for name in names if not re.search(rf"\b{name}\b", code)]


def test_tables_are_those_of_the_committed_results(tmp_path, monkeypatch, capsys):
    assert benchmarks(["readme", "--check"]) == 0
    # The same READMEs elsewhere, one with a wrong figure: named, and put right where it lies.
    for path in readme.readmes():
        copied = tmp_path / path.relative_to(ROOT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        (copied.parent / "__init__.py").touch()
        copied.write_text(path.read_text("utf-8"), "utf-8")
    changed = tmp_path / "benchmarks" / "README.md"
    changed.write_text(changed.read_text("utf-8").replace("| `kl_divergence` |", "| `kl` |"), "utf-8")
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    assert benchmarks(["readme", "--check"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("benchmarks/README.md: not from these results: run python -m benchmarks readme")
    assert benchmarks(["readme"]) == 0
    assert changed.read_text("utf-8") == DOCUMENTS["benchmarks/README.md"].read_text("utf-8")


def test_every_table_has_a_place():
    placed = {
        name for path in readme.readmes() for _, name, _ in readme.BLOCK.findall(path.read_text("utf-8"))
    }
    assert placed == set(readme.BLOCKS)


def test_a_table_of_no_results_is_an_error(tmp_path):
    with pytest.raises(KeyError, match="unknown-table"):
        readme.with_results("<!-- results: unknown-table -->\n<!-- end -->", tmp_path)


def test_links_of_a_table_are_relative_to_where_it_stands(monkeypatch):
    monkeypatch.setitem(readme.BLOCKS, "linked", lambda _: "![plot](benchmarks/results/plot.png)")
    marked = "<!-- results: linked -->\n<!-- end -->"
    assert "](benchmarks/results/plot.png)" in readme.with_results(marked, readme.RESULTS)
    assert "](results/plot.png)" in readme.with_results(marked, readme.RESULTS, folder="benchmarks")
    assert "](../benchmarks/results/plot.png)" in readme.with_results(marked, readme.RESULTS, folder="bmrs")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    path = DOCUMENTS[document]
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        if not target.exists() or (anchor and anchor not in headings(target)):
            lost.append(link)
    assert not lost


def test_the_licence_is_the_one_that_is_named():
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
