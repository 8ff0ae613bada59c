"""Results of lm_eval, or records of published ones, for base and artifact -> tables of scores with their recovery.

Two scores are compared only where they come from the same test: same version of the task, same number of examples in
the prompt, same samples, same chat template. Recovery is the artifact's score over the base's, or the other way round
where less is better. It is withheld only where there is no ratio: over a base of zero, or where one side was not
measured. Small bases give recoveries that swing widely; they are shown all the same, for what hides them hides losses.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from builder.errors import BuildError, ManifestError, nearest, raise_all
from builder.manifest import NUMBER, WHOLE, Count, Evaluation, HubId, Manifest, Section, Switch, Text, show_path
from builder.records import Record, read_record

# Metrics that lm_eval gives as fractions of one; all others are shown as they are.
FRACTION: Final = re.compile(r"(.*_)?(acc|exact_match|em|f1|pass(@|_at_)\d+|mc[12])(_norm|_mutual_info|_bytes)?")
LM_EVAL_KEYS: Final = ("results", "configs", "versions", "n-shot", "n-samples", "higher_is_better", "config")


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one task. value, stderr: in percent where `percent`.

    test: what makes it comparable, by name, as far as the file says: version, shots, samples, hash of the prompts.
    """

    task: str
    metric: str
    value: float
    stderr: float | None = None
    percent: bool = True
    higher_is_better: bool = True
    test: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Results:
    """A file of results. tables: scores by heading; setting: what holds for all of them, as far as the file says."""

    file: str
    tool: str
    model: str
    date: str
    tables: Mapping[str, tuple[Score, ...]]
    setting: Mapping[str, Any] = field(default_factory=dict)
    commands: tuple[str, ...] = ()
    source: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """A metric on both sides; a side is None if it was not measured, the recovery, in percent, if there is no ratio."""

    label: str
    base: Score | None
    quantized: Score | None
    recovery: float | None


@dataclass(frozen=True, kw_only=True)
class Average:
    """Means of the scores in percent that both sides have; recovery: the ratio of the means."""

    base: float
    quantized: float
    recovery: float | None


@dataclass(frozen=True, kw_only=True)
class AccuracyTable:
    """average: None where there are fewer than two scores to average, or where a task is in the table twice."""

    name: str
    rows: tuple[Row, ...]
    average: Average | None


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """All that a manifest's `evaluation` says. hub: entries of `.eval_results/` as the Hub reads them."""

    tables: tuple[AccuracyTable, ...] = ()
    base: tuple[Results, ...] = ()
    quantized: tuple[Results, ...] = ()
    hub: tuple[dict[str, Any], ...] = ()


# --- lm_eval ----------------------------------------------------------------------------------------------------------


def read_lm_eval(path: Path, name: str = "", metrics: Mapping[str, str] | None = None) -> Results:
    """A result file of lm_eval 0.4; of a group of tasks the group alone, for it sums them up.

    name: heading of its table. metrics: task -> its one metric that is taken, `metric` or `metric,filter`.
    Raises BuildError if it is no such file, or has no such metric.
    """
    file = show_path(path)
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BuildError(f"{path.name} cannot be read: {error}", file, "give lm_eval's results_TIME.json") from None
    lacking = [key for key in LM_EVAL_KEYS if not isinstance(content, dict) or key not in content]
    if lacking:
        what = f"{path.name} is not a result of lm_eval: it lacks {', '.join(lacking)}"
        raise BuildError(what, file, "give lm_eval's results_TIME.json, or a record ending in .yaml")
    grouped = {task for tasks in content.get("group_subtasks", {}).values() for task in tasks}
    tasks = [task for task in content["results"] if task not in grouped]
    scores = tuple(score for task in tasks for score in read_task(content, task, (metrics or {}).get(task), file))
    config = content["config"]
    version = content.get("lm_eval_version")
    return Results(
        file=file,
        tool=f"lm_eval {version}" if version else "lm_eval",
        model=str(content.get("model_name") or config.get("model")),
        date=datetime.fromtimestamp(content["date"], UTC).date().isoformat() if content.get("date") else "",
        tables={name or "Tasks": scores},
        setting={
            "chat template": content.get("chat_template_sha"),
            "system instruction": content.get("system_instruction_sha"),
            "few-shot as turns of a chat": content.get("fewshot_as_multiturn") or None,
            "limit": config.get("limit"),
            "generation settings": config.get("gen_kwargs") or None,
        },
        commands=(spell_command(content, tasks),),
    )


