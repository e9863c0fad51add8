"""What a finished run hands on, without the run."""

import torch

from bmrs.models import MLP
from bmrs.training.checkpoint import TrainingState
from bmrs.training.summary import NetworkMeasurement, RunSummary


def measured(accuracy, parameters):
    return NetworkMeasurement(
        accuracy=accuracy,
        parameters=parameters,
        flops=2 * parameters,
        file_size=4 * parameters + 500,
        latency=(2e-4, 1.5e-3),
        nll=0.45,
        ece=0.0321,
    )


def run_summary(recipe, accuracies=None, parameters=(61_706, 19_316), **fields):
    """The summary of a run whose networks have these accuracies, in the order of the table."""
    dense, compacted = parameters
    sizes = {
        "bmrs": {"dense": dense, "compacted": compacted, "scratch": compacted, "random": compacted},
        "paper": {"dense": dense, "masked": dense + 52, "compacted": compacted},
    }[recipe]
    accuracies = accuracies or (0.8617, 0.8571, 0.8571, 0.8567)[: len(sizes)]
    networks = {
        name: measured(accuracy, size)
        for (name, size), accuracy in zip(sizes.items(), accuracies, strict=True)
    }
    return RunSummary(
        **{
            "recipe": recipe,
            "networks": networks,
            "on_the_way": dict.fromkeys(("trained", "pruned", "refitted"), 0.8) if recipe == "bmrs" else {},
            "kept": {"conv1_relu": (4, 6), "hidden1_relu": (60, 120)},
            "compression_percent": 68.9,
            "reload_error": 3e-8,
            "unsettled": 0.02,
            "settled": True if recipe == "bmrs" else None,
            "temperature": 10.0 if recipe == "bmrs" else None,
            "device": "cpu",
            **fields,
        }
    )


def noisy_state(layers, epochs, kept, scale=1.0):
    """A state of an MLP of 12 structures a layer, of which the first ones are kept after the last epoch."""
    model = MLP(in_features=4, num_blocks=layers - 1, hidden=12, num_classes=2)
    names = [f"hidden{index}_tanh" for index in range(layers)]
    for name in names:
        layer = model.get_submodule(name)
        layer.set_kept(torch.arange(12) < kept)
        with torch.no_grad():
            layer.mu.copy_(torch.linspace(-0.1, -19 * scale, 12))
            layer.log_sigma.fill_(-1.0)
    return state_of(model, epochs, kept=dict.fromkeys(names, kept))


def state_of(model, epochs, **row):
    history = [
        {"epoch": epoch, "validation_accuracy": 0.7 + 0.15 * epoch / epochs, **row}
        for epoch in range(1, epochs + 1)
    ]
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    return TrainingState(model, optimizer, torch.Generator(), history)
