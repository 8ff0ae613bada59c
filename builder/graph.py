"""Stages as doit tasks: `STAGE:NAME` for every release, `release:NAME` for all of them in order.

Receipts are the only truth about what is done; doit's own database is kept in memory and forgotten.
"""

from __future__ import annotations

import difflib
import functools
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from doit import doit_cmd
from doit.cmd_base import TaskLoader2
from doit.exceptions import InvalidCommand, TaskFailed, UnmetDependency
from doit.reporter import ConsoleReporter
from doit.task import Task
from rich.console import Console

from builder.comparison import compare_sides, is_same, load_side
from builder.engine import is_tethered
from builder.errors import BuildError, ManifestError, nearest
from builder.files import canonical_json, write_atomic
from builder.lock import (
    ENDING,
    SIGNATURE,
    compare_versions,
    list_versions,
    name_release,
    require_lock,
    write_constraints,
)
from builder.manifest import Manifest, list_releases, load_manifest, show_path
from builder.pins import pin_manifest
from builder.published import find_place
from builder.signing import PASSWORD
from builder.stages import STAGES, Stage, Workspace, hold, is_current, run_stage
from builder.stages.benchmark import benchmark
from builder.stages.check_serving import check_serving, clean_check
from builder.stages.preview import preview
from builder.stages.relock import relock
from builder.stages.reproduce import FOLDER, clean_reproduction, compare_with_place, reproduce
from builder.stages.sign import check_signature, clean_signature, sign
from builder.stages.stage import BUILDER, clean_stage
from builder.terminal import print_diff, print_overview, print_plan, print_summary, show_bytes

RELEASES = Path("releases")
BUILD = Path("build")
RELEASE = "release"
OVERVIEW = "_overview"
ENDINGS = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "ended by SIGTERM",
    signal.SIGHUP: "ended by SIGHUP: its terminal was closed",
}
ON_REQUEST = {
    "reproduce": "build again from the lock alone, and compare every file",
    "relock": "build without regard to the lock, and write it again from that: a publisher's decision",
    "compare": "compare the lock with what was published: --with=FOLDER or --with=OWNER/NAME@COMMIT",
    "pin": "write what is open: commits of the Hub into the manifest; the versions of the lock, for pip",
    "sign": "sign a finished release: --key=PRIVATE, or SIGNING_KEY in the environment",
    "check-signature": "check every file against the signature: --public-key=PUBLIC, and --with=FOLDER if elsewhere",
}
CLEANED = {"reproduce": clean_reproduction, "sign": clean_signature}  # what requests leave, and may be taken away
CHECK = "check-serving"
CHECK_DOC = "load and serve the built artifact with a real vLLM, and judge what it reads and answers"
DIFF = "diff"
RECALIBRATE = {
    "name": "recalibrate",
    "long": "recalibrate",
    "type": bool,
    "default": False,
    "help": "calibrate again, instead of taking the recorded magnitudes",
}
WITH = {
    "name": "place",
    "long": "with",
    "type": str,
    "default": "",
    "help": "what was published: a folder, or owner/name@commit",
}
BASE = {"name": "base", "long": "base", "type": str, "default": "", "help": "where the base model is on this machine"}
KEY = {
    "name": "key",
    "long": "key",
    "type": str,
    "default": "",
    "env_var": "SIGNING_KEY",
    "help": f"a private key, PEM; if it is encrypted, its password is taken from {PASSWORD}",
}
PUBLIC_KEY = {
    "name": "public_key",
    "long": "public-key",
    "type": str,
    "default": "",
    "help": "the publisher's public key, PEM",
}
URL = {"name": "url", "long": "url", "type": str, "default": "", "help": "the server; the serve profile's if absent"}
SIZE = {"name": "size", "long": "size", "type": str, "default": "1024/128", "help": "prompt/output tokens of a request"}
PROMPTS = {"name": "prompts", "long": "prompts", "type": int, "default": 50, "help": "number of requests"}
ALONE = {"name": "single", "long": "single", "type": bool, "default": False, "help": "one request at a time"}
OF_BASE = {"name": "of_base", "long": "of-base", "type": bool, "default": False, "help": "the base is what is served"}
JSON = {"name": "as_json", "long": "json", "type": bool, "default": False, "help": "as JSON"}
MEASURING = (URL, SIZE, PROMPTS, ALONE, OF_BASE)
OPTIONS = tuple(f"--{option['long']}" for option in (RECALIBRATE, WITH, BASE, KEY, PUBLIC_KEY, JSON, *MEASURING))
VALUED = tuple(f"--{option['long']}" for option in (WITH, BASE, KEY, PUBLIC_KEY, URL, SIZE, PROMPTS))
BENCHMARK = "benchmark"
PREVIEW = "preview"
FORGETFUL = ("forget", "ignore", "reset-dep")  # doit's commands that would change its database


