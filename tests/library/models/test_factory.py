import sys
import textwrap

import pytest
from torch import nn

from bmrs.models import network_from

CODE = """
from torch import nn

def of_images(*, num_classes, in_channels, image_size):
    return nn.Linear(in_channels * image_size**2, num_classes)

def of_classes(num_classes=2, width=3, **others):
    assert not others
    return nn.Linear(width, num_classes)

class Plain(nn.Module):
    made = classmethod(lambda cls: cls())

def positional(width, /):
    return nn.Linear(width, 2)

def broken():
    raise RuntimeError("no weights\\nhere")

def nothing():
    return None

existing = nn.Linear(2, 2)
number = 3
"""


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    folder = tmp_path / "networks_of_mine"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "nets.py").write_text(textwrap.dedent(CODE))
    (folder / "needs.py").write_text("import not_installed_at_all")
    (folder / "fails.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == folder.name]:
        del sys.modules[name]


def build(spec: object) -> nn.Module:
    return network_from(spec, num_classes=7, in_channels=3, image_size=4)


@pytest.mark.parametrize(
    ("factory", "shape"), [("of_images", (7, 48)), ("of_classes", (7, 3))], ids=["all", "some"]
)
def test_gets_those_arguments_that_it_names(factory, shape):
    assert build(f"networks_of_mine.nets:{factory}").weight.shape == shape


@pytest.mark.parametrize("factory", ["Plain", "Plain.made"])
def test_classes_and_their_methods(factory):
    assert type(build(f"networks_of_mine.nets:{factory}")).__name__ == "Plain"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nets", "must be given as \"package.module:factory\", got 'nets'"),
        (":nets", 'must be given as "package.module:factory"'),
        (None, 'must be given as "package.module:factory", got None'),
        ("no_such_package.nets:of", "there is no module 'no_such_package' where Python looks .* PYTHONPATH"),
        ("networks_of_mine.net:of", "there is no module 'networks_of_mine.net' where"),
        (
            "networks_of_mine.needs:of",
            "importing .*needs' raised ModuleNotFoundError: No module named 'not_inst",
        ),
        (
            "networks_of_mine.fails:of",
            "importing 'networks_of_mine.fails' raised ZeroDivisionError: division",
        ),
        ("networks_of_mine.nets:of", "module 'networks_of_mine.nets' has no 'of'"),
        (
            "networks_of_mine.nets:number",
            "must name a function or class that makes a network, and is .* type int$",
        ),
        (
            "networks_of_mine.nets:existing",
            "must name a function or class that makes a network, and is .* type Linear$",
        ),
        ("networks_of_mine.nets:broken", "raised RuntimeError: no weights here$"),
        ("networks_of_mine.nets:positional", "raised TypeError: positional\\(\\) missing 1 required"),
        ("networks_of_mine.nets:nothing", "must return a torch.nn.Module, got None"),
    ],
)
def test_errors_name_what_was_asked_for(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        build(spec)
    assert "\n" not in str(error.value)
    assert str(spec) in str(error.value)
