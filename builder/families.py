"""What a decoder model is made of: layers, the linears to quantize, the groups that share an input, the edges."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from builder.base import Tensor
from builder.errors import BaseError, BuildError
from builder.files import cache_folder, digest, read_receipt, write_receipt

if TYPE_CHECKING:
    import torch
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

DTYPE_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
MAX_LAYERS = 10_000  # making layers takes time even without weights, and no model has so many


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One decoder layer. Names are the whole model's: `model.layers.3.self_attn.q_proj`."""

    index: int
    name: str
    tensors: tuple[Tensor, ...]
    groups: tuple[tuple[str, ...], ...]  # linears that read the same input, in the order they read it
    attention: str | None  # the module whose keys and values go into the KV cache as they are; None if there is none

    @cached_property
    def linears(self) -> tuple[str, ...]:
        return tuple(linear for group in self.groups for linear in group)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The structure of a model, found from its config alone."""

    name: str
    layers: tuple[Layer, ...]
    first_edge: tuple[Tensor, ...]  # what comes before the layers: the embeddings
    last_edge: tuple[Tensor, ...]  # what comes after them: final norm, lm_head
    other_linears: tuple[str, ...]  # linears outside the layers: lm_head
    embeddings: tuple[str, ...]  # modules that are torch's own Embedding, not a family's: Gemma's scales what it finds
    tied: bool  # lm_head is the embeddings' own tensor and is not stored
    inexact: tuple[str, ...]  # torch operations it runs that `builder.arithmetic` has no exact form of
    facts: Mapping[str, Any]  # hidden_size and the like, for tables

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.first_edge, *(tensor for layer in self.layers for tensor in layer.tensors), *self.last_edge)

    @property
    def num_parameters(self) -> int:
        return sum(tensor.num_elements for tensor in self.tensors)


ARCHITECTURE = TypeAdapter(Architecture)
FILES = (Path(__file__), *sorted((Path(__file__).parent / "arithmetic").glob("*.py")))
CODE = hashlib.sha256(b"".join(file.read_bytes() for file in FILES)).hexdigest()  # other code may see more


def build_model(config: Mapping[str, Any], where: str, *, eager: bool = False) -> PreTrainedModel:
    """The transformers model with every parameter and buffer on the meta device, in the config's dtype.

    eager: attention and experts as the model's own code has them, in operations that `builder.arithmetic` knows.
    Raises BaseError unless the config makes a causal language model that transformers knows.
    """
    import torch
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from builder.arithmetic.attention import use_eager_code

    architecture, model_type = config["architectures"][0], config["model_type"]
    if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type) != architecture:
        raise BaseError(
            f"transformers {transformers.__version__} has no causal language model {architecture} ({model_type})",
            where,
            "use a base model of a decoder family that transformers knows",
        )
    dtype = read_dtype(config, where)
    count = config.get("num_hidden_layers")
    if isinstance(count, int) and count > MAX_LAYERS:
        what = f"config.json has num_hidden_layers {count}, and no model has more than {MAX_LAYERS}"
        raise BaseError(what, where, "mend config.json")
    try:
        parsed = transformers.CONFIG_MAPPING[model_type].from_dict(dict(config))
        with torch.device("meta"):
            attention = {"attn_implementation": "eager"} if eager else {}
            model: PreTrainedModel = getattr(transformers, architecture)._from_config(parsed, dtype=dtype, **attention)
    except Exception as error:  # each family's code has its own ways to fail on a wrong config
        reason = describe_failure(error)
        raise BaseError(f"config.json does not make a {architecture}: {reason}", where, "mend config.json") from error
    if eager:
        use_eager_code(model)
    return model.eval()


def describe_failure(error: Exception) -> str:
    """An exception of someone else's code on one line of bounded length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def read_dtype(config: Mapping[str, Any], where: str) -> torch.dtype:
    """The dtype the model computes in. Raises BaseError unless it is a 16- or 32-bit float."""
    import torch

    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if name not in DTYPE_NAMES:
        raise BaseError(f"config.json has the dtype {name}", where, "use a base in bfloat16, float16 or float32")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def find_layers(model: PreTrainedModel) -> tuple[str, torch.nn.ModuleList]:
    """The name and the list of the decoder layers: the shallowest list as long as `num_hidden_layers`."""
    import torch

    count = getattr(model.config, "num_hidden_layers", 0)
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    fitting = [(name, module) for name, module in lists if len(module) == count > 0]
    if not fitting:
        raise BaseError(
            f"{type(model).__name__} has no list of {count} decoder layers",
            "config.json",
            "use a base model that is a plain stack of decoder layers",
        )
    return min(fitting, key=lambda found: found[0].count("."))


