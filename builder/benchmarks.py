"""Result files of guidellm, vllm bench serve or a record -> latency, throughput, queries per dollar.

A file holds loads: requests of one size, one at a time or as many as the server takes. The manifest says what was
measured, on which GPUs, at which price. Queries per dollar are 3600 / (latency x price an hour) of one stream, and
3600 x queries a second / price an hour of many; the average cost reduction is the mean, over the uses that both have,
of these divided by the base's on GPUs of the same kind.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationInfo, field_validator

from builder.errors import BuildError, raise_all
from builder.manifest import NUMBER, Benchmark, Count, HubId, Manifest, Section, Text, broken, show_path
from builder.records import Record, read_record

Size = tuple[int, int]  # prompt and output tokens of a request

PROFILES: Final[Mapping[Size, str]] = {
    (256, 128): "Instruction following",
    (512, 256): "Multi-turn chat",
    (768, 128): "Docstring generation",
    (1024, 128): "RAG",
    (256, 1024): "Code completion",
    (1024, 1024): "Code fixing",
    (4096, 512): "Large summarization",
    (10240, 1536): "Large RAG",
}
NEAR: Final = 0.02  # averages of sampled requests are this near, in proportion, to what was asked for
ASKED: Final = ("prompt_tokens", "output_tokens")  # metadata of `vllm bench serve`, which keeps no lengths of its own


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one load on a served model gave.

    size: tokens of a request, as asked for, or on average where the file does not say.
    single: requests came one at a time. latency_s: mean, from a request to its last token.
    first_token_ms: median. output_tokens_per_s: of all requests together.
    """

    size: Size
    single: bool
    latency_s: float | None = None
    requests_per_s: float | None = None
    first_token_ms: float | None = None
    output_tokens_per_s: float | None = None
    num_requests: int | None = None
    num_failed: int = 0


@dataclass(frozen=True, kw_only=True)
class Speed:
    """A result file. tool: what wrote it, with its version where it says; commands: what was run, where it says."""

    file: str
    tool: str
    model: str
    date: str
    loads: tuple[Load, ...]
    source: str = ""
    commands: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


# --- result files -----------------------------------------------------------------------------------------------------


def read_vllm_bench(path: Path) -> Speed:
    """What `vllm bench serve --save-result` wrote. Raises BuildError if it is no such file or nothing was answered."""
    content = read_json(path)
    with_keys(content, path, "vllm bench serve", "backend", "model_id", "completed", "duration", "request_throughput")
    completed, failed = content["completed"], content.get("failed", 0)
    if not completed:
        raise BuildError("no request was answered", show_path(path), "measure again, against a server that answers")
    asked = [str(content.get(key, "")) for key in ASKED]
    means = (content["total_input_tokens"] / completed, content["total_output_tokens"] / completed)
    latency_ms = content.get("mean_e2el_ms")
    single = content.get("max_concurrency") == 1
    if latency_ms is None and single:
        latency_ms = 1000 * content["duration"] / completed
    load = Load(
        size=(int(asked[0]), int(asked[1])) if all(map(str.isdecimal, asked)) else name_size(means),
        single=single,
        latency_s=None if latency_ms is None else latency_ms / 1000,
        requests_per_s=content["request_throughput"],
        first_token_ms=content.get("median_ttft_ms"),
        output_tokens_per_s=content.get("output_throughput"),
        num_requests=completed,
        num_failed=failed,
    )
    when = datetime.strptime(content["date"], "%Y%m%d-%H%M%S").date().isoformat()
    return Speed(file=show_path(path), tool="vllm bench serve", model=content["model_id"], date=when, loads=(load,))


def read_guidellm(path: Path) -> Speed:
    """What guidellm 0.8 wrote: a load for each of its benchmarks. Raises BuildError if it is no such file."""
    content = read_json(path)
    with_keys(content, path, "guidellm", "metadata", "config", "benchmarks")
    try:
        spec, found = content["config"]["spec"], content["benchmarks"]
        loads = tuple(read_strategy(benchmark, spec) for benchmark in found)
        when = datetime.fromtimestamp(found[0]["start_time"], UTC).date().isoformat()
        tool = f"guidellm {content['metadata']['guidellm_version']}"
        return Speed(file=show_path(path), tool=tool, model=str(spec["backend"]["model"]), date=when, loads=loads)
    except (KeyError, IndexError, TypeError) as error:
        what = f"{path.name} is not as guidellm 0.8 writes it: {error} is not there"
        raise BuildError(what, show_path(path), "measure with guidellm 0.8, or record the figures by hand") from None


