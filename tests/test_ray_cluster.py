"""A cluster of several nodes: who gets which job, what happens when nodes die, and machines that share no storage."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import executor_work
import hosts
import psutil
import pytest
from fake_hub import serve_fake_hub

from builder.base import check_digests, hash_files
from builder.errors import BaseError, ExecutorError
from builder.executors import plan_calls
from builder.executors.apart import Chunk, make_errand, perform_apart, receive_files
from builder.executors.nodes import Crew, Demand, Node, check_feasible, describe_software, examine, find_objections
from builder.files import write_receipt
from builder.parts import UNITS, read_record, record_file
from builder.worker import open_base

pytestmark = pytest.mark.xdist_group("ray")
TINY_BASE = Path(__file__).parents[1] / "releases" / "tiny-llama" / "base"


def node(name: str, num_cpus: int, memory_gb: float = 16, num_gpus: int = 0) -> Node:
    return Node(id=name, name=name, num_cpus=num_cpus, num_gpus=num_gpus, memory_bytes=int(memory_gb * 1e9))


def demand(weight: float, memory_gb: float = 0, num_gpus: int = 0) -> Demand:
    return Demand(weight=weight, memory_bytes=int(memory_gb * 1e9), num_gpus=num_gpus)


def hand_out(crew: Crew, demands: list[Demand]) -> list[str]:
    """The nodes of these jobs, all at work at once; "" for a job that has to wait."""
    places = []
    for one in demands:
        chosen = crew.choose(one, [])
        has_room = crew.has_room(chosen, one)
        places.append(chosen.name if has_room else "")
        if has_room:
            crew.at_work[chosen.id].append(one)
    return places


# Which node takes which job


def test_the_big_shards_go_to_the_big_nodes_whatever_their_order() -> None:
    nodes, shards = [node("small", 4), node("big-1", 20), node("big-2", 20)], [demand(41), demand(41), demand(6)]
    crew = Crew(nodes, shards)
    assert hand_out(crew, shards) == ["big-1", "big-2", "small"]
    assert [crew.share_cpus(node) for node in nodes] == [4, 20, 20]


def test_jobs_that_share_a_node_share_its_cpus() -> None:
    nodes, jobs = [node("a", 8), node("b", 8)], [demand(1)] * 4
    crew = Crew(nodes, jobs)
    assert sorted(hand_out(crew, jobs)) == ["a", "a", "b", "b"]
    assert [crew.share_cpus(node) for node in nodes] == [4, 4]


def test_a_node_takes_no_more_jobs_than_its_memory_cpus_and_gpus_hold() -> None:
    jobs = [demand(1, memory_gb=10)] * 4
    assert hand_out(Crew([node("a", 8, memory_gb=25), node("b", 8, memory_gb=12)], jobs), jobs) == ["a", "b", "a", ""]
    assert hand_out(Crew([node("a", 1), node("b", 2)], [demand(1)] * 4), [demand(1)] * 4).count("") == 1
    cuda = [demand(1, num_gpus=1)] * 3
    assert hand_out(Crew([node("a", 64), node("b", 4, num_gpus=2)], cuda), cuda) == ["b", "b", ""]


def test_a_job_rather_waits_for_a_quick_node_than_start_on_a_slow_one() -> None:
    crew = Crew([node("big-1", 20), node("big-2", 20), node("small", 1)], [demand(41), demand(41), demand(1)])
    assert hand_out(crew, [demand(41), demand(41), demand(41)]) == ["big-1", "big-2", ""]


def test_a_job_avoids_the_node_it_was_lost_on_while_there_is_another() -> None:
    crew = Crew([node("a", 8), node("b", 1)], [demand(1)])
    assert crew.choose(demand(1), []).name == "a"
    assert crew.choose(demand(1), ["a"]).name == "b"
    crew.keep({"a"})
    assert crew.choose(demand(1), ["a"]).name == "a"


@pytest.mark.parametrize(
    ("asked", "what", "fix"),
    [
        (
            demand(1, memory_gb=128),
            "no node has 128.0 GB of memory for a job",
            "start Ray on a larger machine, or make the jobs smaller with more shards",
        ),
        (
            demand(1, memory_gb=1, num_gpus=1),
            "no node has a GPU",
            "start Ray on a machine with a GPU, or set device: cpu",
        ),
    ],
)
def test_what_no_node_has_is_refused_with_what_each_has(asked: Demand, what: str, fix: str) -> None:
    with pytest.raises(ExecutorError) as caught:
        check_feasible([node("spark-1", 20, 119.5), node("spark-2", 4, 16)], asked)
    assert str(caught.value) == (
        f"{what}\n  in the Ray cluster of spark-1 (20 CPUs, 119.5 GB, no GPUs), spark-2 (4 CPUs, 16.0 GB, no GPUs)\n"
        f"  fix: {fix}"
    )


# What a node says of itself


def test_a_node_tells_what_it_has_to_have_in_common_with_the_builder(tmp_path: Path) -> None:
    (tmp_path / ".probe").touch()
    sizes = {path.name: path.stat().st_size for path in TINY_BASE.iterdir() if path.is_file()}
    bases = [(str(TINY_BASE), sizes), (str(tmp_path), {"config.json": 7})]
    answer = examine({str(tmp_path): ".probe", str(tmp_path / "elsewhere"): ".probe"}, bases)
    assert answer["unseen"] == [str(tmp_path / "elsewhere")]
    assert answer["differences"] == {str(tmp_path): "config.json is missing"}
    assert answer["software"] == describe_software()
    assert answer["software"]["torch"].startswith("2.")
    assert list(find_objections(node("a", 1), answer | {"differences": {}}, describe_software())) == []


def test_other_software_and_a_missing_base_are_told_by_node_and_version() -> None:
    ours = {"python": "3.11.9", "torch": "2.13.0"}
    answer = {"software": ours | {"torch": "2.12.0"}, "differences": {"/models/tiny": "config.json is missing"}}
    assert [str(objection) for objection in find_objections(node("spark-2", 1), answer, ours)] == [
        "node spark-2 has torch 2.12.0 (here 2.13.0)\n  in the Ray cluster\n"
        "  fix: install the same on spark-2, or take it out of the cluster",
        "config.json is missing on node spark-2\n  in /models/tiny\n"
        "  fix: copy the base model to that place there, or keep it on storage that every node sees",
    ]


# Files that come back from a machine that does not see the builder's folder


def pieces_job(folder: Path, **more: Any) -> dict[str, Any]:
    job = {"folder": str(folder), "key": "k", "all_units": ["a", "b", "c"], "num_bytes": 9_000_000, "stop_at": None}
    return job | {"stop_on": None} | more


def carry_out(job: dict[str, Any]) -> Iterator[Any]:
    """What the worker of a job sends from a machine apart, here from a thread of this process."""
    (call,) = plan_calls(executor_work.make_pieces, [job])
    return perform_apart(make_errand(call, job))


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RELEASE_BUILDER_SCRATCH", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


def test_pieces_arrive_before_their_records_and_leave_nothing_behind(tmp_path: Path, scratch: Path) -> None:
    folder, names = tmp_path / "parts", []
    inbox = receive_files(folder)
    next(inbox)
    *chunks, outcome = carry_out(pieces_job(folder))
    for chunk in chunks:
        assert len(chunk.content) <= 8 << 20
        names += [chunk.name] if chunk.sha256 else []
        inbox.send(chunk)
    assert names == [f"units/{unit}.safetensors{end}" for unit in "abc" for end in ("", ".record.json")]
    assert all(read_record(folder / UNITS / f"{unit}.safetensors", "k") for unit in "abc")
    assert (folder / UNITS / "b.safetensors").read_bytes() == b"b" * 9_000_000
    assert json.loads(outcome)["apart"] and json.loads(outcome)["made"] == ["a", "b", "c"]
    assert list(scratch.iterdir()) == []


def test_units_that_the_builder_has_are_not_made_again(tmp_path: Path, scratch: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for name in ("units/a.safetensors", "model-1.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"12")
        record_file(folder / name, "k", "unread", 2)
    files = [{"name": "model-1.safetensors", "units": ["b"]}, {"name": "model-2.safetensors", "units": ["c"]}]
    *_, outcome = carry_out(pieces_job(folder, files=files))
    assert json.loads(outcome)["made"] == ["c"]
    *_, outcome = carry_out(pieces_job(folder, files=files, key="another"))
    assert json.loads(outcome)["made"] == ["a", "b", "c"]


def test_receipts_under_the_jobs_key_travel_to_the_machine_and_no_others(tmp_path: Path) -> None:
    for name, key in (("block-0.json", "k"), ("block-1.json", "another"), ("block-0.states.json", "k")):
        write_receipt(tmp_path / name, {"key": key})
    job = pieces_job(tmp_path)
    errand = make_errand(plan_calls(executor_work.make_pieces, [job])[0], job)
    assert errand.notes == {"block-0.json": (tmp_path / "block-0.json").read_text()}


def test_what_a_lost_worker_had_made_is_sent_when_its_job_comes_back(tmp_path: Path, scratch: Path) -> None:
    job = pieces_job(tmp_path / "parts")
    sender = carry_out(job)
    first = next(chunk for chunk in sender if isinstance(chunk, Chunk))
    assert first.name == "units/a.safetensors"
    sender.close()  # the machine keeps what it has made
    *chunks, _ = carry_out(job)
    assert [chunk.name for chunk in chunks if chunk.sha256 and chunk.name.endswith(".safetensors")] == [
        f"units/{unit}.safetensors" for unit in "abc"
    ]


def test_a_file_that_arrives_damaged_or_in_part_leaves_no_trace(tmp_path: Path) -> None:
    inbox = receive_files(tmp_path)
    next(inbox)
    inbox.send(Chunk(name="a", content=b"1", sha256=None))
    inbox.close()
    assert list(tmp_path.iterdir()) == []
    inbox = receive_files(tmp_path)
    next(inbox)
    with pytest.raises(ExecutorError, match="a arrived damaged"):
        inbox.send(Chunk(name="a", content=b"1", sha256="0" * 64))
    assert list(tmp_path.iterdir()) == []


# The base model on a machine apart


def base_job(folder: Path, /, **more: Any) -> dict[str, Any]:
    files = dict(hash_files(TINY_BASE, {}))
    sizes = {name: entry["num_bytes"] for name, entry in files.items()}
    digests = {name: entry["sha256"] for name, entry in files.items()}
    return {"base": str(folder), "base_files": sizes, "base_digests": digests} | more


def test_a_hub_base_that_is_not_there_is_fetched_by_its_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_fake_hub(tmp_path, monkeypatch) as hub:
        files = {path.name: path.read_bytes() for path in TINY_BASE.iterdir() if path.is_file()}
        revision = hub.add("acme/tiny", files)
        job = base_job(
            tmp_path / "gone", model="acme/tiny", revision=revision, apart=True, folder=str(tmp_path / "s" / "1")
        )
        fetched = open_base(job)
        assert fetched.folder.name == revision
        assert len(fetched.tensors) > 10
    assert open_base(job).folder == fetched.folder, "it is looked up without the Hub"


def test_a_base_of_the_same_sizes_and_other_bytes_is_refused_apart(tmp_path: Path) -> None:
    shutil.copytree(TINY_BASE, tmp_path / "base")
    job = base_job(tmp_path / "base", apart=True, folder=str(tmp_path / "s" / "1"))
    assert open_base(job).tensors
    config = tmp_path / "base" / "config.json"
    config.write_bytes(config.read_bytes().replace(b"{", b"{ ", 1)[:-1])
    with pytest.raises(BaseError, match=r"config\.json is not the one that was fetched"):
        open_base(job)
    open_base(job | {"apart": False})


def test_a_bases_digests_are_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = base_job(TINY_BASE)
    check_digests(TINY_BASE, job["base_digests"], tmp_path / "notes.json")
    noted = (tmp_path / "notes.json").stat().st_mtime_ns
    check_digests(TINY_BASE, job["base_digests"], tmp_path / "notes.json")
    assert (tmp_path / "notes.json").stat().st_mtime_ns == noted


# Nodes of one machine, under Ray's own test cluster

QUICK = {
    "prestart_worker_first_driver": False,
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
NODE = {"memory": 4_000_000_000, "object_store_memory": 80_000_000}


def start_cluster(head_cpus: int) -> Any:
    from ray.cluster_utils import Cluster

    head = NODE | {"num_cpus": head_cpus, "node_name": "head", "include_dashboard": False, "_system_config": QUICK}
    return Cluster(initialize_head=True, head_node_args=head)


def add_node(cluster: Any, name: str, num_cpus: int, **more: Any) -> Any:
    return cluster.add_node(num_cpus=num_cpus, node_name=name, **NODE, **more)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    cluster = start_cluster(1)
    for name in ("big_1", "big_2"):
        add_node(cluster, name, 4, wait=False)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


def run(cluster: Any, work: Any, jobs: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    from builder.executors.ray import Ray

    return list(Ray(len(jobs), cluster.address).run(work, jobs))


def raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def raylets(cluster: Any) -> dict[int, str]:
    """{process id of the raylet: node name}; a worker is a child of its node's."""
    return {raylet(node): node._ray_params.node_name for node in cluster.list_all_nodes()}


