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
from collections.abc import Callable, Sequence
from contextlib import suppress
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
from builder.stages.stage import clean_stage
from builder.terminal import print_overview, print_plan, print_summary, show_bytes

RELEASES = Path("releases")
BUILD = Path("build")
RELEASE = "release"
OVERVIEW = "_overview"
ENDINGS = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "ended by SIGTERM",
    signal.SIGHUP: "ended by SIGHUP: its terminal was closed",
}
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
        names = [argument for argument in pos_args if not argument.startswith("-")]
        tasks = [Task(OVERVIEW, [lambda: print_overview(manifests, Console())])]
        for name, manifest in manifests.items():
            tasks += make_tasks(name, manifest, asked=set(names))
        for stage in STAGES:
            every = [f"{stage.name}:{name}" for name in manifests]
            tasks.append(
                Task(stage.name, None, task_dep=every, has_subtask=True, doc=f"{stage.title} ({stage.name}:NAME)")
            )
        if cmd.execute_tasks or cmd.get_name() == "clean":
            check_names(names, [task.name for task in tasks])
        return tasks


def refuse_command(command: str, names: Sequence[str]) -> None:
    """Refuse what doit could do and would not be meant."""
    if command in FORGETFUL:
        raise InvalidCommand(
            f"`doit {command}` has nothing to change: what is done is known from {BUILD}/NAME/receipts alone\n"
            "  in the command line\n"
            "  fix: delete a receipt to repeat its step; `doit clean STEP:NAME` takes away what the step left as well"
        )
    if command == "clean" and (not names or {stage.name for stage in STAGES}.intersection(names)):
        raise InvalidCommand(
            "`doit clean` takes a release, or one step of a release\n"
            "  in the command line\n"
            f"  fix: doit clean {RELEASE}:NAME, or doit clean {STAGES[-1].name}:NAME; --dry-run only says what would go"
        )


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
            place = str(error.filename or f"{stage.name}:{workspace.manifest.name}")
            fix = "mend that (`dmesg` tells of failing disks), then run the same command again"
            return fail(BuildError(f"{error.strerror or error}", place, fix))
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
    """The processes that this one started, and those that they did, where the system tells; none that has ended."""
    children: dict[int, set[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = stat.read_text("utf-8", "replace").rpartition(")")[2].split()[:2]
            if state not in "ZX":
                children.setdefault(int(parent), set()).add(int(stat.parent.name))
    found, upcoming = set[int](), {os.getpid()}
    while upcoming:
        upcoming = set().union(*(children.get(process, set()) for process in upcoming))
        found |= upcoming
    return found