def read_task(content: Mapping[str, Any], task: str, chosen: str | None, file: str) -> Iterator[Score]:
    found = content["results"][task]
    names = [key for key, value in found.items() if "," in key and "_stderr," not in key and is_number(value)]
    if chosen is not None:
        names = [name for name in names if chosen in (name, name.partition(",")[0])] or [""]
    for key in names:
        metric, _, filter_name = key.partition(",")
        if not metric:
            there = [key.removesuffix(",none") for key in found if "," in key and "_stderr," not in key]
            raise BuildError(f"{task} has no metric {chosen}", file, nearest(str(chosen), there))
        percent = FRACTION.fullmatch(metric) is not None
        stderr = found.get(f"{metric}_stderr,{filter_name}")
        yield Score(
            task=str(found.get("alias", task)).strip(" -"),
            metric=metric if filter_name == "none" else f"{metric}, {filter_name}",
            value=found[key] * (100 if percent else 1),
            stderr=stderr * (100 if percent else 1) if is_number(stderr) else None,
            percent=percent,
            higher_is_better=content["higher_is_better"].get(task, {}).get(metric, True) is not False,
            test=describe_test(content, task),
        )


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def list_leaves(content: Mapping[str, Any], task: str) -> list[str]:
    """The tasks of a group, those of its groups too; a task alone is its own."""
    members = content.get("group_subtasks", {}).get(task, [])
    return [leaf for member in members for leaf in list_leaves(content, member)] or [task]


def describe_test(content: Mapping[str, Any], task: str) -> dict[str, Any]:
    """What decides whether two scores of a task are of the same test; of a group, from all of its tasks."""
    leaves = sorted(list_leaves(content, task))
    hashes = content.get("task_hashes") or {}

    def gather(key: str) -> Any:
        values = [content[key].get(leaf) for leaf in leaves]
        return (
            values[0] if len({json.dumps(value) for value in values}) == 1 else dict(zip(leaves, values, strict=True))
        )

    version = gather("versions")
    test = {
        "version": version if isinstance(version, dict) else str(version),
        "shots": gather("n-shot"),
        "samples": sum(content["n-samples"][leaf]["effective"] for leaf in leaves),
    }
    if all(leaf in hashes for leaf in leaves):  # lm_eval takes them only of models it runs itself
        test["prompts"] = [hashes[leaf] for leaf in leaves]
    return test


def spell_command(content: Mapping[str, Any], tasks: Sequence[str]) -> str:
    """The command line that gives such a file, from the settings in it."""
    config, shots = content["config"], set(content["n-shot"].values())
    arguments = config.get("model_args") or {}
    if isinstance(arguments, Mapping):
        arguments = ",".join(f"{key}={value}" for key, value in arguments.items())
    generation = config.get("gen_kwargs") or {}
    if isinstance(generation, Mapping):
        generation = ",".join(f"{key}={value}" for key, value in generation.items())
    options = {
        "model": config.get("model"),
        "model_args": arguments,
        "tasks": ",".join(tasks),
        "num_fewshot": shots.pop() if len(shots) == 1 else None,
        "batch_size": config.get("batch_size"),
        "limit": config.get("limit"),
        "gen_kwargs": generation,
        "system_instruction": content.get("system_instruction"),
    }
    words = ["lm_eval"]
    for option, value in options.items():
        words += [f"--{option}", str(value)] if value not in (None, "") else []
    words += ["--apply_chat_template"] if content.get("chat_template_sha") else []
    words += ["--fewshot_as_multiturn"] if content.get("fewshot_as_multiturn") else []
    return shlex.join(words)


# --- records ----------------------------------------------------------------------------------------------------------


class RecordedScore(Section):
    task: Text
    """The test."""
    metric: Text
    """What was counted."""
    value: Annotated[float, NUMBER]
    """The score, in percent where less is not better."""
    stderr: Annotated[float, Field(ge=0), NUMBER] | None = None
    """Its standard error."""
    shots: Annotated[int, Field(ge=0), WHOLE] | None = None
    """Examples in the prompt."""
    samples: Count | None = None
    """Number of questions."""
    version: Text | None = None
    """Version of the task."""
    higher_is_better: Switch = True
    """False for perplexities and the like."""


