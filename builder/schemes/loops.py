"""The loops that run where a weight is: the kernels' on the CPU, torch operations on a GPU."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from builder.base import Tensor
from builder.errors import LayoutError

if TYPE_CHECKING:
    import torch

    Weight = torch.Tensor | NDArray[Any]


def find_loops(weight: Weight) -> Any:
    """The module whose loops run where a weight is."""
    if isinstance(weight, np.ndarray) or weight.device.type == "cpu":
        return importlib.import_module("builder.kernels")
    return importlib.import_module("builder.gpu")


def max_magnitude(weight: Weight) -> float:
    """max |w|, found where the weight is."""
    magnitude: float = find_loops(weight).max_magnitude(weight)
    return magnitude


def as_given(weight: Weight, values: NDArray[Any]) -> Weight:
    """Small values of the same kind as the weight that they belong to; tensors of them are on the CPU."""
    if isinstance(weight, np.ndarray):
        return values
    import torch

    return torch.from_numpy(values.copy())


def check_matrix(linear: str, weight: Tensor, block: int) -> None:
    """Refuse to plan what cannot be cut into blocks of so many columns."""
    if weight.shape[1] % block:
        raise LayoutError(
            f"{linear} has {weight.shape[1]} input features, which is not a multiple of {block}",
            weight.name,
            f"add {linear} to scheme.ignore",
        )