@contextlib.contextmanager
def once_begun(marker: Path, act: Any) -> Iterator[None]:
    """Call `act` with what the first attempt of a job wrote, as soon as it did."""

    def watch() -> None:
        while not marker.exists() and not stop.is_set():
            time.sleep(0.01)
        if not stop.is_set():
            act(*map(int, marker.read_text().split()))

    stop = threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_shards_of_41_41_and_6_layers_run_where_they_fit(cluster: Any) -> None:
    jobs = [{"number": number, "weight": weight} for number, weight in enumerate([6, 41, 41])]
    records = dict(run(cluster, executor_work.tell_process, jobs))
    names = [raylets(cluster)[records[number]["parent"]] for number in range(3)]
    assert names[0] == "head"
    assert sorted(names[1:]) == ["big_1", "big_2"]


def test_a_cluster_without_the_memory_refuses_before_it_starts_anything(cluster: Any, tmp_path: Path) -> None:
    jobs = [{"memory_bytes": 5 * 10**9, "markers": [str(tmp_path / "begun")]}]
    with pytest.raises(ExecutorError) as caught:
        run(cluster, executor_work.linger, jobs)
    assert str(caught.value) == (
        "no node has 5.0 GB of memory for a job\n"
        "  in the Ray cluster of big_1 (4 CPUs, 4.0 GB, no GPUs), big_2 (4 CPUs, 4.0 GB, no GPUs), "
        "head (1 CPU, 4.0 GB, no GPUs)\n"
        "  fix: start Ray on a larger machine, or make the jobs smaller with more shards"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_job_whose_worker_is_killed_is_done_again_on_another_node(
    cluster: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    marker, parents = tmp_path / "begun", []

    def kill(worker: int, parent: int) -> None:
        parents.append(parent)
        os.kill(worker, signal.SIGKILL)

    with once_begun(marker, kill):
        ((_, record),) = run(cluster, executor_work.linger, [{"markers": [str(marker)]}])
    lost, after = raylets(cluster)[parents[0]], raylets(cluster)[record["parent"]]
    assert {lost, after} == {"big_1", "big_2"}
    assert capfd.readouterr().err == (
        f"job 1 of 1: lost on {lost} (its worker was killed, or crashed); done again on {after}\n"
    )


def test_a_job_whose_nodes_die_is_done_again_on_others(
    cluster: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    killed = add_node(cluster, "killed", 8)
    removed = add_node(cluster, "removed", 7)
    first, second = tmp_path / "1", tmp_path / "2"
    try:
        with (
            once_begun(first, lambda worker, parent: parent == raylet(killed) and os.kill(parent, signal.SIGKILL)),
            once_begun(second, lambda *_: cluster.remove_node(removed, allow_graceful=False)),
        ):
            ((_, record),) = run(cluster, executor_work.linger, [{"markers": [str(first), str(second)]}])
    finally:
        for node in {killed, removed} & cluster.worker_nodes:
            cluster.remove_node(node, allow_graceful=False)
    assert raylets(cluster)[record["parent"]] == "big_1"
    said = capfd.readouterr().err.splitlines()
    assert [re.sub(r" \(.*\)", "", line) for line in said] == [
        "job 1 of 1: lost on killed; done again on removed",
        "job 1 of 1: lost on removed; done again on big_1",
    ]
    worker = int(first.read_text().split()[0])
    assert not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE, "it lives on"


def test_a_node_with_another_torch_is_refused_by_name_before_work_starts(cluster: Any, tmp_path: Path) -> None:
    info = tmp_path / "site" / "torch-2.12.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.12.0\n")
    environment = {"PYTHONPATH": str(tmp_path / "site")}
    skewed = add_node(cluster, "skewed", 1, env_vars=environment)
    try:
        with pytest.raises(ExecutorError) as caught:
            run(cluster, executor_work.linger, [{"markers": [str(tmp_path / "begun")]}])
    finally:
        cluster.remove_node(skewed, allow_graceful=False)
    assert caught.value.what == f"node skewed has torch 2.12.0 (here {describe_software()['torch']})"
    assert not (tmp_path / "begun").exists()


def test_when_no_node_or_no_head_is_left_the_build_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builder.executors.ray.LOOK_EVERY_S", 0.5)
    lonely = start_cluster(0)
    only = add_node(lonely, "only", 1)
    head = lonely.head_node.all_processes["gcs_server"][0].process.pid
    try:
        with (
            once_begun(tmp_path / "1", lambda *_: lonely.remove_node(only, allow_graceful=False)),
            pytest.raises(ExecutorError) as caught,
        ):
            run(lonely, executor_work.linger, [{"markers": [str(tmp_path / "1")]}])
        assert str(caught.value) == (
            "the Ray cluster has no node left that can work\n"
            "  fix: start Ray on one with `ray start --address=HEAD`, then run the same command again: "
            "finished work is kept"
        )
        add_node(lonely, "another", 1)
        with (
            once_begun(tmp_path / "2", lambda *_: os.kill(head, signal.SIGKILL)),
            pytest.raises(ExecutorError) as caught,
        ):
            run(lonely, executor_work.linger, [{"markers": [str(tmp_path / "2")]}])
        assert str(caught.value) == (
            f"the head of the Ray cluster is gone\n  in {lonely.address}\n"
            "  fix: start Ray there and on the nodes, then run the same command again: finished work is kept"
        )
    finally:
        lonely.shutdown()


# Machines that share nothing but the network


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[hosts.Host], dict[str, str]]]:
    if reason := hosts.why_not():
        pytest.skip(f"machines cannot be emulated here: {reason}")
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    names = ["spark-1", "spark-2", "spark-3"]
    with hosts.start_hosts(names, tmp_path_factory.mktemp("project")) as machines:
        address = hosts.start_ray(machines, dict(zip(names, (1, 2, 4), strict=True)), env)
        yield machines, env | {"RAY_ADDRESS": address}