class Memory:
    """A doit backend that remembers nothing beyond the run."""

    desc = "in memory"

    def __init__(self, name: str, codec: Any, module_name: str | None = None) -> None:
        self.name, self.data = name, dict[str, dict[str, Any]]()

    def dump(self) -> None:
        """Nothing outlives the run."""

    def set(self, task_id: str, dependency: str, value: Any) -> None:
        self.data.setdefault(task_id, {})[dependency] = value

    def get(self, task_id: str, dependency: str) -> Any:
        return self.data.get(task_id, {}).get(dependency)

    def in_(self, task_id: str) -> bool:
        return task_id in self.data

    def remove(self, task_id: str) -> None:
        self.data.pop(task_id, None)

    def remove_all(self) -> None:
        self.data.clear()


class Reporter(ConsoleReporter):  # type: ignore[misc]
    """One line when a step begins; our own errors as they are; the steps that were up to date in one word each."""

    desc = "release builder"

    def write(self, text: str) -> None:
        print(text, end="", flush=True)

    def execute_task(self, task: Task) -> None:
        stage = task.name.partition(":")[0]
        if task.actions and stage in {stage.name for stage in STAGES}:
            self.write(f"{task.name}: {task.doc}\n")

    def skip_uptodate(self, task: Task) -> None:
        self.write(f"{task.name}: up to date\n")

    def _write_failure(self, result: dict[str, Any], write_exception: bool = True) -> None:
        failure = result["exception"]
        if isinstance(failure, UnmetDependency):
            if result["task"].name.startswith(f"{RELEASE}:"):
                self.write(f"{result['task'].name}: not finished\n")
        elif not isinstance(failure, TaskFailed):
            super()._write_failure(result, write_exception)

    def complete_run(self) -> None:
        if self.runtime_errors:
            self.write("\n".join(self.runtime_errors) + "\n")


class Step(Task):  # type: ignore[misc]
    """One stage of one release."""

    def __init__(self, workspace: Workspace, stage: Stage, links: Counter[int], **more: Any) -> None:
        """links: shared by the steps of a release, see `clean_stage`."""
        super().__init__(f"{stage.name}:{workspace.manifest.name}", doc=stage.title, **more)
        self.workspace, self.stage, self.links = workspace, stage, links

    def clean(self, outstream: Any, dryrun: bool) -> None:
        """Take away what the stage left, and its receipt; or say what that would be."""
        try:
            removed, freed = clean_stage(self.workspace, self.stage, self.links, dry_run=dryrun)
        except BuildError as error:
            raise InvalidCommand(str(error)) from error
        if removed:
            listed = ", ".join(str(path) for path in removed)
            verb = "would remove" if dryrun else "removed"
            outstream.write(f"{self.name}: {verb} {listed} ({show_bytes(freed)})\n")


class Loader(TaskLoader2):  # type: ignore[misc]
    """Makes the tasks from the manifests in releases/; a broken one yields tasks that say what is wrong with it."""

    def setup(self, opt_values: Any) -> None:
        end_on_signals()

    def load_doit_config(self) -> dict[str, Any]:
        return {
            "default_tasks": [OVERVIEW],
            "backend": "memory",
            "reporter": Reporter,
            "verbosity": 2,
            "continue": True,
            "sort": "definition",
        }

    def load_tasks(self, cmd: Any, pos_args: Sequence[str]) -> list[Task]:
        refuse_command(cmd.get_name(), pos_args)
        manifests: dict[str, Manifest | BuildError] = {}
        for path in sorted(RELEASES.glob("*.yml")):
            fix = f"rename it to {path.stem}.yaml"
            manifests[path.stem] = ManifestError(
                f"{path.name} is not read as a manifest", show_path(path.absolute()), fix
            )
        for name in list_releases(RELEASES):
            try:
                manifests[name] = load_manifest(RELEASES / f"{name}.yaml")
            except BuildError as error:
                manifests[name] = error
        names = list_tasks(pos_args)
        tasks = [Task(OVERVIEW, [lambda: print_overview(manifests, Console())])]
        for name, manifest in manifests.items():
            tasks += make_tasks(name, manifest, asked=set(names))
        for stage in STAGES:
            every = [f"{stage.name}:{name}" for name in manifests]
            tasks.append(
                Task(stage.name, None, task_dep=every, has_subtask=True, doc=f"{stage.title} ({stage.name}:NAME)")
            )
        tasks += make_checks(manifests)
        tasks += make_benchmarks(manifests)
        tasks += make_previews(manifests)
        tasks += make_requests(sorted(map(name_release, RELEASES.glob(f"*{ENDING}"))), manifests)
        if cmd.execute_tasks:
            check_options(pos_args)
        if cmd.execute_tasks or cmd.get_name() == "clean":
            check_names(names, [task.name for task in tasks])
        return tasks


