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
from builder.arithmetic.operations import PASSES, REPLACED, is_inexact, refuse

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
        if func.namespace == "aten":
            if base in PASSES or name in PASSES:
                return func(*args, **kwargs)
            if base == "linear" or base in REPLACED:
                return self.replace(func, name, base, args, kwargs)
            values = tree_leaves((args, kwargs))
            if not is_inexact(values) and any(isinstance(value, torch.Tensor) for value in values):
                return func(*args, **kwargs)  # whole numbers and truth values
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
        inexact = is_inexact(values) or base in ("div", "mean", "softmax")
        is_meta = any(tensor.is_meta for tensor in tensors) or str(kwargs.get("device")) == "meta"
        if is_meta or (tensors and not inexact):
            return func(*args, **kwargs)
        if "out" in kwargs:
            raise refuse(name, "with an argument out")
        result = self.multiply(*args, **kwargs) if base == "linear" else REPLACED[base](*args, **kwargs)
        return args[0].copy_(result) if name != base else result

    def multiply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """A linear, whose weight becomes integers once for as long as it lives and stays where it is."""
        place, known = weight.data_ptr(), self.prepared.get(weight)
        if known is None or known[0] != place:
            known = self.prepared[weight] = (place, products.prepare_weight(weight))
        return products.linear(x, known[1], bias)


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