def read_strategy(benchmark: Mapping[str, Any], spec: Mapping[str, Any]) -> Load:
    metrics = {name: metric["successful"] for name, metric in benchmark["metrics"].items() if is_split(metric)}
    data, strategy, totals = spec["data"][0], benchmark["config"]["strategy"], benchmark["metrics"]["request_totals"]
    means = (metrics["prompt_token_count"]["mean"], metrics["output_token_count"]["mean"])
    asked = [data.get(key) for key in ASKED]
    return Load(
        size=(asked[0], asked[1]) if all(asked) else name_size(means),
        single=strategy["type_"] == "synchronous" or strategy.get("max_concurrency") == 1,
        latency_s=metrics["request_latency"]["mean"],
        requests_per_s=metrics["requests_per_second"]["mean"],
        first_token_ms=metrics["time_to_first_token_ms"]["median"],
        output_tokens_per_s=metrics["output_tokens_per_second"]["mean"],
        num_requests=totals["successful"],
        num_failed=totals["errored"],
    )


def is_split(metric: object) -> bool:
    """Whether guidellm tells a metric by how its requests ended."""
    return isinstance(metric, dict) and isinstance(metric.get("successful"), dict)


def name_size(means: tuple[float, float]) -> Size:
    """The size of the profile that averages are near to, or the averages themselves, rounded."""
    for size in PROFILES:
        if all(abs(mean - asked) <= NEAR * asked for mean, asked in zip(means, size, strict=True)):
            return size
    return round(means[0]), round(means[1])


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        what = f"{path.name} cannot be read: {error.strerror}"
        raise BuildError(what, show_path(path), "give a file that is there") from None
    except ValueError as error:
        what = f"{path.name} is not JSON: {error}"
        raise BuildError(what, show_path(path), "give the file as the tool wrote it") from None


def with_keys(content: object, path: Path, tool: str, *keys: str) -> None:
    """Refuse a file that lacks what this tool always writes."""
    lacking = [key for key in keys if not isinstance(content, dict) or key not in content]
    if lacking:
        what = f"{path.name} is not a result of {tool}: it lacks {', '.join(lacking)}"
        raise BuildError(what, show_path(path), "give the file as the tool wrote it, or say tool: what wrote it")


# --- records ----------------------------------------------------------------------------------------------------------

PerSize = dict[Annotated[str, Field(pattern=r"^[1-9][0-9]*/[1-9][0-9]*$")], Annotated[float, Field(gt=0), NUMBER]]


class RecordedRun(Section):
    model: HubId
    """What was measured."""
    gpu: Text
    """The GPU it was measured on."""
    num_gpus: Count
    """Number of these GPUs."""
    latency_s: PerSize | None = None
    """Prompt/output tokens -> seconds of a request that is alone."""
    requests_per_s: Annotated[PerSize | None, Field(validate_default=True)] = None
    """Prompt/output tokens -> requests a second when there are as many as the server takes."""

    @field_validator("requests_per_s")
    @classmethod
    def require_one_kind(cls, value: dict[str, float] | None, info: ValidationInfo) -> dict[str, float] | None:
        if bool(value) == bool(info.data.get("latency_s")):
            raise broken("a run has either latency_s or requests_per_s", "write a run for each")
        return value


class RecordedSpeed(Record):
    recorded: Literal["speed"]
    """That these are measurements of speed."""
    tool: Text
    """What they were made with, with versions."""
    command: Text | None = None
    """What was run."""
    runs: Annotated[tuple[RecordedRun, ...], Field(min_length=1)]
    """A row of a table each."""


