"""The picture of a run: it shows what the summary says, nothing hides anything, nothing is told by colour alone."""

import itertools

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from run_results import noisy_state, run_summary, state_of
from torch import nn

from bmrs.training import TrainConfig
from bmrs.training.picture import draw, figure_of


def finished(recipe, *, epochs=3, layers=2, kept=5, scale=1.0):
    """The states of a run."""
    states = {"noisy": noisy_state(layers, epochs, kept, scale), "dense": state_of(nn.Linear(1, 1), epochs)}
    if recipe == "bmrs":
        states["dense"] = state_of(nn.Linear(1, 1), 3 * epochs)
        states |= {name: state_of(nn.Linear(1, 1), epochs) for name in ("trained", "fine-tuned")}
        states |= {"random": state_of(nn.Linear(1, 1), 2 * epochs), "scratch": states["dense"]}
    return states


def panels(recipe, summary=None, criterion=None, **run):
    """The drawn panels of a run, by the start of their titles, and the figure."""
    options = {"ratio": 0.5} if criterion == "l2" else {}
    config = TrainConfig(recipe=recipe, model="mlp", criterion=criterion, **options)
    figure = figure_of(finished(recipe, **run), summary or run_summary(recipe), config)
    return {axis.get_title().split()[0]: axis for axis in figure.axes if axis.get_title()}, figure


RUNS = pytest.mark.parametrize(
    ("recipe", "run"),
    [
        ("bmrs", {"epochs": 1, "kept": 12}),  # so short that nothing went
        ("bmrs", {"epochs": 12}),
        ("paper", {"epochs": 1}),
        ("paper", {"epochs": 60, "layers": 12}),
    ],
)


@pytest.mark.parametrize("sizes", [(60_000, 60_000), (60_000, 19_000)])
@RUNS
def test_no_text_hides_another(recipe, run, sizes, monkeypatch):
    accuracies = [0.85] * (4 if recipe == "bmrs" else 3)
    _, figure = panels(recipe, run_summary(recipe, accuracies, sizes), **run)
    boxes = []
    draw_text = Text.draw

    def recorded(text, renderer):
        if text.get_text() and text.get_visible():
            boxes.append(
                (text.get_text(), Text.get_window_extent(text, renderer))
            )  # without an annotation's arrow
        draw_text(text, renderer)

    monkeypatch.setattr(Text, "draw", recorded)
    FigureCanvasAgg(figure).draw()
    assert len(boxes) > 30
    for (first, box), (second, other) in itertools.combinations(boxes, 2):
        assert not box.overlaps(other), (first, second)
    for text, box in boxes:
        assert 0 <= box.x0 <= box.x1 <= figure.bbox.x1, text
        assert 0 <= box.y0 <= box.y1 <= figure.bbox.y1, text


@RUNS
def test_lines_differ_without_colour(recipe, run):
    axes, _ = panels(recipe, **run)
    for title in ("Accuracy", "Structures", "E[θ]", "Test"):
        lines = [line for line in axes[title].lines if line.get_marker() not in ("None", "", None)]
        looks = {(line.get_marker(), line.get_linestyle()) for line in lines}
        assert len(looks) == min(len(lines), 8), title  # as many as the legend names


@pytest.mark.parametrize("recipe", ["bmrs", "paper"])
def test_networks_stand_where_the_summary_has_them(recipe):
    summary = run_summary(recipe)
    axes, _ = panels(recipe, summary)
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes["Test"].lines]
    assert points == [(network.parameters, 100 * network.accuracy) for network in summary.networks.values()]
    labels = [text.get_text() for text in axes["Test"].texts]
    assert labels[0] == "dense: 86.17 %"
    assert axes["Test"].get_title() == "Test accuracy and size (parameters, dense / compacted: 3.19)"
    assert axes["Test"].get_xlim()[0] == 0


@pytest.mark.parametrize(
    ("accuracies", "low", "high"),
    [
        ((0.861, 0.8612, 0.8611), 75, 95),
        ((0.999, 0.9991, 1.0), 80, 100),
        ((0.9, 0.08, 0.08), 5, 90),
        ((0,) * 3, 0, 20),
    ],
)
def test_a_small_difference_stays_small(accuracies, low, high):
    axes, _ = panels("paper", run_summary("paper", accuracies))
    assert axes["Test"].get_ylabel() == f"test accuracy (%), from {low} to {high}"
    bottom, top = axes["Test"].get_ylim()
    assert bottom <= low < high <= top
    for name in ("Test", "Accuracy"):
        bottom, top = axes[name].get_ylim()
        assert top - bottom >= 20


@pytest.mark.parametrize("criterion", ["bmrs-odds", "bmrs-normal", "bmrs-uniform", "l2"])
@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_scores_fill_their_panel(criterion, scale):
    axes, _ = panels("bmrs", criterion=criterion, scale=scale)
    axis = axes["log" if criterion in ("bmrs-odds", "l2") else "ΔF"]
    to_screen = axis.transData
    heights = [
        to_screen.transform((0, y))[1]
        for line in axis.lines
        for y in line.get_ydata()
        if axis.get_ylim()[0] <= y <= axis.get_ylim()[1]
    ]
    assert max(heights) - min(heights) > 0.8 * axis.bbox.height
    assert len(heights) >= 24
    # The border of a criterion that decides by other scores is nothing that these are held to.
    assert ("pruned where" in axis.get_title()) == (criterion != "l2")


def test_it_says_that_nothing_was_pruned():
    axes, _ = panels("bmrs", kept=12)
    assert [text.get_text() for text in axes["Structures"].texts] == ["nothing was pruned"]
    axes, _ = panels("bmrs")
    assert not axes["Structures"].texts


def test_the_file_is_a_picture(tmp_path):
    config = TrainConfig(model="mlp")
    draw(tmp_path / "picture.png", finished("bmrs"), run_summary("bmrs"), config)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
