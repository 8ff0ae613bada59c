"""Stages as doit tasks: `STAGE:NAME` for every release, `release:NAME` for all of them in order.

Receipts are the only truth about what is done; doit's own database is kept in memory and forgotten.
"""

from __future__ import annotations

import difflib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from doit import doit_cmd
from doit.cmd_base import TaskLoader2
from doit.exceptions import InvalidCommand, TaskFailed, UnmetDependency
from doit.reporter import ConsoleReporter
from doit.task import Task
from rich.console import Console

from builder.errors import BuildError, ManifestError, nearest
from builder.manifest import Manifest, list_releases, load_manifest, show_path
from builder.stages import STAGES, Stage, Workspace, hold, is_current, run_stage
from builder.terminal import print_overview, print_plan, print_summary

RELEASES = Path("releases")
BUILD = Path("build")
RELEASE = "release"
OVERVIEW = "_overview"
INTERRUPTED = 130  # as shells have it for a command ended by Ctrl-C


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


class Loader(TaskLoader2):  # type: ignore[misc]
    """Makes the tasks from the manifests in releases/; a broken one yields tasks that say what is wrong with it."""

    def load_doit_config(self) -> dict[str, Any]:
        return {
            "default_tasks": [OVERVIEW],
            "backend": "memory",
            "reporter": Reporter,
            "verbosity": 2,
            "continue": True,
        }

    def load_tasks(self, cmd: Any, pos_args: Sequence[str]) -> list[Task]:
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
        names = [argument for argument in pos_args if not argument.startswith("-")]
        tasks = [Task(OVERVIEW, [lambda: print_overview(manifests, Console())])]
        for name, manifest in manifests.items():
            tasks += make_tasks(name, manifest, asked=set(names))
        for stage in STAGES:
            every = [f"{stage.name}:{name}" for name in manifests]
            tasks.append(
                Task(stage.name, None, task_dep=every, has_subtask=True, doc=f"{stage.title} ({stage.name}:NAME)")
            )
        if cmd.execute_tasks:
            check_names(names, [task.name for task in tasks])
        return tasks


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
        steps = [other for other in public if other.partition(":")[0] == name.partition(":")[0]]
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
    workspace = Workspace(manifest, BUILD / name)
    tasks: list[Task] = []
    for stage in STAGES:
        own = f"{stage.name}:{name}"
        shown = stage.name == "plan" and own in asked  # asked for by name, a plan is always shown
        task = Task(
            own,
            [make_action(workspace, stage, shown=shown)],
            task_dep=[tasks[-1].name] if tasks else [],
            uptodate=[make_check(workspace, stage) if not shown else False],
            targets=[str(workspace.receipt_path(stage.name))],
            subtask_of=release,
            doc=stage.title,
        )
        tasks.append(task)
    summary = Task(
        release,
        [lambda: print_summary(workspace, Console())],
        task_dep=[task.name for task in tasks],
        doc=" ".join(manifest.release.title.split()),
    )
    return [summary, *tasks]


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
        except KeyboardInterrupt:
            print("\ninterrupted; what is done is kept, and the same command goes on from here", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)  # unloading torch can take seconds
        except OSError as error:
            place = str(error.filename or workspace.folder)
            return fail(BuildError(f"{error.strerror or error}", place, "mend that, then run the same command again"))
        if shown:
            print_plan(workspace, Console())
        for line in lines:
            print(f"  {line}")
        print(f"  {time.monotonic() - started:.1f} s", flush=True)
        return None

    return act


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