class RecordedTable(Section):
    name: Text
    """Heading."""
    command: Text | None = None
    """What was run."""
    scores: Annotated[tuple[RecordedScore, ...], Field(min_length=1)]
    """The rows."""


class RecordedAccuracy(Record):
    recorded: Literal["accuracy"]
    """That these are scores."""
    model: HubId
    """What was evaluated."""
    tables: Annotated[tuple[RecordedTable, ...], Field(min_length=1)]
    """Scores by heading."""


def read_recorded_accuracy(path: Path) -> Results:
    """A record of published scores. Raises BuildError, or Problems, for one that cannot be read."""
    record = read_record(path, RecordedAccuracy)
    tables = {}
    for table in record.tables:
        tables[table.name] = tuple(
            Score(
                task=score.task,
                metric=score.metric,
                value=score.value,
                stderr=score.stderr,
                percent=score.higher_is_better,
                higher_is_better=score.higher_is_better,
                test={
                    key: value
                    for key in ("version", "shots", "samples")
                    if (value := getattr(score, key)) is not None  # unknown is no difference
                },
            )
            for score in table.scores
        )
    return Results(
        file=show_path(path),
        tool="recorded",
        model=record.model,
        date=record.date,
        tables=tables,
        commands=tuple(table.command for table in record.tables if table.command),
        source=record.source,
        notes=record.notes,
    )


# --- base against artifact --------------------------------------------------------------------------------------------


def load_evaluations(manifest: Manifest) -> Accuracy:
    """The tables of `evaluation`. Raises BuildError, or Problems, for what cannot be read or may not be compared."""
    tables: list[AccuracyTable] = []
    sides: tuple[list[Results], list[Results]] = ([], [])
    hub: list[dict[str, Any]] = []
    problems: list[BuildError] = []
    for place, entry in enumerate(manifest.release.evaluation):
        try:
            base, quantized = (read_side(manifest, place, entry, side) for side in ("base", "quantized"))
            where = manifest.where("evaluation", place, "quantized")
            found = compare(base, quantized, where)
            hub += describe_for_hub(manifest, place, entry, quantized)
        except BuildError as problem:
            problems.append(problem)
            continue
        tables += found
        for results, side in zip((base, quantized), sides, strict=True):
            side.append(results)
    raise_all(problems)
    return Accuracy(tables=tuple(tables), base=tuple(sides[0]), quantized=tuple(sides[1]), hub=tuple(hub))


def read_side(manifest: Manifest, place: int, entry: Evaluation, side: str) -> Results:
    where, name = manifest.where("evaluation", place, side), str(getattr(entry, side))
    path = manifest.resolve(name)
    if not path.is_file():
        raise ManifestError(f"there is no file {name}", where, "evaluate first, or leave the entry out until then")
    if path.suffix not in (".yaml", ".yml"):
        return read_lm_eval(path, entry.name or "", entry.metrics)
    results, model = read_recorded_accuracy(path), manifest.release.base.model
    if side == "base" and model and results.model != model:
        raise ManifestError(f"{name} has scores of {results.model}", where, f"record those of the base, {model}")
    return results


def compare(base: Results, quantized: Results, where: str) -> list[AccuracyTable]:
    """The two sides' tables, row by row, in the base's order. Raises BuildError, or Problems, for unlike tests."""
    problems = list_differences("all tasks", base.setting, quantized.setting, where)
    names = list(dict.fromkeys([*base.tables, *quantized.tables]))
    tables = []
    for name in names:
        ours, theirs = (index_scores(results, name, where) for results in (quantized, base))
        rows = []
        for key in dict.fromkeys([*theirs, *ours]):
            one, other = theirs.get(key), ours.get(key)
            if one and other:
                problems |= list_differences(key[0], one.test, other.test, where)
            rows.append(Row(label=label_score(one or other), base=one, quantized=other, recovery=recover(one, other)))
        tables.append(AccuracyTable(name=name, rows=tuple(rows), average=average_rows(rows)))
    raise_all(list(problems.values()))
    return tables


