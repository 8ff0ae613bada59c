"""The manifest: a YAML file read strictly into a frozen `Release`, every problem with its line and its remedy.

`Release` is the interface: its keys are what a user writes, the texts under them what their editor shows. Scalars are
typed by it and never by YAML's guesses. What takes the base model to know, or the tables of schemes, fixes, executors
and licences, is checked later, by whoever holds these; `Manifest.where` gives them the line to point at.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    StrictBool,
    StrictStr,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import ErrorDetails, PydanticCustomError, core_schema

from builder.errors import BuildError, ManifestError, Problems, nearest
from builder.files import write_atomic

MAX_BYTES: Final = 1_000_000
MAX_DEPTH: Final = 32
MAX_VALUES: Final = 20_000
SCHEMA_FILE: Final = "manifest.schema.json"
HOW: Final = frozenset({"shards", "executor", "device"})

NOTHING: Final = ("", "~", "null", "Null", "NULL")

Key = str | int
Found = tuple[tuple[int, int], ManifestError]  # a problem with its line and column

# --- what a scalar may be ---------------------------------------------------------------------------------------------

NAME = r"^[A-Za-z0-9][A-Za-z0-9._+-]*$"
HUB_NAME = r"[A-Za-z0-9_]([.-]?[A-Za-z0-9_]){0,95}"
HUB_ID = rf"^({HUB_NAME}/)?{HUB_NAME}$"
OWNED_HUB_ID = rf"^{HUB_NAME}/{HUB_NAME}$"
SIDE = rf"^(base|quantized|{HUB_NAME}/{HUB_NAME})$"
REVISION = r"^[0-9a-f]{40}$"
OPTION = r"^[A-Za-z][A-Za-z0-9._-]*$"
VARIABLE = r"^[A-Z_][A-Z0-9_]*$"
TOOL = r"^[a-z][a-z0-9_-]* [0-9][A-Za-z0-9.+-]*$"
TEMPLATE_TOOL = r"^transformers 4\.57\.[0-9]+$"
SIZE = r"^([0-9]+|[0-9]+\.[0-9]+) ?(B|[kKMGT]B|[KMGT]iB)?$"

FORMS: Final = {
    NAME: "a name of letters, digits and . _ + -",
    HUB_ID: "a Hub id, owner/name",
    OWNED_HUB_ID: "a Hub id, owner/name",
    SIDE: "base, quantized, or the Hub id of another release",
    REVISION: "the 40 lowercase hexadecimal digits of a commit",
    OPTION: "the name of an option without its leading dashes",
    VARIABLE: "the name of a variable in capitals, digits and _",
    TOOL: "a tool and its version, such as modelopt 0.43.0",
    TEMPLATE_TOOL: "transformers 4.57.0 or a later 4.57",
}


class Bare(str):
    """A scalar written without quotes: the only kind that can mean true, false or nothing."""


def expected(phrase: str) -> PydanticCustomError:
    """The refusal of a value that is not what `phrase` names."""
    return PydanticCustomError("expected", "{phrase}", {"phrase": phrase})


def broken(rule: str, fix: str) -> PydanticCustomError:
    """The refusal of keys that do not go together."""
    return PydanticCustomError("rule", "{rule}", {"rule": rule, "fix": fix})


def read_whole(value: object) -> object:
    if isinstance(value, str) and re.fullmatch(r"-?(0|[1-9][0-9]{0,17})", value):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise expected("a whole number")


def read_number(value: object) -> object:
    written = isinstance(value, str) and re.fullmatch(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?", value)
    if written or (isinstance(value, int | float) and not isinstance(value, bool)):
        number = float(typing.cast(str | float, value))
        if math.isfinite(number):
            return number
    raise expected("a finite number")


def read_switch(value: object) -> object:
    switch = {"true": True, "false": False}.get(value) if isinstance(value, str) else value
    if isinstance(switch, bool):
        return switch
    raise expected("true or false")


def read_size(value: object) -> object:
    if isinstance(value, str) and (match := re.fullmatch(SIZE, value)):
        unit = match[2] or "B"
        base = 1024 if "i" in unit else 1000
        size = Decimal(match[1]) * base ** "BKMGT".index(unit[0].upper())
        if 0 < size < 2**63 and size == int(size):
            return int(size)
    elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise expected("a number of bytes, or a size in kB, MB, GB, KiB, MiB or GiB")


def read_shards(value: object) -> object:
    try:
        counts = [read_whole(item) for item in (value if isinstance(value, list | tuple) else [value])]
    except PydanticCustomError:
        counts = []
    if not counts or any(typing.cast(int, count) < 1 for count in counts):
        raise expected("a count of at least 1, or a list of the layers of each shard")
    return tuple(counts) if isinstance(value, list | tuple) else counts[0]


def read_argument(value: object) -> object:
    if isinstance(value, Bare) and value in ("true", "false"):
        return value == "true"
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, list | tuple) and value and all(isinstance(item, str) for item in value):
        return tuple(str(item) for item in value)
    raise expected("a text, true, false or a list of texts (JSON goes in single quotes)")


def read_schemes(value: object) -> object:
    if isinstance(value, Mapping | Scheme):
        return (value,)
    if isinstance(value, list | tuple):
        return value
    raise expected("keys and values, or a list of these")


def check_pair(value: object) -> object:
    if isinstance(value, list | tuple) and len(value) != 2:
        raise expected("two whole numbers, the shortest and the longest row")
    return value


def check_ascending(pair: tuple[int, int]) -> tuple[int, int]:
    if pair[0] > pair[1]:
        raise expected("two whole numbers, the smaller one first")
    return pair


def check_unique(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise expected("a list without repetitions")
    return names


def check_date(text: str) -> str:
    try:
        if date.fromisoformat(text).isoformat() == text:
            return text
    except ValueError:
        pass
    raise expected("a date, YYYY-MM-DD")


class OneOrMany:
    """In the JSON Schema, a list's single item may stand for the list."""

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        many = handler(schema)
        return {"anyOf": [many["items"], many]}


Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=NAME)]
HubId = Annotated[str, Field(pattern=HUB_ID)]
Revision = Annotated[str, Field(pattern=REVISION)]
Date = Annotated[str, AfterValidator(check_date)]
WHOLE: Final = BeforeValidator(read_whole)
NUMBER: Final = BeforeValidator(read_number)
Count = Annotated[int, Field(ge=1), WHOLE]
Switch = Annotated[bool, BeforeValidator(read_switch)]
Names = Annotated[tuple[Name, ...], AfterValidator(check_unique)]
Argument = Annotated[StrictBool | StrictStr | tuple[StrictStr, ...], BeforeValidator(read_argument)]
Arguments = dict[Annotated[str, Field(pattern=OPTION)], Argument]
Variables = dict[Annotated[str, Field(pattern=VARIABLE)], str]