def recall_architecture(config: Mapping[str, Any], where: str) -> Architecture:
    """As `describe_architecture`, remembered for a config and the versions that read it: torch and transformers
    take seconds to load.
    """
    key = digest(
        {"config": dict(config), "versions": [version(name) for name in ("torch", "transformers")], "by": CODE}
    )
    path = cache_folder() / "architectures" / f"{key[:32]}.json"
    known = read_receipt(path)
    if known is not None and known["key"] == key:
        return ARCHITECTURE.validate_python(known["architecture"])
    architecture = describe_architecture(config, where)
    with suppress(OSError, BuildError):  # a full or read-only home costs time, and nothing else
        write_receipt(path, {"key": key, "architecture": ARCHITECTURE.dump_python(architecture, mode="json")})
    return architecture


def describe_architecture(config: Mapping[str, Any], where: str) -> Architecture:
    """Find a model's structure on the meta device. No weight is read.

    A layer's groups are the linears that were handed the very same tensor in one forward pass: they share a global
    scale, as modelopt exports them and as engines fuse them.
    Raises BaseError for a model whose layers are not made of linears that each run once.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch

    model = build_model(config, where, eager=True)
    prefix, modules = find_layers(model)
    dtype = DTYPE_NAMES[str(model.dtype).removeprefix("torch.")]
    first: list[Tensor] = []
    last: list[Tensor] = []
    inside: dict[int, list[Tensor]] = {index: [] for index in range(len(modules))}
    for name, parameter in model.named_parameters():  # a tied parameter is named once
        tensor = Tensor(name=name, dtype=dtype, shape=tuple(parameter.shape))
        if name.startswith(prefix + "."):
            inside[int(name[len(prefix) + 1 :].split(".", 1)[0])].append(tensor)
        elif isinstance(model.get_submodule(name.rpartition(".")[0]), torch.nn.Embedding):
            first.append(tensor)
        else:
            last.append(tensor)
    check_buffers(model, where)
    check_dense([tensor for tensors in inside.values() for tensor in tensors], where)
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    try:
        groups, attentions, inexact = trace_model(model, [f"{prefix}.{index}" for index in range(len(modules))])
    except Exception as error:  # as above
        what = f"config.json makes a {type(model).__name__} that does not run: {describe_failure(error)}"
        raise BaseError(what, where, "mend config.json, or use a base model of another family") from error
    check_traced(linears, groups, prefix, where)
    layers = []
    for index in range(len(modules)):
        name = f"{prefix}.{index}"
        own = tuple(group for group in groups if group[0].startswith(name + "."))
        layers.append(
            Layer(index=index, name=name, tensors=tuple(inside[index]), groups=own, attention=attentions[name])
        )
    return Architecture(
        name=type(model).__name__,
        layers=tuple(layers),
        first_edge=tuple(first),
        last_edge=tuple(last),
        other_linears=tuple(sorted(linear for linear in linears if not linear.startswith(prefix + "."))),
        embeddings=tuple(name for name, module in model.named_modules() if type(module) is torch.nn.Embedding),
        tied=bool(getattr(model.config, "tie_word_embeddings", False)),
        inexact=inexact,
        facts=collect_facts(model.config),
    )


def check_buffers(model: PreTrainedModel, where: str) -> None:
    """Refuse a model that stores more than parameters: a release would lose it."""
    buffers = dict(model.named_buffers())
    stored = [name for name in model.state_dict() if name in buffers]
    if stored:
        what = f"{stored[0]} is stored, but is no parameter: such buffers are not carried over"
        raise BaseError(what, where, "use a base model of another family")


def check_dense(tensors: Sequence[Tensor], where: str) -> None:
    """Refuse layers that hold more than matrices: transformers stacks the experts of a mixture in one tensor."""
    for tensor in tensors:
        if len(tensor.shape) > 2:
            what = f"{tensor.name} has {len(tensor.shape)} dimensions: experts and convolutions cannot be quantized"
            raise BaseError(what, where, "use a base model with dense layers")


def check_traced(linears: Sequence[str], groups: Sequence[Sequence[str]], prefix: str, where: str) -> None:
    """Refuse a model with a decoder linear that runs never or more than once, or with none at all."""
    runs = Counter(linear for group in groups for linear in group)
    inside = [linear for linear in linears if linear.startswith(prefix + ".")]
    strange = [linear for linear in inside if runs[linear] != 1]
    if strange:
        what = f"{strange[0]} runs {runs[strange[0]]} times in a forward pass, but must run once"
        raise BaseError(what, where, "use a base model of another family")
    if not inside:
        raise BaseError("the decoder layers have no linears", where, "use a base model of another family")


def trace_model(
    model: PreTrainedModel, layers: Sequence[str]
) -> tuple[tuple[tuple[str, ...], ...], dict[str, str | None], tuple[str, ...]]:
    """Run one forward pass on the meta device. Returns the linears that read the same input tensor, in order; for each
    layer the attention whose keys and values go into the KV cache, if that happens once; and the operations that have
    no exact form.

    The mask is given in four dimensions because transformers then takes it as it is; making one would look at values.
    """
    import torch

    from builder.arithmetic.exact import arithmetic

    readers: dict[int, tuple[torch.Tensor, list[str]]] = {}
    cached: list[str] = []
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def note(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], name: str = name) -> None:
                readers.setdefault(id(inputs[0]), (inputs[0], []))[1].append(name)  # held, so that no id recurs

            hooks.append(module.register_forward_pre_hook(note))
        elif is_attention(name, module):

            def note_cache(keys: torch.Tensor, values: torch.Tensor, name: str = name) -> None:
                cached.append(name)

            hooks.append(watch_cache(module, note_cache))
    try:
        with arithmetic() as mode:
            tokens = torch.zeros(1, 2, dtype=torch.long, device="meta")
            model(input_ids=tokens, attention_mask=torch.zeros(1, 1, 2, 2, device="meta"), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    attentions: dict[str, str | None] = {}
    for layer in layers:
        own = [name for name in cached if name.startswith(layer + ".")]
        attentions[layer] = own[0] if len(own) == 1 else None
    return tuple(tuple(names) for _, names in readers.values()), attentions, tuple(sorted(mode.refused))


def is_attention(name: str, module: torch.nn.Module) -> bool:
    """Whether compressed-tensors and engines look for scales of a KV cache at a module; not where it holds latents."""
    named = name.endswith(("self_attn", "attention")) and not hasattr(module, "kv_lora_rank")
    return named and "past_key_values" in signature(module.forward).parameters


def watch_cache(attention: torch.nn.Module, note: Callable[[torch.Tensor, torch.Tensor], None]) -> RemovableHandle:
    """Have an attention tell its keys, rotated, and values [rows, heads, tokens, head size] as they go into the cache.

    It computes as before; nothing is cached.
    """
    from transformers import DynamicCache

    class Told(DynamicCache):  # type: ignore[misc]
        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            note(key_states, value_states)
            return key_states, value_states

    def give(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"past_key_values": Told()}

    return attention.register_forward_pre_hook(give, with_kwargs=True)


def collect_facts(config: Any) -> dict[str, Any]:
    """The config's numbers that a reader of a plan or a card knows a model by."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    facts = {name: getattr(config, name, None) for name in names}
    if facts["head_dim"] is None and facts["hidden_size"] and facts["num_attention_heads"]:
        facts["head_dim"] = facts["hidden_size"] // facts["num_attention_heads"]
    facts["max_position_embeddings"] = getattr(config, "max_position_embeddings", None)
    return {name: value for name, value in sorted(facts.items()) if value is not None}
