"""The context in which a model runs in exact arithmetic.

    with exact.arithmetic():
        logits = model(input_ids=tokens).logits

Attention has to run as the model's own code, `attn_implementation="eager"`, and experts as `"eager"` too. Anything that
has no exact form is refused by its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from builder.arithmetic import elements, places, products, reductions
from builder.arithmetic.operations import (
    AMBIGUOUS,
    CHECKED,
    EMPTY,
    OF_INTEGERS_TOO,
    PASSES,
    REPLACED,
    TAKE_COMPLEX,
    is_inexact,
    refuse,
)

assert all((elements, reductions, places))  # imported for what they enter into the table of replacements


class Exact(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets exact operations pass, replaces others, and refuses the rest.

    prepared: weights as integers, for as long as the weights live. refused: names, where tensors are on the meta
    device, which have no numbers: there nothing is raised.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.prepared: Any = WeakTensorKeyDictionary()
        self.refused: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        base = name[:-1] if name.endswith("_") and not name.endswith("__") else name
        if name != base and self.prepared:
            self.prepared.pop(args[0], None)  # changed in place
        if func.namespace == "aten" and base not in AMBIGUOUS:
            if base in PASSES or name in PASSES:
                if base in CHECKED:
                    CHECKED[base](*args, **kwargs)
                result = func(*args, **kwargs)
                return result.zero_() if base in EMPTY else result  # else it would hold whatever was in memory before
            if base == "linear" or base in REPLACED:
                return self.replace(func, name, base, args, kwargs)
            values = tree_leaves((args, kwargs))
            if not is_inexact(values) and any(isinstance(value, torch.Tensor) for value in values):
                result = func(*args, **kwargs)  # whole numbers and truth values
                if not is_inexact(result):
                    return result
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if any(isinstance(value, torch.Tensor) and value.is_meta for value in tree_leaves((args, kwargs))):
            self.refused.add(str(func.overloadpacket))
            return func(*args, **kwargs)
        raise refuse(str(func.overloadpacket))

    def replace(self, func: Any, name: str, base: str, args: Any, kwargs: Any) -> Any:
        """The result of an operation by its replacement, put where an operation in place would put it."""
        values = tree_leaves((args, kwargs))
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        if any(tensor.is_meta for tensor in tensors) or str(kwargs.get("device")) == "meta":
            return func(*args, **kwargs)
        if "out" in kwargs:
            raise refuse(name, "with an argument out")
        if tensors and not is_inexact(values) and base not in OF_INTEGERS_TOO:
            result = func(*args, **kwargs)
            if not is_inexact(result):  # a logarithm of integers has digits, and so has a sum asked for in float32
                return result
        if base not in TAKE_COMPLEX and any(tensor.is_complex() for tensor in tensors):
            raise refuse(name, "of complex numbers")
        result = self.multiply(*args, **kwargs) if base == "linear" else REPLACED[base](*args, **kwargs)
        return args[0].copy_(result) if name != base else result

    def multiply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """A linear, whose weight becomes integers once for as long as it lives and stays where and what it is."""
        known = self.prepared.get(weight)
        if known is None or known[0] != describe_state(weight):
            # The storage is held, or another one could come to lie at the same place.
            integers = products.prepare_weight(weight)
            known = self.prepared[weight] = (describe_state(weight), integers, weight.untyped_storage())
        return products.linear(x, known[1], bias)


def describe_state(weight: torch.Tensor) -> tuple[object, ...]:
    """What changes when a tensor's numbers do, but for inference tensors, which torch does not count changes of."""
    version = None if weight.is_inference() else weight._version
    return weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, version


@contextmanager
def compute_exactly(mode: Exact) -> Iterator[Exact]:
    """Exact arithmetic for whatever torch computes meanwhile; gradients are off, or linears would not be seen as such.

    Raises ArithmeticRefusal, from within, naming an operation that has no exact form, or what met a NaN or an infinity.
    """
    with torch.inference_mode(), mode:
        yield mode


def arithmetic() -> AbstractContextManager[Exact]:
    """The same, for a model that nobody holds a mode for."""
    return compute_exactly(Exact())