def read_recorded_speed(path: Path, model: str, gpu: str, num_gpus: int) -> Speed:
    """The loads that a record has of a model on these GPUs. Raises BuildError, or Problems, also if it has none."""
    record = read_record(path, RecordedSpeed)
    runs = [run for run in record.runs if (run.model, run.gpu, run.num_gpus) == (model, gpu, num_gpus)]
    if not runs:
        held = sorted({f"{run.num_gpus} x {run.gpu} of {run.model}" for run in record.runs})
        what = f"{path.name} has no run of {model} on {num_gpus} x {gpu}"
        raise BuildError(what, show_path(path), f"it has {', '.join(held)}: set model, measured, gpu and num_gpus so")
    loads = []
    for run in runs:
        for size, value in (run.latency_s or {}).items():
            loads.append(Load(size=read_size(size), single=True, latency_s=value))
        for size, value in (run.requests_per_s or {}).items():
            loads.append(Load(size=read_size(size), single=False, requests_per_s=value))
    return Speed(
        file=show_path(path),
        tool=record.tool,
        model=model,
        date=record.date,
        loads=tuple(loads),
        source=record.source,
        commands=(record.command,) if record.command else (),
        notes=record.notes,
    )


def read_size(text: str) -> Size:
    prompt, _, output = text.partition("/")
    return int(prompt), int(output)


# --- what it costs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One use on one machine. value: latency in s of one stream, requests a second of many; per_dollar: queries."""

    value: float
    per_dollar: float | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model on one machine. side: base, quantized, or another's Hub id; reduction, speedup: against the base."""

    side: str
    model: str
    gpu: str
    num_gpus: int
    cells: Mapping[Size, Cell]
    reduction: float | None = None
    speedup: float | None = None


@dataclass(frozen=True, kw_only=True)
class Price:
    """US dollars for an hour of all the GPUs of a machine, when and where."""

    num_gpus: int
    gpu: str
    per_hour: float
    date: str
    source: str


@dataclass(frozen=True, kw_only=True)
class SpeedTable:
    """single: one stream, latencies; else many, throughput. sizes: the columns, those of PROFILES first."""

    single: bool
    sizes: tuple[Size, ...]
    rows: tuple[Row, ...]
    prices: tuple[Price, ...]

    @property
    def fastest(self) -> Row | None:
        """Of the release's rows the one that gains most on the base, on as many GPUs of a kind."""
        rows = [row for row in self.rows if row.side == "quantized" and row.speedup]
        return max(rows, key=lambda row: row.speedup or 0, default=None)

    @property
    def price_lists(self) -> Mapping[tuple[str, str], tuple[Price, ...]]:
        """Prices by their date and source."""
        keys = dict.fromkeys((price.date, price.source) for price in self.prices)
        return {key: tuple(price for price in self.prices if (price.date, price.source) == key) for key in keys}


@dataclass(frozen=True, kw_only=True)
class Benchmarks:
    """All that a manifest's `benchmarks` say: tables, the files they come from, and how many requests failed.

    elsewhere: the models of other builds whose published figures stand for this release's.
    """

    tables: tuple[SpeedTable, ...] = ()
    sources: tuple[Speed, ...] = ()
    elsewhere: frozenset[str] = frozenset()
    failed: int = 0


def load_benchmarks(manifest: Manifest) -> Benchmarks:
    """The tables of `benchmarks`. Raises BuildError, or Problems, for files that cannot be read or used."""
    release = manifest.release
    read: list[tuple[Benchmark, Speed]] = []
    problems: list[BuildError] = []
    for place, entry in enumerate(release.benchmarks):
        try:
            read.append((entry, read_speed(manifest, entry, manifest.where("benchmarks", place, "file"))))
        except BuildError as problem:
            problems.append(problem)
    raise_all(problems)
    tables = (tabulate(manifest, read, single=single) for single in (True, False))
    sources = {(speed.file, speed.model): speed for _, speed in read}
    return Benchmarks(
        tables=tuple(table for table in tables if table.rows),
        sources=tuple(sources.values()),
        elsewhere=frozenset(
            speed.model
            for entry, speed in read
            if entry.model == "quantized" and speed.source and speed.model != release.repo
        ),
        failed=sum(load.num_failed for speed in sources.values() for load in speed.loads),
    )


def read_speed(manifest: Manifest, entry: Benchmark, where: str) -> Speed:
    path = manifest.resolve(entry.file)
    if not path.is_file():
        raise BuildError(f"there is no file {entry.file}", where, "measure first, or leave the entry out until then")
    recorded = path.suffix in (".yaml", ".yml")
    tool = entry.tool or ("recorded" if recorded else "guidellm" if "benchmarks" in read_json(path) else "vllm-bench")
    if tool == "guidellm":
        return read_guidellm(path)
    if tool == "vllm-bench":
        return read_vllm_bench(path)
    release = manifest.release
    model = {"base": release.base.model, "quantized": entry.measured or release.repo}.get(entry.model, entry.model)
    return read_recorded_speed(path, str(model), entry.gpu, entry.num_gpus)


