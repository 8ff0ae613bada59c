"""What a person at a terminal sees: a plan as tables, the end of a build, the list of releases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from builder.comparison import fold_layers, is_same
from builder.differences import list_changes, show_value
from builder.licenses import LICENSES, name_warnings, tell_source, unique
from builder.manifest import Manifest, show_path
from builder.pins import find_open
from builder.stages import STAGES, Workspace

LONGEST_FILE_LIST = 12


def show_bytes(num_bytes: float) -> str:
    """Decimal units, three digits: 41.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}" if num_bytes < 100 else f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def show_count(number: int) -> str:
    """Millions or billions where that reads better: 70.6 billion."""
    for size, word in ((10**9, " billion"), (10**6, " million")):
        if number >= size:
            return f"{number / size:.1f}{word}"
    return f"{number:,}"


def print_plan(workspace: Workspace, console: Console) -> None:
    """The plan's receipt as tables."""
    plan, aside = workspace.facts("plan"), workspace.circumstances("plan")
    release = workspace.manifest.release
    numbers = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in plan["numbers"].items())
    facts = Table.grid(padding=(0, 2))
    quantized = f"{plan['scheme']}, {plan['layout']} layout, {plan['bits_per_parameter']:.2f} bits per parameter"
    for label, text in (
        ("base", f"{release.base.model or release.base.path}, {show_count(plan['num_parameters'])} parameters"),
        ("model", f"{plan['architecture']}, {plan['num_layers']} layers, {numbers}"),
        ("scheme", quantized),
        ("kept as it is", ", ".join(plan["ignore"]) or "nothing"),
        ("size", f"{show_bytes(plan['base_num_bytes'])} -> {show_bytes(plan['num_bytes'])}"),
        ("tensors", f"{plan['num_tensors']:,} in {len(plan['files'])} file{'s' * (len(plan['files']) > 1)}"),
        ("disk", f"{show_bytes(aside['disk_needed'])} needed, {show_bytes(aside['disk_free'])} free"),
        *tell_hub(workspace.manifest, plan["base_num_bytes"]),
        ("work", tell_work(aside["work"])),
        ("time", tell_time(aside["work"])),
        *tell_serving(aside["serving"]),
        *tell_licenses(workspace.manifest),
    ):
        facts.add_row(f"[bold]{label}[/]", escape(text))
    console.print(f"[bold]{escape(release.title)}[/]", highlight=False)
    console.print(facts, highlight=False)
    console.print(tabulate_shards(aside), highlight=False)
    console.print(tabulate_files(plan["files"]), highlight=False)


def tell_hub(manifest: Manifest, num_bytes: int) -> list[tuple[str, str]]:
    """What comes from the Hub, beside what the build needs; what has to be pinned before anything can be fetched."""
    rows = []
    if manifest.release.base.path is None:
        rows.append(
            ("from the Hub", f"the base, {show_bytes(num_bytes)} in the Hub's cache, unless it is there already")
        )
    if open_pins := " and ".join(f"{pin.section}.revision" for pin in find_open(manifest)):
        rows.append(("to be pinned", f"{open_pins}: `doit pin:{manifest.name}`, before anything is fetched"))
    return rows


def tell_work(work: Mapping[str, Any]) -> str:
    """All that a build reads and writes."""
    return f"{show_bytes(sum(work['read'].values()))} to read, {show_bytes(work['written'])} to write"


def tell_time(work: Mapping[str, Any]) -> str:
    """About how long the long stages take, and as which machine."""
    parts = [
        f"{show_duration(work[f'{stage}_s'])} to {stage}" for stage in ("calibrate", "quantize") if work[f"{stage}_s"]
    ]
    return f"about {' and '.join(parts)}, as on {work['rates']}"