def list_tasks(pos_args: Sequence[str]) -> list[str]:
    """The tasks that a command line names, without options, their values, and what `diff` compares."""
    names: list[str] = []
    for before, argument in zip(["", *pos_args], pos_args, strict=False):
        if not argument.startswith("-") and before not in VALUED:
            names.append(argument)
            if argument == DIFF:
                break
    return names


def refuse_command(command: str, names: Sequence[str]) -> None:
    """Refuse what doit could do and would not be meant."""
    if command in FORGETFUL:
        raise InvalidCommand(
            f"`doit {command}` has nothing to change: what is done is known from {BUILD}/NAME/receipts alone\n"
            "  in the command line\n"
            "  fix: delete a receipt to repeat its step; `doit clean STEP:NAME` takes away what the step left as well"
        )
    groups = {CHECK, BENCHMARK, PREVIEW} | {stage.name for stage in STAGES} | ON_REQUEST.keys()
    if command == "clean" and (not names or groups.intersection(names)):
        raise InvalidCommand(
            "`doit clean` takes a release, or one step of a release\n"
            "  in the command line\n"
            f"  fix: doit clean {RELEASE}:NAME, or doit clean {STAGES[-1].name}:NAME; --dry-run only says what would go"
        )


def check_options(arguments: Sequence[str]) -> None:
    """Refuse an option behind a task that no task takes, or a value for one that takes none."""
    for argument in arguments:
        option, equals, _ = argument.partition("=")
        if option.startswith("-") and option not in OPTIONS:
            raise InvalidCommand(f"no task takes {option}\n  in the command line\n  fix: {nearest(option, OPTIONS)}")
        if equals and option in OPTIONS and option not in VALUED:
            raise InvalidCommand(f"{option} takes no value\n  in the command line\n  fix: write {option} alone")


def check_names(asked: Sequence[str], valid: Sequence[str]) -> None:
    """Refuse what is neither a task nor an option, with the nearest name there is."""
    variables = sorted(doit_cmd._CMDLINE_VARS or {})
    if variables:
        raise InvalidCommand(
            f"tasks take no argument such as {variables[0]}=\n  fix: name a task; `doit list` shows them"
        )
    public = [name for name in valid if not name.startswith("_")]
    for name in asked:
        if name in valid:
            continue
        if f"{RELEASE}:{name}" in valid:
            name = f"{RELEASE}:{name}"
            raise InvalidCommand(f"a release alone is no task\n  in the command line\n  fix: did you mean {name}?")
        step, _, release = name.partition(":")
        steps = [other for other in public if other.partition(":")[0] == step]
        if steps and f"{RELEASE}:{release}" in valid:
            what = f"{release} has no lock, which {step} works from"
            raise InvalidCommand(f"{what}\n  in the command line\n  fix: doit {RELEASE}:{release} writes it")
        close = difflib.get_close_matches(name, public, n=1, cutoff=0.5)
        near = (
            f"did you mean {close[0]}? `doit list` shows what there is" if close else "`doit list` shows what there is"
        )
        fix = nearest(name, steps) if steps else near
        raise InvalidCommand(f"there is no task {name}\n  in the command line\n  fix: {fix}")


