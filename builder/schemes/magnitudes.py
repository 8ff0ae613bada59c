"""The largest magnitudes in and before the linears of a layer, as modelopt's max calibrator collects them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from builder.errors import CalibrationError

if TYPE_CHECKING:
    import torch

Amax = dict[str, dict[str, float]]


@contextmanager
def observe_magnitudes(layer: torch.nn.Module, prefix: str, linears: Sequence[str]) -> Iterator[Callable[[], Amax]]:
    """Note max |W| of the named linears, and max |x| of whatever they read while the block runs.

    The layer computes as before. Yields a function that reads {linear: {"weight": amax, "input": amax}}; a linear that
    nothing passed through has no "input". Equals modelopt 0.47's `MaxCalibrator` over the unquantized model: a maximum
    is exact in bf16, whatever the order. Linears that read the very same tensor share its reading.
    Raises CalibrationError naming a linear in whose weight or input there is a NaN or an infinity.
    """
    modules = {linear: layer.get_submodule(linear.removeprefix(prefix)) for linear in linears}
    inputs: dict[str, torch.Tensor] = {}
    latest: list[tuple[torch.Tensor, torch.Tensor]] = []  # what was read last, and its largest magnitude

    def watch(linear: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def note(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            if not latest or latest[0][0] is not arguments[0]:
                latest[:] = [(arguments[0], max_magnitude(arguments[0]))]
            seen = latest[0][1]
            inputs[linear] = seen if linear not in inputs else inputs[linear].maximum(seen)  # a NaN stays

        return note

    def read() -> Amax:
        found: Amax = {}
        for linear, module in modules.items():
            weight: torch.Tensor = module.weight  # type: ignore[assignment]
            found[linear] = {"weight": finite(max_magnitude(weight), linear, "weight")}
            if linear in inputs:
                found[linear]["input"] = finite(inputs[linear], linear, "input")
        return found

    hooks = [module.register_forward_pre_hook(watch(linear)) for linear, module in modules.items()]
    try:
        yield read
    finally:
        for hook in hooks:
            hook.remove()


def max_magnitude(values: torch.Tensor) -> torch.Tensor:
    """max |x|, where the values are; NaN if there is one."""
    smallest, largest = values.aminmax()
    return largest.maximum(-smallest)


def finite(magnitude: torch.Tensor, linear: str, kind: str) -> float:
    """A magnitude as a number. Raises CalibrationError if it is none."""
    number = float(magnitude)
    if number != number or number == float("inf"):
        what = f"there is a NaN or an infinity in the {kind} of {linear}"
        raise CalibrationError(what, linear, "fetch the base model again, or use a sound one")
    return number
