"""Folders of transformers: `config.json` and safetensors, as its own `save_pretrained` writes them.

Where a config of the model's class says the widths that are left, the folder has that, and any program that uses
transformers loads it. Otherwise `config.json` says under ``"bmrs"`` what is narrower (see `bmrs.files.narrowing`), and
`load_pretrained` replays that before transformers loads the weights.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from bmrs.checks import one_line, shown
from bmrs.compaction.comparison import TOLERANCES, relative_difference, run
from bmrs.files.file import recorded_inputs
from bmrs.files.narrowing import KEY, built, describe_narrowing, narrow, numbers_of, shapes_of
from bmrs.files.own_config import own_config
from bmrs.graph.copies import evaluation_copy, unwrapped
from bmrs.graph.inputs import Inputs
from bmrs.noise.lookup import noise_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LONGEST_REASON = 500


def save_pretrained(
    folder: str | os.PathLike[str], model: nn.Module, *, max_shard_size: int | str | None = None
) -> bool:
    """Save a compacted model of transformers as a folder, with transformers' own ``save_pretrained``.

    Weights, config and generation config are written; tokenizers and processors have their own ``save_pretrained``.
    Weights are safetensors, in shards where they are large, with tied ones once. Freeze flags are not kept, which such
    folders have no place for. The model and its config are left as they are.

    Args:
        folder: where to; it is made if there is none.
        model: what `bmrs.compact` made of a model of transformers, trained further or not, or one that
            `load_pretrained` returned; also one that was never compacted.
        max_shard_size: the largest file, in bytes or as text such as ``"5GB"``; what transformers takes by default.

    Returns:
        Whether transformers alone loads the folder, with ``from_pretrained``: it does where the class can say the
        widths that are left in its config, such as the same width in all layers. Otherwise `bmrs.load_pretrained`
        loads it, and ``from_pretrained`` refuses it.

    Raises:
        ImportError: transformers is not installed.
        TypeError: the model is not one of transformers, or its code could not be kept when it was compacted.
        ValueError: the model has noise layers that `bmrs.compact` has not narrowed, or adapters, or is narrower than
            its config says in a way that such a folder cannot hold.
        OSError: the folder cannot be written.
    """
    model = _checked_model(model)
    if Path(folder).is_file():
        raise FileExistsError(f"folder must be a folder, and {Path(folder)} is a file")
    config = copy.deepcopy(model.config)
    vars(config).pop(KEY, None)
    full = built(type(model), config)
    alone = shapes_of(model) == shapes_of(full) and not _has_more(model)
    if not alone:
        inputs = recorded_inputs(model)
        if inputs is None and not hasattr(model.config, KEY):
            different = next(n for n, s in shapes_of(model).items() if s != shapes_of(full).get(n))
            raise ValueError(
                f"save_pretrained needs what bmrs.compact or bmrs.load_pretrained returned, and {different!r} of this "
                f"{type(model).__name__} is not as its config says"
            )
        own = None if inputs is None or _has_more(model) else _own_config(model, config, full, inputs)
        alone, config = own is not None, own or _described(model, config, full, inputs)
    # A shallow copy, whose config can be another one.
    copy_of_model = copy.copy(model)
    copy_of_model.config = config
    options: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    copy_of_model.save_pretrained(folder, **options)
    return alone


def load_pretrained(
    folder: str | os.PathLike[str],
    *,
    model_class: type[nn.Module] | None = None,
    device_map: Any = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Load a model of transformers from a folder, compacted or not.

    The class that ``config.json`` names is built, in no memory, made as narrow as the folder says, and given the
    weights by transformers' own ``from_pretrained``. Nothing is downloaded, no code of the folder is run, and only
    safetensors are read. What is loaded keeps in its config what is narrower, so that ``save_pretrained`` of the model
    itself, as of checkpoints of transformers' Trainer, writes folders that this function loads.

    Args:
        folder: what `save_pretrained` wrote, of this library or of the model.
        model_class: the class, where it is not one of transformers' own.
        device_map: as for ``from_pretrained``, such as ``"cuda:0"`` or ``"auto"``.
        dtype: as for ``from_pretrained``; None for that of the weights.
        attn_implementation: as for ``from_pretrained``, such as ``"eager"``.

    Returns:
        The model in evaluation mode.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: there is no such folder, or none with a ``config.json``.
        TypeError: ``model_class`` is not a class of transformers' models.
        ValueError: ``model_class`` is not the one that the folder names; or the folder names none, is broken, lacks
            weights or widths, or has others than its config says; what is wrong is said.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no config.json of a model in folder {folder}")
    try:
        description = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert isinstance(description, dict)
    except (AssertionError, ValueError, RecursionError) as error:
        raise ValueError(f"config.json in {folder} is not a mapping in JSON: {one_line(error)}") from error
    found = _class_of(folder, description, model_class)
    options = {"device_map": device_map, "dtype": dtype, "attn_implementation": attn_implementation}
    narrower = _narrower(found, description[KEY]) if KEY in description else found
    try:
        model, report = narrower.from_pretrained(  # type: ignore[attr-defined]
            folder,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # which then are told below, in one line
            output_loading_info=True,
            **{name: value for name, value in options.items() if value is not None},
        )
    except Exception as error:
        raise ValueError(
            f"{folder} does not hold a whole model: {one_line(error, limit=_LONGEST_REASON)}"
        ) from error
    for name, stored, expected in report.get("mismatched_keys", ()):
        raise ValueError(
            f"{folder} does not hold a whole model: its {name!r} is of shape {tuple(stored)}, and config.json makes it "
            f"{tuple(expected)}"
            + ("" if KEY in description else f"; it has no {KEY!r} that says what is narrower")
        )
    for key, what in (("missing_keys", "it has no"), ("unexpected_keys", "its config.json makes no")):
        if names := sorted(report.get(key, ())):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{folder} does not hold a whole model: {what} {names[0]!r}{more}")
    return model


def _checked_model(model: nn.Module) -> PreTrainedModel:
    if not isinstance(model, nn.Module):
        raise TypeError(f"save_pretrained needs a model of transformers, got {shown(model)}")
    model = unwrapped(model)
    if isinstance(model, fx.GraphModule):
        raise TypeError(
            "save_pretrained needs a model of a class of transformers, and this one became a graph of operators when "
            "it was compacted (bmrs.compact_report says why): save it with bmrs.save"
        )
    if not isinstance(model, _transformers().PreTrainedModel):
        raise TypeError(
            f"save_pretrained needs a model of transformers, got {type(model).__name__}: save it with bmrs.save"
        )
    noisy = [name for name, layer in noise_layers(model).items() if not layer.compacted]
    if noisy:
        raise ValueError(
            f"save_pretrained needs a model without noise layers, and {noisy[0]!r} is one: "
            "bmrs.compact(model, example_inputs) makes a smaller one, bmrs.fold(model) one of full size"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("save_pretrained needs a model without adapters: merge them into the weights first")
    return model


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "folders of transformers need the package transformers: pip install 'transformers>=5'"
        ) from error
    return transformers


def _has_more(model: nn.Module) -> bool:
    """Return whether compaction left something that no config can say."""
    described = describe_narrowing(model, model)
    return any(described.get(key) for key in ("scales", "activations", "noise"))


def _own_config(model: PreTrainedModel, config: Any, full: nn.Module, inputs: Inputs) -> Any | None:
    return own_config(
        model,
        config,
        full,
        numbers_of(model),
        lambda candidate: _computes_the_same(built(type(model), candidate), model, inputs),
    )


def _described(model: PreTrainedModel, config: Any, full: nn.Module, inputs: Inputs | None) -> Any:
    """Return a config that describes what is narrower, which is tried before it is written."""
    config, before = copy.deepcopy(config), shapes_of(full)
    description = describe_narrowing(model, full)
    setattr(config, KEY, description)
    if not before.keys() & description["shapes"].keys():
        more = next(iter((*description["shapes"], *description)))
        raise ValueError(
            f"the model ({type(model).__name__}) has something that its class does not build ({more!r}) and no tensor "
            "of another shape, so that from_pretrained would leave that out without an error: save it with bmrs.save"
        )
    trial = built(type(model), config)
    narrow(trial, description)
    kept = trial.state_dict().keys()
    for name, buffer in trial.named_buffers():
        # Those that are not saved are computed anew from the config.
        if name not in kept and buffer.shape != model.get_buffer(name).shape:
            raise ValueError(
                f"the buffer {name!r} of the model ({type(model).__name__}) is narrower than its config says, and such "
                "folders do not hold it: save the model with bmrs.save"
            )
    if inputs is not None and not _computes_the_same(trial, model, inputs):
        raise ValueError(
            f"the model ({type(model).__name__}) does not compute the same when it is built from its config and made "
            "as narrow: save it with bmrs.save"
        )
    return config


@torch.no_grad()
def _computes_the_same(trial: nn.Module, model: nn.Module, inputs: Inputs) -> bool:
    """Return whether a freshly built model has the shapes and, given the tensors, the outputs of another."""
    if shapes_of(trial) != shapes_of(model):
        return False
    model = evaluation_copy(model)
    for path, module in trial.named_modules():
        other = model.get_submodule(path)
        for key in module._parameters:
            module._parameters[key] = other._parameters[key]
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.shape != other.get_buffer(key).shape:
                return False
            module._buffers[key] = other._buffers[key]
    expected, found = run(model, inputs), run(trial.eval(), inputs)
    tolerance = max((TOLERANCES.get(t.dtype, 0.0) for t in expected), default=0.0)
    return relative_difference(expected, found) <= tolerance


def _class_of(
    folder: Path, description: dict[str, Any], model_class: type[nn.Module] | None
) -> type[nn.Module]:
    transformers = _transformers()
    names = description.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str):
        raise ValueError(
            f"config.json in {folder} names no class of model: its 'architectures' is {shown(names)}"
        )
    if model_class is not None:
        if not isinstance(model_class, type) or not issubclass(model_class, transformers.PreTrainedModel):
            raise TypeError(f"model_class must be a class of transformers' models, got {shown(model_class)}")
        if model_class.__name__ != name:
            raise ValueError(
                f"model_class must be {name}, which config.json in {folder} names, got {model_class.__name__}"
            )
        return model_class
    found = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise ValueError(
            f"config.json in {folder} names the class {shown(name)}, which is none of transformers "
            f"{transformers.__version__}: import it where it is defined and give it as model_class"
        )
    return found


def _narrower(model_class: type[nn.Module], description: Any) -> type[nn.Module]:
    """Return a class of which a new model is at once as narrow as a description says, and of the class itself."""

    def init(self: nn.Module, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        narrow(self, description)
        self.__class__ = model_class

    names = {"__init__": init, "__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    return type(model_class.__name__, (model_class,), names)