def name_model(manifest: Manifest, entry: Benchmark, speed: Speed) -> str:
    """What a row is called: as a record says; as meant where a server gave the name, which may be any."""
    base = manifest.release.base
    meant = {"base": base.model or Path(str(base.path)).name, "quantized": manifest.release.repo}
    return speed.model if speed.source else meant.get(entry.model, entry.model)


def tabulate(manifest: Manifest, read: Sequence[tuple[Benchmark, Speed]], *, single: bool) -> SpeedTable:
    """The rows of one kind of load, GPUs in the manifest's order, the base before what is compared with it."""
    rows: dict[tuple[str, str, str, int], dict[Size, Cell]] = {}
    prices: dict[tuple[int, str, float], Price] = {}
    problems = []
    for place, (entry, speed) in enumerate(read):
        for load in speed.loads:
            value = load.latency_s if single else load.requests_per_s
            if load.single != single or value is None:
                continue
            model = name_model(manifest, entry, speed)
            cells = rows.setdefault((entry.gpu, entry.model, model, entry.num_gpus), {})
            cell = Cell(value=value, per_dollar=count_per_dollar(value, entry.price_per_hour, single=single))
            if load.size not in cells or (not single and value > cells[load.size].value):
                cells[load.size] = cell  # of many streams, the load with which the server does most
            elif single:
                what = f"{describe_size(load.size)}, one stream, is measured twice on {entry.num_gpus} x {entry.gpu}"
                problems.append(BuildError(what, manifest.where("benchmarks", place), "keep one of the files"))
            if entry.price_per_hour:
                prices[entry.num_gpus, entry.gpu, entry.price_per_hour] = Price(
                    num_gpus=entry.num_gpus,
                    gpu=entry.gpu,
                    per_hour=entry.price_per_hour,
                    date=str(entry.price_date),
                    source=str(entry.price_source),
                )
    raise_all(problems)
    found = [
        Row(side=side, model=model, gpu=gpu, num_gpus=num_gpus, cells=cells)
        for (gpu, side, model, num_gpus), cells in rows.items()
    ]
    gpus = list(dict.fromkeys(row.gpu for row in found))
    found.sort(key=lambda row: (gpus.index(row.gpu), row.side != "base"))
    sizes = {size for row in found for size in row.cells}
    columns = [*(size for size in PROFILES if size in sizes), *sorted(sizes - PROFILES.keys())]
    compared = tuple(compare_with_base(row, found, single=single) for row in found)
    return SpeedTable(single=single, sizes=tuple(columns), rows=compared, prices=tuple(prices.values()))


def compare_with_base(row: Row, rows: Sequence[Row], *, single: bool) -> Row:
    """The row with what it saves: against the base on as many GPUs of its kind, or else on the fewest the base has."""
    bases = [base for base in rows if base.side == "base" and base.gpu == row.gpu]
    if row.side == "base" or not bases:
        return row
    base = min(bases, key=lambda base: (base.num_gpus != row.num_gpus, base.num_gpus))
    shared = [(row.cells[size], base.cells[size]) for size in row.cells if size in base.cells]
    priced = [ours.per_dollar / theirs.per_dollar for ours, theirs in shared if ours.per_dollar and theirs.per_dollar]
    gains = [theirs.value / ours.value if single else ours.value / theirs.value for ours, theirs in shared]
    return replace(
        row,
        reduction=sum(priced) / len(priced) if priced else None,
        speedup=max(gains) if gains and base.num_gpus == row.num_gpus else None,
    )


def count_per_dollar(value: float, price_per_hour: float | None, *, single: bool) -> float | None:
    """Queries for a dollar, from the seconds of one or from how many there are in a second."""
    if price_per_hour is None:
        return None
    return 3600 / (value * price_per_hour) if single else 3600 * value / price_per_hour


def describe_size(size: Size) -> str:
    """`RAG, 1024 / 128`, or the numbers alone for a use without a name."""
    return ", ".join([*([PROFILES[size]] if size in PROFILES else []), f"{size[0]} / {size[1]}"])