def show_duration(seconds: float) -> str:
    """Two units: 3 h 20 min."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{max(1, round(seconds))} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 120 else f"{minutes} min"


def tell_serving(size: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Whether a profile fits its hardware, and what it could yield at most; computed, not measured."""
    if size is None:
        return []
    rows = [
        (
            "serving",
            f"{size['name']}: {show_bytes(size['weight_bytes'])} of weights in "
            f"{show_bytes(size['budget_bytes'])}, at most {show_bytes(size['pool_bytes'])} for the KV cache",
        )
    ]
    if size["pool_tokens"] is not None:
        text = f"{size['kv_bytes_per_token']:,} bytes per token: room for {size['pool_tokens']:,} tokens"
        if size["num_sequences"] is not None:
            text += f", {size['num_sequences']:,} sequences of {size['context']:,}"
        rows.append(("KV cache", text))
    for speed in size["speeds"]:
        text = f"at most {speed['at_start']:,.1f} tokens/s for one stream"
        if speed["at_context"] is not None:
            text += f", {speed['at_context']:,.1f} at {size['context']:,} tokens"
        label = f"{speed['num_devices']}, tensor parallel" if speed["tensor_parallel"] else "one device"
        rows.append((label, text if speed["fits"] else "does not fit"))
    return rows


def tell_licenses(manifest: Manifest) -> list[tuple[str, str]]:
    """What the licences of the lineage ask for; the release's name, if it breaks a rule that is acknowledged."""
    base, lineage = manifest.release.base, [LICENSES[id] for id in manifest.release.base.licenses]
    names = name_warnings(lineage, manifest.release.repo, manifest.where)
    told = (
        ("licence", [f"{law.title}: its text is {tell_source(law, base.license_files)}" for law in lineage]),
        ("on the card", [line for law in lineage for line in law.display]),
        ("in NOTICE", [line for law in lineage for line in law.notice]),
        ("terms", [line for law in lineage for line in law.conditions]),
        ("acknowledged", [warning.text for warning in names if warning.id in base.acknowledge]),
    )
    return [(label, line) for label, lines in told for line in unique(lines)]


def tabulate_shards(aside: Mapping[str, Any]) -> Table:
    """One row a shard: its layers, the quantizers it must report, the memory its worker needs."""
    table = Table(box=None, padding=(0, 2), title_justify="left")
    for column in ("shard", "layers", "weight quantizers", "memory to calibrate", "to quantize"):
        table.add_column(column, justify="right")
    for shard in aside["shards"]:
        calibrate = show_bytes(aside["calibrate_memory"]) if aside["calibrate_memory"] else "not calibrated"
        table.add_row(
            str(shard["index"] + 1),
            show_range(shard["first_layer"], shard["last_layer"]),
            str(shard["num_quantizers"]),
            calibrate,
            show_bytes(aside["quantize_memory"]),
        )
    return table


def show_range(first: int, last: int) -> str:
    """A half-open range of layers, its last one included."""
    return f"{first} to {last - 1}" if last - first > 1 else str(first)


def tabulate_files(files: Sequence[Mapping[str, Any]]) -> Table:
    """One row a file; a long list is cut in the middle."""
    table = Table(box=None, padding=(0, 2))
    table.add_column("file")
    for column in ("tensors", "size"):
        table.add_column(column, justify="right")
    shown = files if len(files) <= LONGEST_FILE_LIST else [*files[:8], None, *files[-2:]]
    for file in shown:
        if file is None:
            table.add_row(f"... {len(files) - 10} more", "", "")
        else:
            table.add_row(file["name"], f"{len(file['tensors']):,}", show_bytes(file["num_bytes"]))
    return table


def print_summary(workspace: Workspace, console: Console) -> None:
    """Where the finished release is, what was measured, what to do next."""
    measured, name = workspace.facts("perplexity"), workspace.manifest.name
    payload = workspace.facts("assemble")["payload"]
    rows = [
        ("release", f"{workspace.artifact}  ({show_bytes(sum(f['num_bytes'] for f in payload.values()))})"),
        ("card", f"{workspace.artifact / 'README.md'}"),
        ("lock", show_path(workspace.lock_path)),
        ("compared", workspace.circumstances("lock")["comparison"]),
        ("payload", f"sha256 {workspace.facts('lock')['payload_sha256']}"),
    ]
    against_lock = workspace.circumstances("calibrate").get("against_lock", {})
    if against_lock.get("num_different"):
        rows.insert(-1, ("measured", against_lock["text"]))
    if measured["measured"]:
        recovery = f"{measured['recovery_percent']:.1f} % of the base"
        rows.append(("quality", f"{recovery} (perplexity {measured['base']:.2f} -> {measured['artifact']:.2f})"))
    else:
        rows.append(("quality", "not measured: add `perplexity:` with a held-out text to the manifest"))
    if workspace.manifest.release.serve is None:
        rows.append(("serving", "no start script, no llama-swap entry: add `serve:` to the manifest for them"))
    rows.append(("next", f"less {workspace.artifact / 'README.md'}"))
    console.print(f"\n[bold]{name} is finished[/]", highlight=False)
    for label, text in rows:
        console.print(f"[bold]{label:<10}[/]{escape(text)}", highlight=False, soft_wrap=True)
    console.print()


