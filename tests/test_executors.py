"""What every executor promises, and what each promises beyond that."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import executor_work
import psutil
import pytest
from conftest import hear_signals

from builder.errors import ExecutorError, ManifestError, Problems
from builder.executors import EXECUTORS, Executor, make_executor
from builder.executors.in_process import InProcess
from builder.executors.processes import Processes

RAY_GROUP = pytest.mark.xdist_group("ray")
Make = Callable[[int], Executor]


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    from ray.cluster_utils import Cluster

    quick = {"prestart_worker_first_driver": False}  # each of our jobs starts a worker anyway
    node = {"num_cpus": 1, "object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False, "_system_config": quick})
    for _ in range(2):
        cluster.add_node(wait=False, **node)
    cluster.wait_for_nodes()
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(params=["in_process", "processes", pytest.param("ray", marks=RAY_GROUP)])
def make(request: pytest.FixtureRequest) -> Make:
    """Makes an executor of the kind under test with so many workers."""
    if request.param != "ray":
        return lambda num_workers: make_executor(request.param, num_workers=num_workers)
    address = request.getfixturevalue("ray_address")
    return lambda num_workers: make_ray(num_workers, address)


@pytest.fixture(params=["processes", pytest.param("ray", marks=RAY_GROUP)])
def make_elsewhere(request: pytest.FixtureRequest) -> Make:
    """The same for the kinds that run jobs side by side in other processes."""
    if request.param == "processes":
        return Processes
    address = request.getfixturevalue("ray_address")
    return lambda num_workers: make_ray(num_workers, address)


def make_ray(num_workers: int, address: str | None) -> Executor:
    from builder.executors.ray import Ray

    return Ray(num_workers, address)


def numbered(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"number": number, **more} for number in range(count)]


def wait_until(condition: Callable[[], bool], timeout_s: float = 10) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def is_running(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def read_pids(folder: Path) -> list[int]:
    return [int(pid) for file in sorted(folder.glob("*.pids")) for pid in file.read_text().split()]


# What every executor promises


def test_every_job_gives_its_record_exactly_once_with_more_jobs_than_workers(make: Make) -> None:
    records = list(make(2).run(executor_work.square, numbered(3)))
    assert sorted(records, key=lambda record: record[0]) == [
        (number, {"number": number, "square": number**2}) for number in range(3)
    ]


def test_no_jobs_give_no_records(make: Make) -> None:
    assert list(make(2).run(executor_work.square, [])) == []


def test_work_sees_a_copy_of_its_job_as_json_gives_it_back(make: Make) -> None:
    job = {"layers": (0, 41), "title": "größer — 模型"}
    assert list(make(1).run(executor_work.echo, [job])) == [
        (0, {"layers": [0, 41], "title": "größer — 模型", "seen": True})
    ]
    assert job == {"layers": (0, 41), "title": "größer — 模型"}


def test_a_build_error_from_work_arrives_as_it_was_raised(make: Make) -> None:
    with pytest.raises(Problems) as caught:
        list(make(1).run(executor_work.find_problems, numbered(1)))
    first, second = caught.value.problems
    assert type(first) is type(second) is ManifestError
    assert (first.what, first.where, first.fix) == ("one", "here", "so")


def test_any_other_exception_names_the_job_and_keeps_the_traceback(make: Make) -> None:
    with pytest.raises(ExecutorError) as caught:
        list(make(1).run(executor_work.divide_by_zero, [{"number": 1}, {"number": 0}]))
    assert str(caught.value) == (
        "ZeroDivisionError: division by zero\n"
        '  in job 2 of 2, executor_work:divide_by_zero: {"number": 0}\n'
        "  fix: mend what the message names, then run the same command again; if it names nothing, report the traceback"
    )
    assert 'return {"quotient": 1 / job["number"]}' in "".join(caught.value.__notes__)


def test_a_record_that_is_not_json_is_refused(make: Make) -> None:
    with pytest.raises(ExecutorError) as caught:
        list(make(1).run(executor_work.give_path, numbered(1)))
    assert caught.value.what == (
        "the record of executor_work:give_path is not JSON: Object of type PosixPath is not JSON serializable"
    )


@pytest.mark.parametrize("value", [Path("x"), math.nan, {1, 2}])
@pytest.mark.parametrize("name", sorted(EXECUTORS))
def test_a_job_that_is_not_json_is_refused_before_anything_runs(name: str, value: Any) -> None:
    with pytest.raises(ExecutorError, match=r"(?s)is not JSON: .*in job 2 of 2, executor_work:echo"):
        make_executor(name, num_workers=1).run(executor_work.echo, [{}, {"value": value}])


@pytest.mark.parametrize("name", sorted(EXECUTORS))
def test_work_that_a_worker_cannot_import_is_refused_before_anything_runs(name: str) -> None:
    with pytest.raises(ExecutorError, match="cannot be imported by a worker"):
        make_executor(name, num_workers=1).run(lambda job: job, [{}])


def test_an_unknown_executor_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(ExecutorError) as caught:
        make_executor("process", num_workers=1)
    assert str(caught.value) == (
        "unknown executor 'process'\n  fix: did you mean processes? Valid: in_process, processes, ray"
    )


def test_no_workers_are_refused() -> None:
    with pytest.raises(ExecutorError, match="0 workers"):
        make_executor("processes", num_workers=0)


def test_ray_is_imported_only_by_its_own_executor() -> None:
    code = (
        "import sys; from builder.executors import make_executor as make; import builder.executors.processes\n"
        "make('in_process', num_workers=1); make('processes', num_workers=1); print('ray' in sys.modules)\n"
        "make('ray', num_workers=1); print('ray' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["False", "True"]


def test_in_process_does_a_job_only_when_its_record_is_asked_for(tmp_path: Path) -> None:
    records = InProcess().run(executor_work.meet, numbered(2, folder=str(tmp_path), expected=1))
    assert list(tmp_path.iterdir()) == []
    assert next(records)[1]["pid"] == os.getpid()
    assert [file.name for file in tmp_path.iterdir()] == ["0"]


# What the executors with other processes promise


def test_jobs_run_at_the_same_time_in_processes_of_their_own(make_elsewhere: Make, tmp_path: Path) -> None:
    jobs = numbered(2, folder=str(tmp_path), expected=2)
    pids = {record["pid"] for _, record in make_elsewhere(2).run(executor_work.meet, jobs)}
    assert len(pids) == 2
    assert os.getpid() not in pids


def test_a_record_arrives_while_other_jobs_still_run(make_elsewhere: Make, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    records = make_elsewhere(2).run(
        executor_work.wait_for_file, [{"number": 0, "awaits": str(gate)}, {"number": 1, "awaits": None}]
    )
    assert next(records) == (1, {"number": 1})
    gate.touch()
    assert list(records) == [(0, {"number": 0})]


def test_the_first_failure_stops_what_runs_and_hands_out_nothing_more(make_elsewhere: Make, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="97 shards"):
        list(make_elsewhere(2).run(executor_work.refuse_the_second, numbered(3, folder=str(tmp_path))))
    worker, _ = read_pids(tmp_path)
    assert wait_until(lambda: not is_running(worker))
    assert [file.name for file in tmp_path.iterdir()] == ["0.pids"]


def test_closing_the_iterator_stops_the_workers(make_elsewhere: Make, tmp_path: Path) -> None:
    records = make_elsewhere(2).run(executor_work.mark_and_sleep_unless_first, numbered(2, folder=str(tmp_path)))
    assert next(records) == (0, {})
    assert isinstance(records, Generator)
    records.close()
    worker, _ = read_pids(tmp_path)
    assert wait_until(lambda: not is_running(worker))


@contextlib.contextmanager
def builder_running(make: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A builder of its own, whose two workers (and the processes they started) have left their ids in `folder`."""
    code = (
        f"import executor_work; jobs = [{{'number': n, 'folder': {str(folder)!r}}} for n in range(2)]\n"
        f"{make}; list(executor.run(executor_work.mark_and_sleep, jobs))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    builder = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_signals,
    )
    try:
        assert wait_until(lambda: len(read_pids(folder)) == 4, timeout_s=30)
        assert all(is_running(pid) for pid in read_pids(folder))
        yield builder
    finally:
        for pid in [builder.pid, *read_pids(folder)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        builder.communicate()


def test_ctrl_c_ends_the_workers_and_all_they_started_at_once(tmp_path: Path) -> None:
    make = "from builder.executors.processes import Processes; executor = Processes(2)"
    with builder_running(make, tmp_path) as builder:
        os.killpg(builder.pid, signal.SIGINT)
        _, errors = builder.communicate(timeout=5)
        assert builder.returncode == -signal.SIGINT
        assert errors.count("KeyboardInterrupt") == 1
        assert wait_until(lambda: not any(is_running(pid) for pid in read_pids(tmp_path)), timeout_s=1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_do_not_outlive_a_builder_that_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    make = "from builder.executors.processes import Processes; executor = Processes(2)"
    with builder_running(make, tmp_path) as builder:
        builder.send_signal(number)
        assert wait_until(lambda: not any(is_running(pid) for pid in read_pids(tmp_path)[::2]), timeout_s=2)


@RAY_GROUP
def test_tasks_do_not_outlive_a_builder_that_is_killed(tmp_path: Path, ray_address: str) -> None:
    make = f"from builder.executors.ray import Ray; executor = Ray(2, {ray_address!r})"
    with builder_running(make, tmp_path) as builder:
        builder.kill()
        assert wait_until(lambda: not any(is_running(pid) for pid in read_pids(tmp_path)[::2]))


# Processes


@pytest.mark.parametrize(
    ("number", "what", "fix"),
    [
        (
            signal.SIGKILL,
            r"SIGKILL, at 0\.\d GB, though not by the system's out-of-memory killer",
            "if a guard against running out of memory did it, use fewer workers; then run the same command again",
        ),
        (signal.SIGSEGV, "SIGSEGV", "run the same command again; if it dies again, EXECUTOR=in_process shows where"),
    ],
)
def test_a_killed_worker_is_reported_by_its_job_and_signal(number: signal.Signals, what: str, fix: str) -> None:
    with pytest.raises(ExecutorError) as caught:
        list(Processes(2).run(executor_work.die, [{"signal": int(number)}]))
    assert re.fullmatch(f"a worker was ended by {what}", caught.value.what)
    assert caught.value.where == f'job 1 of 1, executor_work:die: {{"signal": {int(number)}}}'
    assert caught.value.fix == fix


@pytest.fixture
def small_memory(tmp_path: Path) -> Iterator[Path]:
    """A control group with 200 MB of memory, where we may make one."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    groups = [group for _, controllers, group in lines if "memory" in controllers.split(",")]
    if not groups:
        pytest.skip("there is no memory controller of cgroup v1")
    folder = Path(f"/sys/fs/cgroup/memory{groups[0]}/{tmp_path.name}")
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"a control group cannot be made here: {error}")
    (folder / "memory.limit_in_bytes").write_text(str(200_000_000))
    yield folder
    assert wait_until(lambda: not (folder / "cgroup.procs").read_text())
    folder.rmdir()


def test_a_worker_that_the_out_of_memory_killer_ended_is_named_as_such(small_memory: Path) -> None:
    code = (
        "import executor_work; from builder.executors.processes import Processes\n"
        "try: list(Processes(2).run(executor_work.eat_memory, [{}]))\n"
        "except Exception as error: print(error)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: (small_memory / "cgroup.procs").write_text(str(os.getpid())),
    ).stdout
    assert re.fullmatch(
        r"a worker was ended by the out-of-memory killer, at 0\.[12] GB\n"
        r"  in job 1 of 1, executor_work:eat_memory: \{\}\n"
        r"  fix: EXECUTOR=in_process has one worker at a time; or use a machine with more memory\. "
        r"Finished work is kept\n",
        shown,
    )


def test_a_worker_that_leaves_without_a_record_is_reported() -> None:
    with pytest.raises(ExecutorError, match="a worker ended with status 3 and no record"):
        list(Processes(1).run(executor_work.leave, [{"status": 3}]))


def test_workers_share_the_cores_and_each_sees_one_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    jobs = numbered(2, folder=str(tmp_path), expected=2)
    records = [record for _, record in Processes(2).run(executor_work.meet, jobs)]
    share = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert {record["OMP_NUM_THREADS"] for record in records} == {share}
    assert {record["NUMBA_NUM_THREADS"] for record in records} == {share}
    assert {record["CUDA_VISIBLE_DEVICES"] for record in records} == {"3", "5"}


def test_a_number_of_threads_that_the_user_chose_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    ((_, record),) = Processes(1).run(executor_work.tell_process, [{}])
    assert record["OMP_NUM_THREADS"] == "7"


# Ray


@RAY_GROUP
def test_ray_starts_a_job_again_when_its_worker_is_killed(ray_address: str, tmp_path: Path) -> None:
    job = {"marker": str(tmp_path / "tried")}
    ((_, record),) = make_ray(1, ray_address).run(executor_work.die_the_first_time, [job])
    assert record["pid"] != record["first_pid"]


@RAY_GROUP
def test_ray_gives_up_on_a_job_whose_workers_always_die(ray_address: str) -> None:
    with pytest.raises(ExecutorError) as caught:
        list(make_ray(1, ray_address).run(executor_work.die, [{"signal": int(signal.SIGKILL)}]))
    assert re.fullmatch(
        r"its worker was lost 4 times, last on .*: its worker was killed, or crashed", caught.value.what
    )
    assert caught.value.where == 'job 1 of 1, executor_work:die: {"signal": 9}'
    assert "memory is the usual cause" in caught.value.fix


@RAY_GROUP
def test_without_an_address_ray_starts_on_this_machine_and_is_gone_afterwards(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("RAY_ADDRESS", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    records = make_executor("ray", num_workers=2).run(executor_work.tell_process, [{}])
    ((index, record),) = records
    assert index == 0
    assert record["pid"] not in before | {os.getpid()}
    assert record["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0))))
    assert wait_until(lambda: {process.pid for process in psutil.Process().children(recursive=True)} <= before)
    assert "".join(capfd.readouterr()) == ""


@RAY_GROUP
@pytest.mark.parametrize("address", ["127.0.0.1:1", "host.invalid:6379"])
def test_an_address_that_does_not_answer_is_reported_soon(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    started_s = time.monotonic()
    with pytest.raises(ExecutorError) as caught:
        list(make_executor("ray", num_workers=1).run(executor_work.square, numbered(1)))
    assert time.monotonic() - started_s < 15
    assert caught.value.what.startswith("no answer from the Ray cluster: ")
    assert caught.value.where == f"RAY_ADDRESS={address}"
    assert caught.value.fix == "start Ray there with `ray start --head`, or unset RAY_ADDRESS to use this machine alone"


@RAY_GROUP
def test_an_address_where_something_else_answers_is_reported_soon() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=lambda: server.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
        thread.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ExecutorError, match="what answers is not the head of a Ray cluster"):
            list(make_ray(1, address).run(executor_work.square, numbered(1)))
        thread.join()


@RAY_GROUP
@pytest.mark.parametrize("address", ["spark-1", "spark-1:", ":6379"])
def test_an_address_that_is_none_is_reported(address: str) -> None:
    with pytest.raises(ExecutorError) as caught:
        list(make_ray(1, address).run(executor_work.square, numbered(1)))
    assert str(caught.value) == (
        f"not an address of a Ray cluster\n  in RAY_ADDRESS={address}\n"
        "  fix: use HOST:PORT of its head, such as spark-1:6379"
    )
