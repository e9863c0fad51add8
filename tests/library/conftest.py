import pytest
from idx_files import write_idx_folder

from bmrs.training import TrainConfig


@pytest.fixture
def tiny_config(tmp_path):
    """Makes options for a run of Algorithm 1 of a few seconds, on images that are noise."""
    folder = write_idx_folder(tmp_path / "images", train=60, test=64)

    def make(**options):
        defaults = {
            "recipe": "paper",
            "data": "mnist",
            "data_dir": str(folder),
            "model": "mlp",
            "num_blocks": 1,
            "hidden": 6,
            "epochs": 2,
            "fine_tune_epochs": 1,
            "batch_size": 16,
            "device": "cpu",
        }
        return TrainConfig(**{**defaults, **options})

    return make
