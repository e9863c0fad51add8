"""What a run prints in the end: a table that no width of console breaks, and warnings of what went wrong."""

import io
import json

import pytest
from rich.console import Console
from run_results import run_summary

from bmrs.training import TrainConfig
from bmrs.training.shortfalls import shortfalls
from bmrs.training.summary import show_seeds


def printed(show, width):
    stream = io.StringIO()
    show(Console(file=stream, width=width))
    return stream.getvalue()


def seeds(recipe="bmrs"):
    return [
        run_summary(
            recipe, [value + shift for value in (0.8617, 0.8571, 0.8571, 0.8567)[: 4 - (recipe == "paper")]]
        )
        for shift in (0, 0.01)
    ]


LABELS = (
    "test accuracy, %",
    "NLL, nats",
    "ECE, %",
    "parameters",
    "FLOPs per image",
    "bytes on disk",
    "ms for 1 image",
    "ms for 64 images",
)


@pytest.mark.parametrize("recipe", ["bmrs", "paper"])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("width", [30, 40, 60, 80, 120])
def test_no_word_of_the_table_is_broken(recipe, several, width):
    if several:
        text = printed(lambda console: show_seeds(seeds(recipe), console, "lenet5 on images"), width)
    else:
        text = printed(lambda console: run_summary(recipe).show(console, "lenet5 on images"), width)
    table = text.split("Test accuracy without")[0].split("Means ±")[0].split("Compression as")[0]
    assert max(map(len, table.splitlines())) <= max(width, 38)
    names = {"bmrs": ("from scratch", "structures"), "paper": ("masked",)}[recipe]
    for part in (*LABELS, "conv1_relu", "hidden1_relu", "dense", "compacted", *names):
        assert any(part in line for line in table.splitlines()), part
    for value in ("61,706", "19,316", "123,412", "247,324", "3.19×", "60", "0.450", "3.21"):
        assert value in table, value
    assert ("86.67" in table and "± 0.71" in table) if several else "86.17" in table


@pytest.mark.parametrize("several", [False, True])
def test_a_table_has_a_line_for_each_quantity_where_there_is_room(several):
    def show(console):
        return show_seeds(seeds(), console, "") if several else run_summary("bmrs").show(console, "")

    for width in (80, 120):
        lines = printed(show, width).splitlines()
        (row,) = [line for line in lines if "parameters" in line and "61,706" in line]
        assert row.count("19,316") == 3
    # Narrow: a block each.
    lines = printed(show, 60).splitlines()
    assert [line.split()[-1] for line in lines if "parameters" in line and "μ" not in line] == [
        *("61,706", "19,316", "19,316", "19,316"),
        "3.19×",
    ]


def test_lines_of_a_terminal_break_between_words():
    summary = run_summary("bmrs", warnings=("One structure alone is left of conv1_relu (of 6).",))
    stream = io.StringIO()
    summary.show(Console(file=stream, width=40, force_terminal=True, no_color=True), "title")
    assert max(len(line) for line in stream.getvalue().splitlines()) <= 40 + 8  # escapes of bold text
    whole = printed(lambda console: summary.show(console, "title"), 40)
    assert "Warning: One structure alone is left of conv1_relu (of 6).\n" in whole


# Warnings

CUT_OFF = "The noise was cut off before it settled: take more --noise-epochs."


def found(kept=((4, 6), (60, 120)), *, dense=0.86, compacted=0.85, best_kept=(), settled=True, **options):
    config = TrainConfig(**options)
    names = ("conv1_relu", "hidden1_relu")
    layers = [{"name": name, "best_kept": name in best_kept} for name in names]
    row = {"temperature": 10.0, "settled": settled} if config.recipe == "bmrs" else {}
    # An epoch of fine-tuning follows, in which nothing is pruned.
    history = [{**row, "pruning": {"layers": layers}}, row]
    return shortfalls(
        config,
        history,
        kept=dict(zip(names, kept, strict=True)),
        dense=dense,
        compacted=compacted,
        num_classes=10,
    )