DRIVER = """
import json, sys, executor_work
from builder.errors import BuildError
from builder.executors.ray import Ray
jobs = json.loads(sys.argv[2])
try:
    for index, record in Ray(len(jobs), sys.argv[1]).run(executor_work.make_pieces, jobs):
        print(json.dumps([index, record]))
except BuildError as error:
    print(error)
"""


def drive(machines: tuple[list[hosts.Host], dict[str, str]], jobs: list[dict[str, Any]]) -> Any:
    first, env = machines[0][0], machines[1]
    return first.start([sys.executable, "-c", DRIVER, env["RAY_ADDRESS"], json.dumps(jobs)], env, stdout=-1, stderr=-1)


def shard_jobs(machines: tuple[list[hosts.Host], dict[str, str]], folder: str, stop_on: str | None) -> list[Any]:
    place = machines[0][0].folder / folder
    return [
        pieces_job(place, all_units=[f"{shard}{unit}" for unit in "abc"], stop_at=f"{shard}c", stop_on=stop_on)
        | {"weight": weight}
        for shard, weight in enumerate([1, 2, 4])
    ]


def test_pieces_come_back_from_machines_apart_and_a_lost_job_goes_on_where_it_stopped(
    machines: tuple[list[hosts.Host], dict[str, str]],
) -> None:
    first, _, third = machines[0]
    driver = drive(machines, shard_jobs(machines, "parts", "spark-3"))
    units = first.look(first.folder / "parts" / UNITS)
    deadline = time.monotonic() + 60
    while not (units / "2b.safetensors.record.json").exists():
        assert driver.poll() is None and time.monotonic() < deadline, driver.communicate()
        time.sleep(0.02)
    assert not third.look(first.folder / "parts").exists(), "the machines see one folder"
    (worker,) = third.find_workers()
    worker.kill()
    out, err = driver.communicate(timeout=60)
    records = dict(json.loads(line) for line in out.splitlines())
    assert [records[number]["host"] for number in range(3)] == ["spark-1", "spark-2", "spark-2"]
    assert [records[number]["apart"] for number in range(3)] == [False, True, True]
    assert records[2]["made"] == ["2c"]
    assert "lost on spark-3 (its worker was killed, or crashed); done again on spark-2" in err
    for shard in range(3):
        for unit in "abc":
            path = units / f"{shard}{unit}.safetensors"
            assert read_record(path, "k") and path.read_bytes() == f"{shard}{unit}".encode() * 9_000_000