def make_tasks(name: str, manifest: Manifest | BuildError, asked: set[str]) -> list[Task]:
    """The tasks of one release, each depending on the one before it."""
    release = f"{RELEASE}:{name}"
    if isinstance(manifest, BuildError):
        error = manifest
        doc = "cannot be read: " + str(error).splitlines()[0]
        broken = [Task(f"{stage.name}:{name}", [lambda: fail(error)], subtask_of=release, doc=doc) for stage in STAGES]
        return [Task(release, [lambda: fail(error)], doc=doc), *broken]
    workspace, links = Workspace(manifest, BUILD / name), Counter[int]()
    tasks: list[Task] = []
    for stage in STAGES:
        shown = stage.name == "plan" and f"plan:{name}" in asked  # asked for by name, a plan is always shown
        task = Step(
            workspace,
            stage,
            links,
            actions=[make_action(workspace, stage, shown=shown)],
            task_dep=[tasks[-1].name] if tasks else [],
            uptodate=[make_check(workspace, stage) if not shown else False],
            targets=[str(workspace.receipt_path(stage.name))],
            subtask_of=release,
        )
        tasks.append(task)
    summary = Task(
        release,
        [lambda: print_summary(workspace, Console())],
        task_dep=[task.name for task in tasks],
        doc=" ".join(manifest.release.title.split()),
    )
    return [summary, *tasks]


class Request(Task):  # type: ignore[misc]
    """Something that is done with a lock or a finished release, and is no step of a build."""

    def clean(self, outstream: Any, dryrun: bool) -> None:
        """Take away what it left, and the record of it; or say what that would be."""
        verb, _, name = self.name.partition(":")
        if verb not in CLEANED:
            return
        try:
            removed, freed = CLEANED[verb](BUILD, name, dry_run=dryrun)
        except BuildError as error:
            raise InvalidCommand(str(error)) from error
        if removed:
            verb = "would remove" if dryrun else "removed"
            outstream.write(f"{self.name}: {verb} {', '.join(map(str, removed))} ({show_bytes(freed)})\n")


class ServingCheck(Task):  # type: ignore[misc]
    """A built release, checked with a real vLLM."""

    def __init__(self, name: str, workspace: Workspace, **more: Any) -> None:
        super().__init__(f"{CHECK}:{name}", subtask_of=CHECK, doc=CHECK_DOC, **more)
        self.workspace = workspace

    def clean(self, outstream: Any, dryrun: bool) -> None:
        """Take away the record and vLLM's logs; or say what that would be."""
        removed = clean_check(self.workspace, dry_run=dryrun)
        if removed:
            verb = "would remove" if dryrun else "removed"
            outstream.write(f"{self.name}: {verb} {', '.join(map(str, removed))}\n")


def make_checks(manifests: Mapping[str, Manifest | BuildError]) -> list[Task]:
    """`check-serving:NAME` for every release."""
    tasks = []
    for name, manifest in manifests.items():
        if isinstance(manifest, BuildError):
            tasks.append(Task(f"{CHECK}:{name}", [functools.partial(fail, manifest)], subtask_of=CHECK, doc=CHECK_DOC))
        else:
            workspace = Workspace(manifest, BUILD / name)
            tasks.append(ServingCheck(name, workspace, actions=[make_check_action(workspace)]))
    every = [task.name for task in tasks]
    return [*tasks, Task(CHECK, None, task_dep=every, has_subtask=True, doc=f"{CHECK_DOC} ({CHECK}:NAME)")]


def make_check_action(workspace: Workspace) -> Callable[[], TaskFailed | None]:
    def act() -> TaskFailed | None:
        name = workspace.manifest.name
        try:
            result = check_serving(workspace, functools.partial(print, flush=True))
        except BuildError as error:
            return fail(error)
        except OSError as error:
            return fail(explain_system(error, f"{CHECK}:{name}"))
        print(f"  good, in {result['seconds']} s; `doit card:{name}` puts it on the card")
        return None

    return act