COUNT_SCHEMA: Final[JsonSchemaValue] = {"type": "integer", "minimum": 1}
Size = Annotated[
    int, BeforeValidator(read_size), WithJsonSchema({"anyOf": [COUNT_SCHEMA, {"type": "string", "pattern": SIZE}]})
]
TokenRange = Annotated[
    tuple[Count, Count],
    BeforeValidator(check_pair),
    AfterValidator(check_ascending),
    WithJsonSchema({"type": "array", "items": COUNT_SCHEMA, "minItems": 2, "maxItems": 2}),
]
Shards = Annotated[
    int | tuple[int, ...],
    BeforeValidator(read_shards),
    WithJsonSchema({"anyOf": [COUNT_SCHEMA, {"type": "array", "items": COUNT_SCHEMA, "minItems": 1}]}),
]


# --- what a manifest holds --------------------------------------------------------------------------------------------


class Section(BaseModel):
    # the texts under the keys are the user's documentation: editors and error messages show them
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def drop_empty(cls, data: object) -> object:
        """An optional key written without a value counts as not written."""
        if not isinstance(data, dict):
            return data
        optional = {key for key, info in cls.model_fields.items() if not info.is_required()}
        return {key: value for key, value in data.items() if value is not None or key not in optional}


class Base(Section):
    model: HubId | None = None
    """Hub id of the checkpoint that is quantized."""
    path: Annotated[Text | None, Field(validate_default=True)] = None
    """Folder that holds the checkpoint, relative to this file: instead of a download, or besides `model`."""
    revision: Revision | None = None
    """Commit of `model` on the Hub; nothing is built from a Hub id without it."""
    config: Text | None = None
    """A copy of the base's config.json, relative to this file: `plan` then works before any download."""
    licenses: Annotated[tuple[Name, ...], Field(min_length=1), AfterValidator(check_unique)]
    """Licence ids of the base and of every model it was made from."""
    license_files: dict[Name, Text] = {}
    """Licence id -> file with its text, relative to this file, where the base lacks it."""
    acknowledge: Names = ()
    """Names of the warnings that the publisher has read."""

    @field_validator("path")
    @classmethod
    def require_model_or_path(cls, path: str | None, info: ValidationInfo) -> str | None:
        if path is None and info.data.get("model", "") is None:
            raise broken(
                "base has neither model nor path", "add model: a Hub id, or path: a folder beside the manifest"
            )
        return path


# What the NVFP4 schemes have to choose, and what they choose by themselves.
NVFP4: Final[Mapping[str, Mapping[str, str]]] = {
    "nvfp4": {"input_scale": "calibrated", "block_scale_floor": "true"},
    "nvfp4a16": {"block_scale_floor": "true"},
}


class Scheme(Section):
    name: Name
    """How weights and activations are quantized."""
    layout: Literal["compressed-tensors", "modelopt"] = "compressed-tensors"
    """Tensor names and config that are written; modelopt is for nvfp4 only."""
    input_scale: Literal["calibrated", "unit"] | None = None
    """Activation scales of nvfp4: measured on the calibration rows (calibrated, if absent), or 1 (unit)."""
    block_scale_floor: Switch | None = None
    """Of nvfp4 and nvfp4a16: keeps tiny blocks from underflowing, if absent; false lets them, as modelopt 0.43 did."""
    ignore: tuple[Text, ...] = ("lm_head",)
    """Modules left as they are."""
    match: Text | None = None
    """In a list of schemes: the modules this one is for."""

    @model_validator(mode="before")
    @classmethod
    def fill_options(cls, data: object) -> object:
        """What a lock records of NVFP4 is what was chosen by leaving it out."""
        if not isinstance(data, dict):
            return data
        return data | {
            key: value for key, value in NVFP4.get(str(data.get("name")), {}).items() if data.get(key) is None
        }