def test_machines_with_another_builder_none_or_no_base_are_refused_together(
    machines: tuple[list[hosts.Host], dict[str, str]],
) -> None:
    first, second, third = machines[0]
    shutil.copytree(TINY_BASE, first.look(first.folder / "base"))
    sizes = {path.name: path.stat().st_size for path in TINY_BASE.iterdir() if path.is_file()}
    other, package = second.folder / "other.py", hosts.ROOT / "builder"
    second.look(other).write_text((package / "terminal.py").read_text() + "\n")
    hosts.inside(second.first_process, f"mount --bind {other} {package / 'terminal.py'}")
    hosts.inside(third.first_process, f"mount -t tmpfs tmpfs {package}")
    try:
        jobs = shard_jobs(machines, "refused", None)
        jobs = [job | {"base": str(first.folder / "base"), "base_files": sizes} for job in jobs]
        out, err = drive(machines, jobs).communicate(timeout=60)
    finally:
        hosts.inside(second.first_process, f"umount {package / 'terminal.py'}")
        hosts.inside(third.first_process, f"umount {package}")
    assert out.count("fix:") == 3, out + err
    assert re.search(f"^node spark-2 has builder [0-9a-f]+ .here {describe_software()['builder']}.$", out, re.M), out
    assert re.search("^.* is missing on node spark-2$", out, re.M), out
    assert re.search("^node spark-3 cannot run this builder: ModuleNotFoundError: .*'builder", out, re.M), out
    assert list(first.look(first.folder / "refused").iterdir()) == [], "work had started, or a probe was left"