def make_requests(names: Sequence[str], manifests: Mapping[str, Manifest | BuildError]) -> list[Task]:
    """The tasks that are no part of a build: what can be done with a lock, `pin`, and `diff`.

    names: of the locks there are.
    """
    tasks, every = [], {verb: list(names) for verb in ON_REQUEST} | {"pin": sorted({*names, *manifests})}
    for name in names:
        path = RELEASES / f"{name}{ENDING}"
        for verb, act, params in (
            ("reproduce", make_reproduction(path), [RECALIBRATE, WITH, BASE]),
            ("relock", make_relock(name), []),
            ("compare", make_comparison(path), [WITH]),
            ("sign", make_signing(path), [KEY]),
            ("check-signature", make_check_of_signature(path), [PUBLIC_KEY, WITH]),
        ):
            tasks.append(Request(f"{verb}:{name}", [act], params=params, subtask_of=verb, doc=ON_REQUEST[verb]))
    for name in every["pin"]:
        act_of_pin = make_pin(RELEASES / f"{name}{ENDING}", manifests.get(name))
        tasks.append(Task(f"pin:{name}", [act_of_pin], subtask_of="pin", doc=ON_REQUEST["pin"]))
    for verb, doc in ON_REQUEST.items():
        below = [f"{verb}:{name}" for name in every[verb]]
        tasks.append(Task(verb, None, task_dep=below, has_subtask=True, doc=f"{doc} ({verb}:NAME)"))
    doc = "what differs between two releases, folders, locks or Hub repositories (diff ONE TWO [--json])"
    tasks.append(Task(DIFF, [print_differences], params=[JSON], pos_arg="sides", doc=doc))
    return tasks


def make_benchmarks(manifests: Mapping[str, Manifest | BuildError]) -> list[Task]:
    """`benchmark:NAME` for every release: its speed at a server that runs."""
    doc = "measure the speed of a served release with vLLM's own benchmark, for the card"
    tasks = []
    for name, manifest in manifests.items():
        act = make_benchmark(manifest)
        tasks.append(Task(f"{BENCHMARK}:{name}", [act], params=list(MEASURING), subtask_of=BENCHMARK, doc=doc))
    every = [task.name for task in tasks]
    return [*tasks, Task(BENCHMARK, None, task_dep=every, has_subtask=True, doc=f"{doc} ({BENCHMARK}:NAME)")]


def make_benchmark(manifest: Manifest | BuildError) -> Callable[..., TaskFailed | None]:
    def act(url: str, size: str, prompts: int, single: bool, of_base: bool) -> TaskFailed | None:
        if isinstance(manifest, BuildError):
            return fail(manifest)
        workspace = Workspace(manifest, BUILD / manifest.name)
        try:
            load, entry = benchmark(workspace, url=url, size=size, num_prompts=prompts, single=single, of_base=of_base)
        except BuildError as error:
            return fail(error)
        except OSError as error:
            return fail(explain_system(error, f"{BENCHMARK}:{manifest.name}"))
        print(f"  {load.num_requests} requests answered, {load.num_failed} failed")
        print(f"  {load.requests_per_s:.4g} requests/s, {load.output_tokens_per_s:.4g} tokens/s", end="")
        print(f", {load.latency_s:.4g} s a request, first token after {load.first_token_ms:.4g} ms (median)")
        print(f"  for `benchmarks` in {show_path(manifest.path)}; say which GPUs, and their price:\n  {entry}")
        return None

    return act


def make_previews(manifests: Mapping[str, Manifest | BuildError]) -> list[Task]:
    """`preview:NAME` for every release: its card before anything is built."""
    doc = "the card as it will be, from manifest and plan alone, into build/NAME/preview"
    tasks = [
        Task(f"{PREVIEW}:{name}", [make_preview(manifest)], subtask_of=PREVIEW, doc=doc)
        for name, manifest in manifests.items()
    ]
    every = [task.name for task in tasks]
    return [*tasks, Task(PREVIEW, None, task_dep=every, has_subtask=True, doc=f"{doc} ({PREVIEW}:NAME)")]


def make_preview(manifest: Manifest | BuildError) -> Callable[[], TaskFailed | None]:
    def act() -> TaskFailed | None:
        if isinstance(manifest, BuildError):
            return fail(manifest)
        try:
            folder = preview(Workspace(manifest, BUILD / manifest.name))
        except BuildError as error:
            return fail(error)
        except OSError as error:
            return fail(explain_system(error, f"{PREVIEW}:{manifest.name}"))
        print(f"  {folder / 'README.md'}: nothing was built; {len(list(folder.iterdir()))} files in all")
        return None

    return act


def make_reproduction(path: Path) -> Callable[..., TaskFailed | None]:
    def act(recalibrate: bool, place: str, base: str) -> TaskFailed | None:
        try:
            published = find_place(place, "the command line: --with") if place else None
            result = reproduce(
                path,
                BUILD,
                recalibrate=recalibrate,
                base=Path(base) if base else None,
                original=published.folder if published else None,
            )
        except BuildError as error:
            keep_traceback(error, BUILD / FOLDER / name_release(path) / "traceback.txt")
            return fail(error)
        except OSError as error:
            return fail(explain_system(error, f"reproduce:{name_release(path)}"))
        name = name_release(path)
        print(f"  tier {result['tier']} on {result['machine_class']}: {result['text']}")
        print(f"  payload sha256 {result['payload_sha256']}, in {result['seconds']} s")
        print(f"  `doit card:{name}` puts it on the card")
        return make_comparison(path)(place) if published else None

    return act