class Calibration(Section):
    dataset: HubId | None = None
    """Hub id of the data set."""
    path: Annotated[Text | None, Field(validate_default=True)] = None
    """File with one JSON object per row, relative to this file; instead of `dataset`."""
    config: Text | None = None
    """Configuration of the data set."""
    split: Text = "train"
    """Split of the data set."""
    revision: Revision | None = None
    """Commit of the data set on the Hub."""
    column: Text = "text"
    """Column that holds the text, or the list of chat messages."""
    chat_template: Switch = False
    """The column holds chat messages, for the tokenizer's template."""
    samples: Count = 256
    """Number of rows that are used."""
    tokens: TokenRange = (1, 2048)
    """Rows shorter than the first are skipped, longer than the second are cut."""
    add_special_tokens: Switch = True
    """The tokenizer adds its special tokens."""
    seed: Annotated[int, Field(ge=0), WHOLE] = 0
    """Seed of the choice of rows."""
    arithmetic: Literal["exact", "native"] = "exact"
    """exact: the same magnitudes on every machine; native: torch's own arithmetic, and those of its kind of machine."""

    @field_validator("path")
    @classmethod
    def require_dataset_or_path(cls, path: str | None, info: ValidationInfo) -> str | None:
        if "dataset" in info.data and (path is None) == (info.data["dataset"] is None):
            both = "neither dataset nor" if path is None else "both dataset and"
            raise broken(
                f"calibration has {both} path",
                "give one of them: dataset: a Hub id, or path: a JSON Lines file beside the manifest",
            )
        return path


class Perplexity(Section):
    path: Text
    """Held-out text, relative to this file."""


class Files(Section):
    max_bytes: Size = 5 << 30
    """Largest size of a weight file."""
    packing: Literal["sequential", "balanced"] = "sequential"
    """Tensors in the model's order, or as the published tool did: sorted keys, emptiest file first."""


class Compatibility(Section):
    """Switches that reproduce an older tool's files exactly. Each default is the better way, for new releases."""

    header_metadata: Switch = True
    """Weight files say `format: pt` in their headers, which some readers ask for; false: nothing."""
    total_parameters: Switch = True
    """The index says how many parameters the base has; false: only how many bytes there are."""
    final_newline: Switch = True
    """config.json, hf_quant_config.json and the index end with a line end; false: with their last bracket."""
    producer: Annotated[str | None, Field(pattern=TOOL)] = None
    """Exporter that the configs of the modelopt layout name; the one that is installed if absent."""
    export_template: Annotated[str | None, Field(pattern=TEMPLATE_TOOL)] = None
    """Library that saved the configs, of a one-layer stand-in for the exporter; the base's own if absent."""
    copied_files: Names | None = None
    """Files of the base that go into the artifact, where it has them; if absent, all that belong to a model."""
    license_texts: Switch = True
    """The licences' texts and a NOTICE lie beside the weights; false: whoever publishes adds them."""


class Serve(Section):
    engine: Literal["vllm"] = "vllm"
    """The server."""
    version: Text
    """Version of the engine that `args` are for."""
    model_path: Text
    """Folder of the artifact on the serving host."""
    served_name: Text | None = None
    """Name that clients ask for; the repository's if absent."""
    python: Text = "python3"
    """Python interpreter that has the engine."""
    host: Text = "127.0.0.1"
    """Address the server listens on."""
    port: Annotated[int, Field(ge=1, le=65535), WHOLE] = 8000
    """Port the server listens on."""
    args: Arguments = {}
    """The engine's options without leading dashes; true and false are for switches, all else stays as written."""
    env: Variables = {}
    """Environment variables of the server."""
    image: Text | None = None
    """Container image that has the engine; vLLM's own of that version if absent."""
    hardware: Name | None = None
    """The machine the profile is sized for."""


class Group(Section):
    name: Name
    """Name of the group."""
    swap: Switch = True
    """Only one model of the group runs at a time."""
    exclusive: Switch = True
    """A model of the group unloads those of other groups."""
    persistent: Switch = False
    """Other groups do not unload those of this one."""


class LlamaSwap(Section):
    ttl: Annotated[int, Field(ge=-1), WHOLE] = 0
    """Seconds until an idle model is unloaded; 0: never, -1: as llama-swap's globalTTL says."""
    aliases: Annotated[tuple[Text, ...], AfterValidator(check_unique)] = ()
    """Further names that clients may ask for."""
    name: Annotated[Text, Field(max_length=128)] | None = None
    """Display name."""
    description: Annotated[Text, Field(max_length=1024)] | None = None
    """Display text."""
    automatic_port: Switch = False
    """llama-swap chooses the port, ${PORT}; else it is `serve.port`."""
    container: Switch = False
    """The server runs in a container of `serve.image`, which llama-swap starts and stops."""
    group: Group | None = None
    """The group of models it swaps with."""