SIGNS = {"added": "+", "removed": "-", "changed": "~"}


def print_diff(found: Mapping[str, Any], console: Console) -> None:
    """What differs between two releases, a line each; the tensors of all layers in one."""

    def tell(text: str) -> None:
        console.print(escape_lines(text), highlight=False, soft_wrap=True)

    tell(f"{found['one']} -> {found['two']}")
    for section, spell in (("sizes", show_bytes), ("figures", "{:.6g}".format)):
        if any(found.get(section, {}).values()):
            tell(section)
        for kind, name, (one, two) in list_changes(found.get(section) or {"removed": {}, "added": {}, "changed": {}}):
            tell(f"  {SIGNS[kind]} {name}: {' -> '.join(spell(value) for value in (one, two) if value is not None)}")
    tensors = found.get("tensors", {"num_tensors": [0, 0], "moved": 0})
    if any(tensors.get(kind) for kind in SIGNS) or tensors["moved"]:
        moved = f", {tensors['moved']} in another file" if tensors["moved"] else ""
        tell(f"tensors: {tensors['num_tensors'][0]:,} -> {tensors['num_tensors'][1]:,}{moved}")
        for kind, sign in SIGNS.items():
            for (name, change), count in fold_layers(tensors[kind]).items():
                tell(f"  {sign} {name}: {change}" + (f" ({count} of them)" if count > 1 else ""))
    lock = found.get("lock", {})
    for name, numbers in (("scales", found.get("scales", {})), ("statistics in the locks", lock.get("amax", {}))):
        if numbers.get("changed"):
            count, largest = len(numbers["changed"]), 100 * numbers.get("largest_relative", 0)
            tell(f"{name}: {count} differ, by {largest:.3g} % at most")
    parts = {f"{part} in the locks": changes for part, changes in lock.items() if part != "amax"}
    for name, changes in {**found.get("configs", {}), **parts}.items():
        tell(name)
        for kind, key, (one, two) in list_changes(changes):
            values = {"added": (two,), "removed": (one,), "changed": (one, two)}[kind]
            shown = " -> ".join(map(show_value, values))
            tell(f"  {SIGNS[kind]} {key or 'all of it'}: {shown}")
    if is_same(found):
        tell("nothing differs in what was compared")
    for text in found["not_compared"]:
        tell(f"not compared: {text}")


def print_overview(manifests: Mapping[str, Manifest | Exception], console: Console) -> None:
    """The releases there are, the steps each takes, how to begin."""
    console.print("[bold]Releases[/] (doit release:NAME builds one)", highlight=False)
    for name, manifest in manifests.items():
        title = manifest.release.title if isinstance(manifest, Manifest) else "cannot be read: see doit release:" + name
        console.print(f"  release:{name}  {escape(title)}", highlight=False, soft_wrap=True)
    if not manifests:
        console.print("  none yet: write releases/NAME.yaml", highlight=False)
    console.print("\n[bold]Steps[/], in order (doit STEP:NAME goes as far as that step)", highlight=False)
    for stage in STAGES:
        console.print(f"  {stage.name:<12}{stage.title}", highlight=False)
    console.print("\nNothing was built. `doit list --all` shows every task.", highlight=False)


def escape_lines(text: str) -> str:
    """The same, its indent kept."""
    return text[: len(text) - len(text.lstrip())] + escape(text)


def escape(text: str) -> str:
    """Text that rich prints as it is."""
    from rich.markup import escape as escape_markup

    return escape_markup(" ".join(text.split()))
