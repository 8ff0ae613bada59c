"""One decoder layer at a time: a model built on the meta device, its layers loaded, run and freed in turn.

Shapes: T tokens of a row, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from builder.arithmetic.exact import Exact, compute_exactly
from builder.base import Checkpoint
from builder.errors import BaseError
from builder.families import build_model, find_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BAND_BYTES = 256 << 20
FLOATS = (torch.bfloat16, torch.float16, torch.float32)

Arithmetic = Literal["exact", "native"]
Method = TypeVar("Method", bound=Callable[..., Any])


@dataclass
class Row:
    """A row of tokens on its way through the layers.

    hidden: [1, T, H], what the next layer reads. arguments: what each layer is called with besides.
    """

    hidden: torch.Tensor
    arguments: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]


class Recorder(torch.nn.Module):
    """Stands in a layer's place, passes hidden states on unchanged and notes its last call."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # kept out of the module tree; families read attributes such as attention_type
        self.seen: torch.Tensor
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.seen, self.arguments = hidden_states, (args, kwargs)
        return hidden_states


class Normed(Exception):
    """Carries the final norm's input or output out of a forward pass; not an error."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


def computes(method: Method) -> Method:
    """Have a method of a LayerStream compute in the stream's arithmetic."""

    @wraps(method)
    def wrapped(self: LayerStream, *args: Any, **kwargs: Any) -> Any:
        with self.computing():
            return method(self, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


class LayerStream:
    """A model of which at most one layer has its weights in memory.

    checkpoint: where weights come from, by the model's own parameter names.
    arithmetic: exact, with the same bits on every machine; or native, as torch computes here.
    Raises ArithmeticRefusal, as its methods do, naming an operation that has no exact form.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu", arithmetic: Arithmetic = "exact") -> None:
        self.checkpoint, self.device = checkpoint, torch.device(device)
        self.exact = Exact() if arithmetic == "exact" else None
        with self.computing():
            self.build()

    def computing(self) -> AbstractContextManager[Any]:
        return compute_exactly(self.exact) if self.exact else torch.inference_mode()

    def build(self) -> None:
        """Put the model together on the meta device, and load what lies around its layers."""
        self.model = build_model(self.checkpoint.config, str(self.checkpoint.folder), eager=self.exact is not None)
        self.dtypes = {name: value.dtype for name, value in self.model.named_parameters()}
        self.prepare_model()
        self.prefix, layers = find_layers(self.model)
        self.layers = list(layers)
        self.recorders = [Recorder(layer) for layer in self.layers]
        parent, _, attribute = self.prefix.rpartition(".")
        setattr(self.model.get_submodule(parent), attribute, torch.nn.ModuleList(self.recorders))
        compute_buffers(self.model, self.device)
        for layer in self.layers:
            compute_buffers(layer, self.device, self.model)
        self.load_edges()

    def prepare_model(self) -> None:
        """Change the model while all of it is on the meta device; a base model is run as it is."""

    def finish_layer(self, layer: torch.nn.Module) -> None:
        """Change a layer that has just got its weights; a base model's is run as it is."""

    def load_edges(self) -> None:
        """Map embeddings and final norm from their files; only the pages that are used are read."""
        head = {name for name, module in self.model.named_modules() if module is self.model.get_output_embeddings()}
        own = [name for name, _ in self.model.named_parameters() if name.rpartition(".")[0] not in head]
        self.assign(own)
        self.model.tie_weights()

    def load_head(self) -> None:
        """lm_head too, which calibration has no use for."""
        self.assign([name for name, parameter in self.model.named_parameters() if parameter.is_meta])
        head = self.model.get_output_embeddings()
        if isinstance(head, torch.nn.Linear) and head.weight.nbytes > BAND_BYTES:
            head.forward = partial(apply_in_bands, head)  # type: ignore[method-assign]

    def assign(self, names: Sequence[str]) -> None:
        self.model.load_state_dict({name: self.load(name) for name in names}, strict=False, assign=True)
        self.model.requires_grad_(False)

    def load(self, name: str) -> torch.Tensor:
        """A tensor of the checkpoint in the dtype that the model runs it in: a merge may hold several."""
        tensor = self.checkpoint.load(name).to(self.device)
        return tensor.to(self.dtypes.get(name, tensor.dtype)) if tensor.dtype in FLOATS else tensor

    @computes
    def embed(self, tokens: Sequence[int]) -> Row:
        """Turn token ids into the first layer's input, and find what every layer is called with."""
        head = self.model.get_output_embeddings()

        def stop(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            raise Normed(inputs[0])

        hook = head.register_forward_pre_hook(stop)
        try:
            self.model(input_ids=torch.tensor([list(tokens)], device=self.device), use_cache=False)
        except Normed:
            pass
        finally:
            hook.remove()
        return Row(self.recorders[0].seen, [recorder.arguments for recorder in self.recorders])

    @contextmanager
    def open_layer(self, index: int) -> Iterator[torch.nn.Module]:
        """One layer with its weights, for as long as the block runs; the next one is read from the disk meanwhile."""
        next_one = [name for name in self.checkpoint.tensors if name.startswith(f"{self.prefix}.{index + 1}.")]
        threading.Thread(target=self.checkpoint.read_ahead, args=[next_one], daemon=True).start()
        layer = copy.deepcopy(self.layers[index])
        weights = {name: self.load(f"{self.prefix}.{index}.{name}") for name, _ in layer.named_parameters()}
        layer.load_state_dict(weights, strict=False, assign=True)
        layer.requires_grad_(False)
        with self.computing():
            self.finish_layer(layer)
        try:
            yield layer
        finally:
            layer.to("meta")

    @computes
    def run_layer(self, layer: torch.nn.Module, index: int, row: Row) -> None:
        """Carry a row through a layer; its hidden states are replaced by what the layer yields."""
        args, kwargs = row.arguments[index]
        out = layer(row.hidden, *args, **kwargs)
        row.hidden = out[0] if isinstance(out, tuple) else out

    @computes
    def read_logits(self, row: Row) -> torch.Tensor:
        """Final norm and lm_head, with whatever the family does around them: [T, V] from a row past the last layer."""
        self.load_head()
        last = self.recorders[-1]

        def replace(module: torch.nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
            return row.hidden

        hook = last.register_forward_hook(replace, with_kwargs=True)
        try:
            tokens = torch.zeros(1, row.hidden.shape[1], dtype=torch.long, device=self.device)
            logits: torch.Tensor = self.model(input_ids=tokens, use_cache=False).logits
        finally:
            hook.remove()
        return logits[0]


def apply_in_bands(linear: torch.nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    """A large linear, some of its outputs at a time: a matrix product may hold a second copy of its weights."""
    step = max(1, BAND_BYTES // (linear.weight.nbytes // linear.out_features))
    bands = []
    for start in range(0, linear.out_features, step):
        bias = None if linear.bias is None else linear.bias[start : start + step]
        bands.append(torch.nn.functional.linear(inputs, linear.weight[start : start + step], bias))
    return torch.cat(bands, dim=-1)


def compute_buffers(module: torch.nn.Module, device: torch.device, model: PreTrainedModel | None = None) -> None:
    """Give buffers that are computed and not stored (rotary frequencies, embedding scales) their values.

    transformers computes them in `_init_weights`, as it does when it loads a checkpoint itself.
    Raises BaseError naming a buffer that it leaves out.
    """
    owner: Any = model or module
    for part in module.modules():
        missing = {name: buffer for name, buffer in part.named_buffers(recurse=False) if buffer.is_meta}
        if not missing:
            continue
        for name, buffer in missing.items():
            unset = float("nan") if buffer.is_floating_point() else 0
            part._buffers[name] = torch.full_like(buffer, unset, device=device)
        owner._init_weights(part)
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.isnan().any():
                what = f"transformers does not compute the buffer {name} of {type(part).__name__}"
                raise BaseError(what, type(owner).__name__, "use a base model of another family")
