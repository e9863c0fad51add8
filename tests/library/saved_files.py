"""Changes to files that `bmrs.save` wrote."""

import json

from safetensors import safe_open
from safetensors.torch import save_file


def rewrite(path, change) -> None:
    """Apply a change to the description and the tensors of a saved file."""
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["bmrs"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    description = change(description, tensors) or description
    save_file(tensors, path, metadata={"bmrs": json.dumps(description)})
