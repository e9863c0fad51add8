"""Inputs for the networks of the zoo: always the same values, whatever seed the caller sets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

Inputs: TypeAlias = Callable[[torch.dtype], tuple[tuple[Any, ...], dict[str, Any]]]

CLASSES = 10
VOCABULARY = 64


def floats(*shapes: tuple[int, ...]) -> Inputs:
    """Inputs of one normal tensor per shape, as positional arguments."""

    def inputs(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(0)
        # Drawn in one dtype, so that every dtype sees the same values.
        draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
        return tuple(draw(shape).to(dtype) for shape in shapes), {}

    return inputs


def tokens(batch: int = 2, length: int = 12, *, padding: int = 0, **lengths: int) -> Inputs:
    """Inputs of random token numbers, as ``input_ids`` among keyword arguments.

    Args:
        batch: number of sequences.
        length: tokens of each sequence.
        padding: how many tokens at the end of the first sequence an ``attention_mask`` hides; 0 for no mask.
        lengths: lengths of further sequences of random tokens, by the names of their keyword arguments.
    """

    def inputs(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(0)
        draw = functools.partial(torch.randint, 3, VOCABULARY, generator=generator)
        arguments: dict[str, Any] = {"input_ids": draw(size=(batch, length))}
        if padding:
            mask = torch.ones(batch, length, dtype=torch.long)
            mask[0, -padding:] = 0
            arguments["attention_mask"] = mask
        for name, its_length in lengths.items():
            arguments[name] = draw(size=(batch, its_length))
        return (), arguments

    return inputs


def token_argument(batch: int = 2, length: int = 12) -> Inputs:
    """Inputs of random token numbers, as the one positional argument."""

    def inputs(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        arguments = tokens(batch, length)(dtype)[1]
        return (arguments["input_ids"],), {}

    return inputs


def token_pairs(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of two sequences of random token numbers, as positional arguments."""
    arguments = tokens(target=9)(dtype)[1]
    return (arguments["input_ids"], arguments["target"]), {}


IMAGE = floats((2, 3, 32, 32))
SMALL_IMAGE = floats((2, 3, 16, 16))