def make_relock(name: str) -> Callable[[], TaskFailed | None]:
    def act() -> TaskFailed | None:
        try:
            relock(RELEASES / f"{name}.yaml", BUILD, tell=functools.partial(print, flush=True))
        except BuildError as error:
            keep_traceback(error, BUILD / name / "traceback.txt")
            return fail(error)
        except OSError as error:
            return fail(explain_system(error, f"relock:{name}"))
        print(f"  `git diff {RELEASES / f'{name}{ENDING}'}` shows what changed in it")
        return None

    return act


def make_comparison(path: Path) -> Callable[..., TaskFailed | None]:
    def act(place: str) -> TaskFailed | None:
        try:
            published = find_place(place, "the command line: --with")
            verdict = compare_with_place(path, published)
        except BuildError as error:
            return fail(error)
        except OSError as error:
            return fail(explain_system(error, f"compare:{name_release(path)}"))
        print(f"  {published}: all {verdict.num_files} files of the payload are the locked ones, bit for bit")
        if published.repo:
            others = verdict.num_files - verdict.by_hub
            print(f"  {verdict.by_hub} by the Hub's own sha256, {others} fetched ({show_bytes(verdict.fetched)})")
        if verdict.extra:
            print(f"  beside them: {', '.join(verdict.extra)}")
        return None

    return act


def make_pin(path: Path, manifest: Manifest | BuildError | None) -> Callable[[], TaskFailed | None]:
    """path: of the lock, where there is one. manifest: None where there is only a lock."""

    def act() -> TaskFailed | None:
        try:
            if isinstance(manifest, BuildError):
                raise manifest
            pinned = pin_manifest(manifest) if manifest else {}
            for repo, commit in pinned.items():
                print(f"  {repo}: revision {commit}, written into {RELEASES / path.name.replace(ENDING, '.yaml')}")
            if path.exists():
                print_versions(path)
            elif not pinned:
                print("  nothing is open: revisions are pinned, and there is no lock yet")
        except BuildError as error:
            return fail(error)
        return None

    return act


def print_versions(path: Path) -> None:
    """Write the versions that a lock was made with, for pip, and say how they differ from what runs now."""
    lock, name = require_lock(path), name_release(path)
    file = BUILD / FOLDER / name / "constraints.txt"
    write_atomic(file, write_constraints(lock, name, str(file)))
    changes = [str(change) for change in compare_versions(lock, list_versions(), BUILDER)]
    print(f"  {file}: its first lines say how to install them")
    print("\n".join(f"  {change}" for change in changes) or "  the environment that runs now is the lock's")


def make_signing(path: Path) -> Callable[..., TaskFailed | None]:
    name = name_release(path)

    def act(key: str) -> TaskFailed | None:
        try:
            private = require_option(key, "--key=PRIVATE, or SIGNING_KEY in the environment")
            signed = sign(path.with_name(f"{name}.yaml"), BUILD, private, os.environ.get(PASSWORD))
        except BuildError as error:
            return fail(error)
        except OSError as error:
            return fail(explain_system(error, f"sign:{name}"))
        print(f"  payload sha256 {signed['payload_sha256']}, signed: {BUILD / name / 'artifact' / SIGNATURE}")
        print(f"  the public key has sha256 {signed['key_sha256']}")
        return None

    return act


def make_check_of_signature(path: Path) -> Callable[..., TaskFailed | None]:
    def act(public_key: str, place: str) -> TaskFailed | None:
        try:
            key = require_option(public_key, "--public-key=PUBLIC")
            elsewhere = find_place(place, "the command line: --with") if place else None
            folder, sha256 = check_signature(path, BUILD, key, elsewhere)
        except BuildError as error:
            return fail(error)
        except OSError as error:
            return fail(explain_system(error, f"check-signature:{name_release(path)}"))
        print(f"  {folder}: every file of the payload is signed, by the key of sha256 {sha256}")
        return None

    return act