def index_scores(results: Results, table: str, where: str) -> dict[tuple[str, str], Score]:
    found: dict[tuple[str, str], Score] = {}
    for score in results.tables.get(table, ()):
        if (score.task, score.metric) in found:
            what = f"{table} has {score.task} ({score.metric}) twice in {results.file}"
            raise BuildError(what, where, "keep one of them, or name their metrics apart")
        found[score.task, score.metric] = score
    return found


def list_differences(
    what: str, base: Mapping[str, Any], quantized: Mapping[str, Any], where: str
) -> dict[tuple[str, str], BuildError]:
    """A refusal for each thing that both sides know and that is not the same."""
    found = {}
    for key in base:
        if key in quantized and base[key] != quantized[key]:
            sides = f"{key} {shorten(base[key])} for the base, {shorten(quantized[key])} for the artifact"
            fix = f"evaluate both with the same {key}: as they are, their scores say nothing of each other"
            found[what, key] = BuildError(f"{what}: {sides}", where, fix)
    return found


def shorten(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def label_score(score: Score | None) -> str:
    """`ARC-Challenge (Acc-Norm, 25-shot)`; less is better where it says so."""
    assert score
    shots = score.test.get("shots")
    notes = [score.metric, *([f"{shots}-shot"] if isinstance(shots, int) else [])]
    return f"{score.task} ({', '.join(notes + ([] if score.higher_is_better else ['less is better']))})"


def recover(base: Score | None, quantized: Score | None) -> float | None:
    """Recovery in percent, None where there is no ratio."""
    if not base or not quantized:
        return None
    over, under = (quantized, base) if base.higher_is_better else (base, quantized)
    return 100 * over.value / under.value if under.value > 0 else None


def average_rows(rows: Sequence[Row]) -> Average | None:
    pairs = [(row.base, row.quantized) for row in rows if row.base and row.quantized and row.base.percent]
    tasks = Counter(base.task for base, _ in pairs)
    if len(pairs) < 2 or max(tasks.values()) > 1:
        return None
    base = sum(score.value for score, _ in pairs) / len(pairs)
    quantized = sum(score.value for _, score in pairs) / len(pairs)
    return Average(base=base, quantized=quantized, recovery=100 * quantized / base if base > 0 else None)


# --- for the Hub ------------------------------------------------------------------------------------------------------


def describe_for_hub(manifest: Manifest, place: int, entry: Evaluation, quantized: Results) -> Iterator[dict[str, Any]]:
    """The artifact's scores that `hub` names, in the form of `.eval_results/`; never those of another build."""
    release = manifest.release
    for number, told in enumerate(entry.hub):
        where = manifest.where("evaluation", place, "hub", number)
        if quantized.source and quantized.model != release.repo:
            what = f"{told.task} was measured on {quantized.model}, not on {release.repo}"
            raise ManifestError(what, where, "evaluate this release, or leave out hub")
        every = [score for scores in quantized.tables.values() for score in scores]
        scores = [score for score in every if score.task == told.task and is_metric(score, told.metric)]
        if len(scores) != 1:
            what = f"{len(scores)} scores are of {told.task}{f' by {told.metric}' if told.metric else ''}"
            found = "; ".join(f"task: {score.task}, metric: {score.metric}" for score in every)
            raise ManifestError(what, where, f"name one of these: {found}")
        shots = scores[0].test.get("shots")
        yield {
            "dataset": {"id": told.dataset, "task_id": told.task_id}
            | ({"revision": told.revision} if told.revision else {}),
            "value": round(scores[0].value, 4),
            **({"date": quantized.date} if quantized.date else {}),
            "source": {"url": f"https://huggingface.co/{release.repo}", "name": "Model card"},
            "notes": ", ".join(
                [quantized.tool, scores[0].metric, *([f"{shots}-shot"] if isinstance(shots, int) else [])]
            ),
        }


def is_metric(score: Score, asked: str | None) -> bool:
    """Whether a score's metric is the one that is asked for, with its filter or without."""
    parts = [part.strip() for part in (asked or score.metric).split(",")]
    return [part.strip() for part in score.metric.split(",")][: len(parts)] == parts