@pytest.mark.parametrize("recipe", ["bmrs", "paper"])
def test_a_good_run_gives_no_warning(recipe):
    assert found(recipe=recipe) == ()
    assert found(recipe=recipe, dense=0.85, compacted=0.9) == ()


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({}, "a lower --temperature (it was 10), a larger --p1 or another --criterion."),
        (
            {"criterion": "mean"},
            "a lower --temperature (it was 10), a lower --threshold or another --criterion.",
        ),
        ({"criterion": "l2", "ratio": 0.9}, "take a smaller --ratio or another --criterion."),
        ({"recipe": "paper"}, "--kl-weight elbo, --tolerance 0 or another --criterion."),
        ({"recipe": "paper", "tolerance": 0.0}, "take --kl-weight elbo or another --criterion."),
        (
            {"recipe": "paper", "kl_weight": "elbo", "criterion": "bmrs-uniform"},
            "a smaller --kl-weight, a larger --p1 or another --criterion.",
        ),
    ],
)
def test_a_layer_that_would_have_been_emptied_is_told(options, advice):
    (line,) = found(((4, 6), (1, 120)), best_kept=["hidden1_relu"], **options)
    assert "asked for every structure of hidden1_relu (120); the best one" in line
    assert line.endswith(advice)
    (line,) = found(((1, 6), (60, 120)), **options)
    assert line.startswith("One structure alone is left of conv1_relu (of 6). To prune less, take ")
    assert line.endswith(advice)


@pytest.mark.parametrize(
    ("accuracies", "part"),
    [
        ((0.86, 0.08), "is near chance: 8.00% of the test images, where guessing gives 10.00% and the dense"),
        ((0.86, 0.6), "is 26.0 points below the dense one: 60.00% of the test images against 86.00%."),
        ((0.12, 0.86), "The dense network has learned next to nothing: 12.00% of the test images"),
        ((0.12, 0.12), "The dense network has learned next to nothing"),
    ],
)
def test_a_bad_accuracy_is_told(accuracies, part):
    (line,) = found(dense=accuracies[0], compacted=accuracies[1])
    assert part in line
    assert "--epochs" in line if accuracies[0] < 0.2 else "a lower --temperature" in line


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"settled": False}, "take more --noise-epochs."),
        ({}, "Take a higher --temperature (it was 10)."),
        ({"recipe": "paper"}, "Train longer (--epochs) or with a larger --noise-lr or --kl-weight."),
        ({"criterion": "l2", "ratio": 0.001}, "Take a larger --ratio."),
    ],
)
def test_that_nothing_was_pruned_is_told(options, advice):
    (line,) = found(((6, 6), (120, 120)), **options)
    assert line.startswith("Nothing was pruned")
    assert line.endswith(advice)


def test_a_bad_network_that_lost_nothing_is_not_to_lose_less():
    _, line = found(((6, 6), (120, 120)), compacted=0.6)
    assert line.endswith("As nothing was pruned, fine-tune longer (--fine-tune-epochs) or with a lower --lr.")
    assert "temperature" not in line


def test_a_run_without_an_epoch_of_noise_is_told_as_well():
    kept = {"conv1_relu": (6, 6), "hidden1_relu": (1, 120)}
    lines = shortfalls(TrainConfig(), [], kept=kept, dense=0.86, compacted=0.08, num_classes=10)
    assert len(lines) == 2
    assert all("a lower --temperature (it was 10)" in line for line in lines)
    lines = shortfalls(
        TrainConfig(), [], kept={"conv1_relu": (6, 6)}, dense=0.86, compacted=0.86, num_classes=10
    )
    assert lines == ("Nothing was pruned, so that nothing became smaller. " + CUT_OFF,)


def test_warnings_stand_below_the_table_and_in_the_json():
    summary = run_summary("paper", warnings=("conv1_relu is empty [almost].",))
    text = printed(lambda console: summary.show(console, "title"), 80)
    assert text.splitlines()[-1] == "Warning: conv1_relu is empty [almost]."
    assert json.loads(json.dumps(summary.to_dict()))["warnings"] == ["conv1_relu is empty [almost]."]
    text = printed(lambda console: show_seeds([summary, run_summary("paper")], console, "title"), 80)
    assert "Warning: 1 of 2 seeds have warnings" in text
    text = printed(lambda console: show_seeds([run_summary("paper")] * 2, console, "title"), 80)
    assert "Warning" not in text


def test_a_budget_that_was_missed_is_told():
    config = TrainConfig(target_latency=0.5)
    missed = {"pruning": {"budget": {"met": False}}, "settled": True, "temperature": 1.0}
    kept = {"hidden1_relu": (60, 120)}
    [line] = shortfalls(config, [missed], kept=kept, dense=0.86, compacted=0.85, num_classes=10)
    assert line.startswith("The network is not within --target-latency 0.5: ")
    met = missed | {"pruning": {"budget": {"met": True}}}
    assert not shortfalls(config, [met], kept=kept, dense=0.86, compacted=0.85, num_classes=10)