def require_option(value: str, option: str) -> Path:
    if not value:
        raise BuildError("there is no key", "the command line", f"name it: {option}")
    return Path(value)


def print_differences(as_json: bool, sides: Sequence[str]) -> TaskFailed | None:
    """The task `diff`, which fails when something differs, as diff(1) does: exit code 1, and nothing on stderr."""
    names = [side for side in sides or () if side != "--json"]
    try:
        if len(names) != 2:
            fix = "doit diff ONE TWO: releases, folders, locks or owner/name@commit; --json for a program"
            raise BuildError(f"diff compares two things, not {len(names)}", "the command line", fix)
        found = compare_sides(*(load_side(name, RELEASES, BUILD) for name in names))
    except BuildError as error:
        return fail(error)
    if as_json or "--json" in sides:
        print(canonical_json(found), end="")
    else:
        print_diff(found, Console())
    return None if is_same(found) else TaskFailed("they differ")


def make_check(workspace: Workspace, stage: Stage) -> Callable[[], bool]:
    return lambda: is_current(workspace, stage)


def make_action(workspace: Workspace, stage: Stage, *, shown: bool) -> Callable[[], TaskFailed | None]:
    def act() -> TaskFailed | None:
        started = time.monotonic()
        try:
            if shown and is_current(workspace, stage):
                print_plan(workspace, Console())
                return None
            with hold(workspace):
                lines = run_stage(workspace, stage)
        except BuildError as error:
            keep_traceback(error, workspace.folder / "traceback.txt")
            return fail(error)
        except OSError as error:
            return fail(explain_system(error, f"{stage.name}:{workspace.manifest.name}"))
        if shown:
            print_plan(workspace, Console())
        for line in lines:
            print(f"  {line}")
        print(f"  {time.monotonic() - started:.1f} s", flush=True)
        return None

    return act


def explain_system(error: OSError, task: str) -> BuildError:
    """What the system refused, in three lines."""
    fix = "mend that (`dmesg` tells of failing disks), then run the same command again"
    return BuildError(f"{error.strerror or error}", str(error.filename or task), fix)


def keep_traceback(error: BuildError, path: Path) -> None:
    """Write down where a worker's unforeseen failure came from, for a report; the error itself says what to do."""
    notes = getattr(error, "__notes__", [])
    if notes:
        path.write_text("\n".join(notes), "utf-8")
        print(f"(the worker's traceback is in {path})", file=sys.stderr)


def fail(error: BuildError) -> TaskFailed:
    """Say what is wrong, on standard error and without a traceback; doit then ends with exit code 1."""
    print(str(error), file=sys.stderr, flush=True)
    return TaskFailed(str(error))


@functools.cache
def end_on_signals() -> None:
    """From now on let Ctrl-C, `kill` and a closed terminal end this process within a moment, whatever it is at.

    A handler would have to wait for the main thread, which may be in a long call of a library; so a thread of its own
    is told. A signal that is ignored, as nohup has it, stays ignored.
    """
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    for number in ENDINGS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: None)
    threading.Thread(target=wait_for_the_end, args=(receiver,), daemon=True).start()


def wait_for_the_end(receiver: int) -> None:
    """End this process, and all that it started, when one of ENDINGS arrives. All that is done is on disk."""
    while (number := os.read(receiver, 1)[0]) not in ENDINGS:
        pass
    with suppress(OSError):  # the terminal may be gone
        text = f"\n{ENDINGS[signal.Signals(number)]}; what is done is kept, and the same command goes on from here\n"
        os.write(sys.stderr.fileno(), text.encode())
    descendants = find_descendants()
    sys.setswitchinterval(60)  # the main thread shall not come to report that its workers died
    for process in descendants:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    os._exit(128 + number)  # as shells have it; unloading torch can take seconds


def find_descendants() -> set[int]:
    """The processes that this one started, and those that they did, where the system tells; none that has ended.

    Without a vLLM: it ends when this process does, and takes its temporary files with it.
    """
    children: dict[int, set[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = stat.read_text("utf-8", "replace").rpartition(")")[2].split()[:2]
            if state not in "ZX" and not is_tethered(process := int(stat.parent.name)):
                children.setdefault(int(parent), set()).add(process)
    found, upcoming = set[int](), {os.getpid()}
    while upcoming:
        upcoming = set().union(*(children.get(process, set()) for process in upcoming))
        found |= upcoming
    return found
