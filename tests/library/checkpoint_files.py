"""Changes to checkpoints, by one who can compute the checksum."""

import json

from safetensors import safe_open
from safetensors.torch import save_file

from bmrs.training import checkpoint


def rewrite_checkpoint(path, change, *, checksum=True):
    """Apply a change to a checkpoint's JSON and tensors, in place."""
    with safe_open(path, framework="pt") as file:
        scalars = json.loads(file.metadata()["bmrs_training"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    del scalars["checksum"]
    change(scalars, tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if checksum:
        scalars["checksum"] = checkpoint._checksum(tensors, scalars)
    save_file(tensors, path, metadata={"bmrs_training": json.dumps(scalars)})