class Sampling(Section):
    temperature: Annotated[float, Field(ge=0), NUMBER] | None = None
    """Recommended temperature."""
    top_p: Annotated[float, Field(gt=0, le=1), NUMBER] | None = None
    """Recommended share of probability that is sampled from."""
    top_k: Annotated[int, Field(ge=-1), WHOLE] | None = None
    """Recommended number of tokens that are sampled from."""
    min_p: Annotated[float, Field(ge=0, le=1), NUMBER] | None = None
    """Recommended least probability, relative to the likeliest token's."""
    max_tokens: Count | None = None
    """Recommended greatest length of an answer."""
    notes: tuple[Text, ...] = ()
    """Advice on prompting, a sentence each."""


class Hub(Section):
    task: Text
    """Task of the results that is a Benchmark on the Hub."""
    metric: Text | None = None
    """Its metric, if the table shows more than one."""
    dataset: Annotated[str, Field(pattern=OWNED_HUB_ID)]
    """The Benchmark: a data set on the Hub."""
    task_id: Text
    """The task's id in the data set's eval.yaml."""
    revision: Revision | None = None
    """Commit of the data set."""


class Evaluation(Section):
    base: Text
    """Results for the base: a file of lm_eval or a recorded table, relative to this file."""
    quantized: Text
    """Results for the artifact: a file of lm_eval or a recorded table, relative to this file."""
    name: Text | None = None
    """Heading of the table."""
    metrics: dict[Name, Text] = {}
    """Task -> the one metric of it that is shown, with its filter after a comma; of all other tasks, all are."""
    hub: tuple[Hub, ...] = ()
    """Scores of the artifact that are told to the Hub, in .eval_results/."""


class Benchmark(Section):
    file: Text
    """Result file, relative to this file."""
    tool: Literal["guidellm", "vllm-bench", "recorded"] | None = None
    """What wrote the file; told by its content if absent."""
    model: Annotated[str, Field(pattern=SIDE)] = "quantized"
    """What was measured: base, quantized, or the Hub id of another release."""
    measured: HubId | None = None
    """The model of a recorded file whose figures stand for `quantized`; this release's repository if absent."""
    gpu: Text
    """The GPU it was measured on."""
    num_gpus: Count = 1
    """Number of these GPUs."""
    price_per_hour: Annotated[float, Field(gt=0), NUMBER] | None = None
    """US dollars for an hour of all these GPUs."""
    price_date: Annotated[Date | None, Field(validate_default=True)] = None
    """Day on which that was the price."""
    price_source: Annotated[Text | None, Field(validate_default=True)] = None
    """Where the price was published."""

    @field_validator("price_date", "price_source")
    @classmethod
    def require_origin_of_price(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and info.data.get("price_per_hour") is not None:
            raise broken(f"price_per_hour without {info.field_name}", "give the price with its date and source")
        return value


class Card(Section):
    why: Text | None = None
    """Why this release exists."""
    acknowledgments: tuple[Text, ...] = ()
    """Whom to thank, a sentence each."""
    notes: tuple[Text, ...] = ()
    """Further remarks, a paragraph each."""


class Release(Section):
    manifest: Annotated[Literal[1], WHOLE]
    """Version of the manifest's format."""
    title: Text
    """Title of the release."""
    repo: Annotated[str, Field(pattern=OWNED_HUB_ID)]
    """Hub repository it is published as."""
    base: Base
    """The checkpoint that is quantized."""
    scheme: Annotated[tuple[Scheme, ...], Field(min_length=1), BeforeValidator(read_schemes), OneOrMany()]
    """How the base is quantized: one scheme, or a list of them."""
    kv_cache: Literal["fp8"] | None = None
    """fp8: scales of the KV cache, measured on the calibration rows; for nvfp4, nvfp4a16 and fp8_dynamic."""
    shards: Shards = 1
    """The ranges of decoder layers that workers quantize: how many, or the layers of each."""
    executor: Name = "in_process"
    """Where jobs run: in_process, processes or ray; the environment variable EXECUTOR overrides it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What workers compute on."""
    calibration: Calibration | None = None
    """The rows on which activations are measured."""
    perplexity: Perplexity | None = None
    """The text on which base and artifact are compared."""
    fixes: Names | None = None
    """Fixes by name, in order; if absent, the list that belongs to scheme and layout."""
    files: Files = Files()
    """How tensors are put into files."""
    compatibility: Compatibility = Compatibility()
    """Switches that reproduce an older tool's files exactly."""
    serve: Serve | None = None
    """How the artifact is served."""
    llama_swap: LlamaSwap = LlamaSwap()
    """Its entry in llama-swap's configuration."""
    sampling: Sampling | None = None
    """Recommended sampling."""
    evaluation: tuple[Evaluation, ...] = ()
    """Results of evaluations, base and quantized."""
    benchmarks: tuple[Benchmark, ...] = ()
    """Results of speed measurements."""
    card: Card = Card()
    """What the card says that a build cannot know."""

    @property
    def arithmetic(self) -> Literal["exact", "native"]:
        """In which everything is measured; exact where nothing is calibrated."""
        return self.calibration.arithmetic if self.calibration else "exact"


EXAMPLE: Final = """\
manifest: 1
title: DeepSeek-R1-Distill-Llama-70B — NVFP4
repo: Kaleto/DeepSeek-R1-Distill-Llama-70B-NVFP4
base:
  model: deepseek-ai/DeepSeek-R1-Distill-Llama-70B
  path: deepseek-r1-70b/base
  revision: 0123456789abcdef0123456789abcdef01234567
  config: configs/llama-70b.json
  licenses: [mit, llama3.3]
  license_files: {llama3.3: licenses/llama3.3.txt}
  acknowledge: [name-prefix]
scheme:
  name: nvfp4
  layout: compressed-tensors
  input_scale: calibrated
  block_scale_floor: true
  ignore: [lm_head]
  match: mlp
kv_cache: fp8
shards: 2
executor: ray
device: auto
calibration:
  dataset: abisee/cnn_dailymail
  config: 3.0.0
  split: train
  revision: 0123456789abcdef0123456789abcdef01234567
  column: article
  chat_template: false
  samples: 256
  tokens: [150, 1200]
  add_special_tokens: true
  seed: 0
  arithmetic: exact
perplexity: {path: heldout.txt}
fixes: [restore-config]
files: {max_bytes: 5GiB, packing: sequential}
compatibility:
  header_metadata: false
  total_parameters: false
  final_newline: false
  producer: modelopt 0.43.0
  export_template: transformers 4.57.6
  copied_files: [tokenizer.json, tokenizer_config.json]
  license_texts: false
serve:
  engine: vllm
  version: 0.32
  model_path: /models/DeepSeek-R1-Distill-Llama-70B-NVFP4
  served_name: deepseek-r1-70b
  python: /opt/vllm/bin/python3
  host: 127.0.0.1
  port: 9007
  args: {max-model-len: 32768, gpu-memory-utilization: 0.80}
  env: {VLLM_MARLIN_USE_ATOMIC_ADD: 1}
  image: vllm/vllm-openai:v0.32.0
  hardware: dgx-spark
llama_swap:
  ttl: 0
  aliases: [r1-70b]
  name: DeepSeek R1 70B
  description: Reasoning in four bits
  automatic_port: true
  container: false
  group: {name: large, swap: true, exclusive: true, persistent: false}
sampling:
  temperature: 0.6
  top_p: 0.95
  top_k: 40
  min_p: 0.05
  max_tokens: 4096
  notes: [Use no system prompt.]
evaluation:
- base: results/base.json
  quantized: results/nvfp4.json
  name: Reasoning
  metrics: {gpqa_diamond: "exact_match,flexible-extract"}
  hub:
  - task: gpqa_diamond
    metric: exact_match,flexible-extract
    dataset: Idavidrein/gpqa
    task_id: diamond
    revision: 0123456789abcdef0123456789abcdef01234567
benchmarks:
- file: results/chat.json
  tool: guidellm
  model: quantized
  measured: someone/DeepSeek-R1-Distill-Llama-70B-NVFP4
  gpu: H100
  num_gpus: 1
  price_per_hour: 2.50
  price_date: 2026-11-01
  price_source: https://example.com/prices
card: {why: It fits on one card., acknowledgments: [The authors of the base.], notes: [Made for long contexts.]}
"""


# --- the file, value by value -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """A value where it was written: text, a list, a mapping, or nothing.

    line, column: from 1; of a text its own, of all else those of the key it belongs to.
    size: the number of values in it, aliases written out.
    """

    value: str | tuple[Node, ...] | dict[str, Node] | None
    line: int
    column: int
    size: int = 1

    @property
    def content(self) -> Any:
        """The value as str, list, dict and None."""
        if isinstance(self.value, tuple):
            return [item.content for item in self.value]
        if isinstance(self.value, dict):
            return {key: item.content for key, item in self.value.items()}
        return self.value

    def find(self, keys: tuple[Key, ...]) -> tuple[str, Node]:
        """The dotted name and the node of the deepest value on the way; keys that are not written are passed over."""
        dotted, node = "", self
        for key in keys:
            below = None
            if isinstance(node.value, dict) and isinstance(key, str):
                below = node.value.get(key)
            elif isinstance(node.value, tuple) and isinstance(key, int):
                below = dict(enumerate(node.value)).get(key)
            if below is not None:
                dotted, node = join(dotted, key), below
        return dotted, node

    def __str__(self) -> str:
        """The value on one short line."""
        if isinstance(self.value, tuple):
            return shorten(f"[{', '.join(map(str, self.value))}]")
        if isinstance(self.value, dict):
            written = [f"{key}: {node}" for key, node in list(self.value.items())[:3]]
            return f"{{{', '.join(written[:2] + ['...'] * (len(written) > 2))}}}"
        return "nothing" if self.value is None else shorten(self.value) or "an empty text"


def join(dotted: str, key: Key) -> str:
    """The dotted name of a key below another one."""
    if isinstance(key, int):
        return f"{dotted}[{key}]"
    return f"{dotted}.{shorten(key)}" if dotted else shorten(key)


def shorten(text: str) -> str:
    """A user's text made fit for one line of a message."""
    line = "".join(char if char.isprintable() else " " for char in text)
    return line if len(line) <= 60 else line[:59] + "…"


def point_at(file: str, dotted: str, node: Node) -> str:
    """The middle line of an error: `file:line:column: key: value`, without the value of a mapping."""
    value = "" if node.value is None or isinstance(node.value, dict) else str(node)
    return ": ".join(part for part in (f"{file}:{node.line}:{node.column}", dotted, value) if part)


class Reader:
    """YAML events -> `Node`, without tags and guesses, bounded in depth and size.

    problems: what did not keep the rest from being read, each with its place; everything else is raised.
    """

    def __init__(self, text: str, file: str) -> None:
        self.file = file
        self.yaml: Any = yaml.SafeLoader(text)
        self.anchors: dict[str, Node] = {}
        self.num_values = 0
        self.problems: list[Found] = []

    def read_document(self) -> Node:
        self.yaml.get_event()  # the stream's start
        if not isinstance(self.yaml.get_event(), yaml.DocumentStartEvent):
            raise ManifestError("the manifest is empty", self.file, "start from a copy of another manifest")
        root = self.read_node("", 1)
        self.yaml.get_event()  # the document's end
        if not isinstance(after := self.yaml.get_event(), yaml.StreamEndEvent):
            raise self.refuse(after, "a second YAML document", "keep one manifest in a file: delete the line ---")
        if not isinstance(root.value, dict):
            raise ManifestError(
                "the manifest is not made of keys and values",
                point_at(self.file, "", root),
                "write `key: value` lines, beginning with manifest: 1",
            )
        return root

    def read_node(self, dotted: str, depth: int) -> Node:
        event = self.yaml.get_event()
        if depth > MAX_DEPTH:
            raise self.refuse(event, f"more than {MAX_DEPTH} levels of nesting", "no key of a manifest has so many")
        if isinstance(event, yaml.AliasEvent):
            return self.follow(event)
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self.note(event, dotted, f"the tag {shorten(tag)} in a manifest", "remove it: the key decides the type")
        if isinstance(event, yaml.ScalarEvent):
            node = self.read_scalar(event, dotted)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self.read_list(event, dotted, depth)
        else:
            node = self.read_mapping(event, dotted, depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def follow(self, event: Any) -> Node:
        if event.anchor not in self.anchors:
            raise self.refuse(
                event, f"*{shorten(event.anchor)} stands for nothing written before it", "write the value itself"
            )
        node = self.anchors[event.anchor]
        return self.place(event, node.value, node.size)

    def read_scalar(self, event: Any, dotted: str) -> Node:
        if wrong := re.search("[\0\ud800-\udfff]", event.value):
            self.note(event, dotted, f"the character U+{ord(wrong[0]):04X} in a text", "remove it")
            return self.place(event, "")
        if event.style is not None:
            return self.place(event, event.value)
        return self.place(event, None if event.value in NOTHING else Bare(event.value))

    def read_list(self, event: Any, dotted: str, depth: int) -> Node:
        items: list[Node] = []
        while not self.yaml.check_event(yaml.SequenceEndEvent):
            items.append(self.read_node(join(dotted, len(items)), depth + 1))
        self.yaml.get_event()
        return self.place(event, tuple(items))

    def read_mapping(self, event: Any, dotted: str, depth: int) -> Node:
        entries: dict[str, Node] = {}
        lines: dict[str, int] = {}
        while not self.yaml.check_event(yaml.MappingEndEvent):
            start = self.yaml.peek_event()
            line, column = mark(start)
            key = self.read_node(dotted, depth + 1).value
            name = str(key or "") if key is None or isinstance(key, str) else None
            node = self.read_node(join(dotted, name or ""), depth + 1)
            if not isinstance(node.value, str):
                node = replace(node, line=line, column=column)
            if name is None:
                self.note(start, dotted, "a key that is a list or a mapping", "write a name before the colon")
            elif name in entries:
                what = f"{shorten(name)} is written twice, in lines {lines[name]} and {line}"
                self.note(start, join(dotted, name), what, "keep one of them")
            else:
                entries[name], lines[name] = node, line
        self.yaml.get_event()
        return self.place(event, entries)

    def place(self, event: Any, value: str | tuple[Node, ...] | dict[str, Node] | None, size: int = 0) -> Node:
        """A new node; an alias counts as many values as what it stands for."""
        self.num_values += size or 1
        if self.num_values > MAX_VALUES:
            raise self.refuse(
                event, f"more than {MAX_VALUES} values, aliases written out", "write fewer; use no aliases"
            )
        if isinstance(value, tuple | dict):
            size = 1 + sum(item.size for item in (value if isinstance(value, tuple) else value.values()))
        return Node(value, *mark(event), size or 1)

    def refuse(self, event: Any, what: str, fix: str, dotted: str = "") -> ManifestError:
        line, column = mark(event)
        return ManifestError(what, f"{self.file}:{line}:{column}" + (f": {dotted}" if dotted else ""), fix)

    def note(self, event: Any, dotted: str, what: str, fix: str) -> None:
        self.problems.append((mark(event), self.refuse(event, what, fix, dotted)))


def mark(event: Any) -> tuple[int, int]:
    """Line and column of an event, from 1."""
    return event.start_mark.line + 1, event.start_mark.column + 1


def read_nodes(data: bytes, file: str) -> tuple[Node, list[Found]]:
    """The root of a manifest, and the problems that did not keep it from being read."""
    if len(data) > MAX_BYTES:
        raise ManifestError(f"more than {MAX_BYTES} bytes in a manifest", file, "refer to files instead")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = f"byte 0x{data[error.start]:02x} is not UTF-8"
        raise ManifestError(what, f"{file}:{line}", "save the file as UTF-8") from None
    reader = None
    try:
        reader = Reader(text, file)
        return reader.read_document(), reader.problems
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        what = f"the character U+{ord(text[error.position]):04X} is not allowed in YAML"
        raise ManifestError(what, f"{file}:{line}", "remove it") from None
    except yaml.MarkedYAMLError as error:
        raise explain_syntax(error, file) from None
    except (ValueError, OverflowError):  # PyYAML lets them through for escapes and version numbers beyond all bounds
        line = reader.yaml.get_mark().line + 1 if reader else 1
        what = "not YAML: an escape or a version that is out of bounds"
        raise ManifestError(what, f"{file}:{line}", "write the character itself") from None


def explain_syntax(error: yaml.MarkedYAMLError, file: str) -> ManifestError:
    """PyYAML's own sentence, with the place where the unfinished thing began."""
    place, start = error.problem_mark, error.context_mark
    what = f"not YAML: {shorten(error.problem or 'the text cannot be read')}"
    if error.context and start and place and start.line != place.line:
        what += f" {error.context} that begins in line {start.line + 1}"
    where = f"{file}:{place.line + 1}:{place.column + 1}" if place else file
    return ManifestError(what, where, "indent with spaces, close quotes and brackets, quote text that has `: ` or ` #`")


# --- what a user is told of a wrong value -----------------------------------------------------------------------------

EXPECTED: Final = {
    "string_type": "a text",
    "string_too_short": "a text that is not empty",
    "string_too_long": "a text of at most {max_length} characters",
    "tuple_type": "a list",
    "too_short": "a list that is not empty",
    "model_type": "keys and values",
    "dict_type": "keys and values",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than_equal": "at most {le:g}",
    "expected": "{phrase}",
}


def unpack(annotation: Any) -> Iterator[Any]:
    """A type and all the types it is made of; of a Literal, its values."""
    yield annotation
    for part in typing.get_args(annotation):
        yield from unpack(part)


def find_field(
    keys: tuple[Key, ...], section: type[Section] = Release
) -> tuple[type[Section], tuple[Key, ...], FieldInfo | None]:
    """Where in a section the keys lead: the section, its own keys with those of the field, the field if it exists."""
    for end, key in enumerate(keys, 1):
        if isinstance(key, str):
            info = section.model_fields.get(key)
            parts = unpack(info.annotation if info else None)
            inner = next((part for part in parts if isinstance(part, type) and issubclass(part, Section)), None)
            if inner is None or end == len(keys):
                return section, keys[:end], info
            section, field_keys, field_info = inner, keys[:end], info
    return section, field_keys, field_info


@cache
def read_example() -> Node:
    return read_nodes(EXAMPLE.encode(), "")[0]


def show_example(keys: tuple[Key, ...]) -> str:
    """A key and its value as the example has them."""
    dotted, node = read_example().find(tuple(0 if isinstance(key, int) else key for key in keys))
    return f"{dotted.rpartition('.')[2]}: {node}"


def explain(error: ErrorDetails, root: Node, file: str) -> Found:
    """One of pydantic's findings in our words, with its place."""
    keys, kind, context = error["loc"], error["type"], error.get("ctx", {})
    dotted, node = root.find(keys)
    section, field_keys, info = find_field(keys)
    valid = [str(part) for part in unpack(info.annotation) if isinstance(part, str | int)] if info else []
    if kind == "rule":
        what, fix = context["rule"], context["fix"]
    elif kind == "extra_forbidden":
        what = f"unknown key {dotted}"
        valid = list(section.model_fields)
        fix = nearest(str(keys[-1]), valid)
    elif kind == "missing" and info:
        what = f"{dotted or 'the manifest'} lacks the key {keys[-1]}"
        fix = f"add for example {show_example(field_keys)}. {(info.description or '').rstrip('.')}"
    elif kind == "literal_error":
        what = f"{dotted} cannot be {node}"
        fix = nearest(str(node.value), valid) if len(valid) > 1 else f"write {dotted}: {valid[0]}"
    else:
        form = FORMS[context["pattern"]] if kind == "string_pattern_mismatch" else EXPECTED[kind].format(**context)
        what = f"{dotted} must be {form}, not {node}"
        if keys[-1] == "[key]":
            what = f"a key of {root.find(field_keys)[0]} must be {form}, not {shorten(str(keys[-2]))}"
        fix = f"write for example {show_example(field_keys)}"
    return (node.line, node.column), ManifestError(what, point_at(file, dotted, node), fix)


# --- the manifest -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Manifest:
    """A release and the file it was read from.

    name: the file's stem; path: absolute.
    """

    name: str
    path: Path
    release: Release
    root: Node = field(repr=False, compare=False)

    def where(self, *keys: Key) -> str:
        """`file:line:column: key: value` of a key, or of the nearest one above it that is written."""
        return point_at(show_path(self.path), *self.root.find(keys))

    def resolve(self, relative: str) -> Path:
        """A path written in the manifest, which is relative to the manifest's folder."""
        return self.path.parent / relative

    def what(self) -> dict[str, Any]:
        """All that decides the release's content, defaults included, as JSON-able values; not how it is built."""
        return self.release.model_dump(mode="json", exclude=set(HOW))


def show_path(path: Path) -> str:
    """A path relative to the working directory if it lies below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def list_releases(folder: Path) -> tuple[str, ...]:
    """The names of the manifests in a folder, sorted."""
    return tuple(
        sorted(path.stem for path in folder.glob("*.yaml") if path.is_file() and not path.name.startswith("."))
    )


def load_manifest(path: Path) -> Manifest:
    """Read a manifest. Raises ManifestError for one problem, Problems for several."""
    path = path.absolute()
    file, name = show_path(path), path.stem
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or ".." in path.name or path.suffix != ".yaml":
        fix = "name it by letters, digits and . _ -, beginning with a letter or digit, and end it with .yaml"
        raise ManifestError(f"{shorten(path.name)} cannot name a release", shorten(file), fix)
    try:
        with path.open("rb") as source:
            data = source.read(MAX_BYTES + 1)
    except FileNotFoundError:
        releases = list_releases(path.parent)
        fix = nearest(name, releases) if releases else f"write {file}"
        raise ManifestError(f"there is no release {name}", file, fix) from None
    except OSError as error:
        raise ManifestError(f"{path.name} cannot be read: {error.strerror}", file, "make it a readable file") from None
    root, problems = read_nodes(data, file)
    try:
        release = Release.model_validate(root.content)
    except ValidationError as error:
        for finding in error.errors(include_url=False):
            if finding["type"] != "too_short" or not finding["input"]:  # pydantic counts only the items that are valid
                problems.append(explain(finding, root, file))
    if len(problems) == 1:
        raise problems[0][1]
    if problems:
        raise Problems(problem for _, problem in sorted(problems, key=lambda found: found[0]))
    return Manifest(name, path, release, root)


# --- its JSON Schema --------------------------------------------------------------------------------------------------


class AsWritten(GenerateJsonSchema):
    """The schema of what people write: a text may look like a number, an optional key may be left empty."""

    def str_schema(self, schema: core_schema.StringSchema) -> JsonSchemaValue:
        return {**super().str_schema(schema), "type": ["string", "number", "boolean"]}

    def dict_schema(self, schema: core_schema.DictSchema) -> JsonSchemaValue:
        return {**super().dict_schema(schema), "additionalProperties": False}  # keys are all of one pattern

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        written = super().default_schema(schema)
        default = written.pop("default", None)
        if "anyOf" in written:
            optional: JsonSchemaValue = {"anyOf": [*written["anyOf"], {"type": "null"}]}
        elif set(written) & {"$ref", "enum", "const"}:
            optional = {"anyOf": [written, {"type": "null"}]}
        else:
            types = written["type"] if isinstance(written["type"], list) else [written["type"]]
            optional = {**written, "type": [*types, "null"]}
        return optional if default is None else {**optional, "default": default}

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


@cache
def json_schema_text() -> str:
    schema = Release.model_json_schema(schema_generator=AsWritten)
    schema = {"$schema": "http://json-schema.org/draft-07/schema#", **schema, "title": "Release manifest"}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 7) of a manifest as people write it, for editors."""
    return typing.cast(dict[str, Any], json.loads(json_schema_text()))


def check(folder: Path) -> list[BuildError]:
    """The problems of all manifests in a folder, and of the JSON Schema beside them."""
    problems: list[BuildError] = []
    for name in list_releases(folder):
        try:
            load_manifest(folder / f"{name}.yaml")
        except BuildError as problem:
            problems.append(problem)
    schema = folder / SCHEMA_FILE
    if not schema.is_file() or schema.read_text("utf-8") != json_schema_text():
        problems.append(
            BuildError(
                "the JSON Schema is not the manifest's", str(schema), "run python -m builder.manifest --write-schema"
            )
        )
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m builder.manifest", description=__doc__.splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="check releases/*.yaml and their JSON Schema")
    action.add_argument("--write-schema", action="store_true", help=f"write releases/{SCHEMA_FILE}")
    folder = Path("releases")
    if parser.parse_args().write_schema:
        write_atomic(folder / SCHEMA_FILE, json_schema_text())
        return 0
    problems = check(folder)
    print("\n".join(str(problem) for problem in problems), file=sys.stderr, end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
