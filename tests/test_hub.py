from __future__ import annotations

import hashlib
import shutil
import socket
import struct
import threading
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub, serve_fake_hub

from builder import hub
from builder.errors import BaseError

REPO = "acme/tiny"
WHERE = "releases/tiny.yaml:5:3: base.model: acme/tiny"
WEIGHTS = "model.safetensors"
HEADER = b'{"a":{"dtype":"U8","shape":[4194304],"data_offsets":[0,4194304]}}'
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "sub/notes.txt": b"notes",
    WEIGHTS: struct.pack("<Q", len(HEADER)) + HEADER + bytes(range(256)) * (1 << 14),
}
NUM_BYTES = len(FILES[WEIGHTS])
NOBODY = "0" * 40


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(hub, "MAX_RETRIES", 0)
    with serve_fake_hub(tmp_path, monkeypatch) as running:
        yield running


def assert_complete(folder: Path) -> None:
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES


def error_of(revision: str, names: tuple[str, ...] = tuple(FILES), repo: str = REPO, **options: object) -> str:
    with pytest.raises(BaseError) as caught:
        hub.download_files(repo, revision, names, where=WHERE, **options)
    return str(caught.value)


def test_a_listing_tells_names_sizes_and_the_digests_the_hub_keeps(fake: FakeHub) -> None:
    revision = fake.add(REPO, FILES)
    config = FILES["config.json"]
    listed = hub.list_files(REPO, revision, where=WHERE)
    assert [file.name for file in listed] == ["config.json", WEIGHTS, "sub/notes.txt"]
    git_sha1 = hashlib.sha1(b"blob %d\0" % len(config) + config).hexdigest()
    assert listed[0] == hub.RemoteFile("config.json", len(config), None, git_sha1)
    assert (listed[1].num_bytes, listed[1].sha256) == (NUM_BYTES, hashlib.sha256(FILES[WEIGHTS]).hexdigest())


def test_wanted_files_lie_in_the_caches_snapshot_and_no_others(fake: FakeHub, tmp_path: Path) -> None:
    revision = fake.add(REPO, {**FILES, "pytorch_model.bin": b"pickle"})
    folder = hub.download_files(REPO, revision, tuple(FILES), where=WHERE)
    assert folder == tmp_path / "home/hub/models--acme--tiny/snapshots" / revision
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == ["config.json", WEIGHTS, "notes.txt"]
    assert_complete(folder)
    assert fake.num_bytes_sent("pytorch_model.bin") == 0


def test_huggingface_hub_finds_what_was_fetched_in_its_own_cache(fake: FakeHub) -> None:
    from huggingface_hub import snapshot_download

    revision = fake.add(REPO, FILES)
    folder = hub.download_files(REPO, revision, tuple(FILES), where=WHERE)
    assert snapshot_download(REPO, revision=revision, local_files_only=True) == str(folder)


def test_a_given_folder_holds_exactly_the_wanted_files(fake: FakeHub, tmp_path: Path) -> None:
    revision = fake.add(REPO, FILES, kind="dataset")
    folder = tmp_path / "data"
    assert hub.download_files(REPO, revision, tuple(FILES), kind="dataset", where=WHERE, folder=folder) == folder
    assert_complete(folder)
    assert sum(path.is_file() for path in folder.rglob("*")) == len(FILES)


def test_finished_files_are_not_fetched_again(fake: FakeHub) -> None:
    revision = fake.add(REPO, FILES)
    hub.download_files(REPO, revision, tuple(FILES), where=WHERE)
    assert len(fake.answers) == len(FILES)
    assert_complete(hub.download_files(REPO, revision, tuple(FILES), where=WHERE))
    assert len(fake.answers) == len(FILES)


def test_a_file_that_two_revisions_share_is_fetched_once(fake: FakeHub) -> None:
    hub.download_files(REPO, fake.add(REPO, FILES), tuple(FILES), where=WHERE)
    files = {**FILES, "config.json": b"{}"}
    folder = hub.download_files(REPO, fake.add(REPO, files), tuple(files), where=WHERE)
    assert (folder / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert fake.num_bytes_sent(WEIGHTS) == NUM_BYTES


def test_names_of_equal_content_are_each_there(fake: FakeHub) -> None:
    files = {"a.txt": b"same", "b.txt": b"same"}
    folder = hub.download_files(REPO, fake.add(REPO, files), tuple(files), where=WHERE)
    assert {name: (folder / name).read_bytes() for name in files} == files


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_cached_file_of_the_right_size_but_damaged_is_fetched_anew(fake: FakeHub, name: str) -> None:
    revision = fake.add(REPO, FILES)
    folder = hub.download_files(REPO, revision, tuple(FILES), where=WHERE)
    content = bytearray(FILES[name])
    content[-1] ^= 1
    (folder / name).resolve().write_bytes(content)
    assert_complete(hub.download_files(REPO, revision, tuple(FILES), where=WHERE))
    assert fake.num_bytes_sent(name) == 2 * len(FILES[name])
    assert len(fake.answers) == len(FILES) + 1


def test_a_copy_without_link_in_the_snapshot_is_not_trusted(fake: FakeHub) -> None:
    revision = fake.add(REPO, FILES)
    folder = hub.download_files(REPO, revision, tuple(FILES), where=WHERE)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).write_bytes(bytes(NUM_BYTES))
    assert_complete(hub.download_files(REPO, revision, tuple(FILES), where=WHERE))


def test_a_file_that_arrives_damaged_is_fetched_once_more(fake: FakeHub) -> None:
    revision = fake.add(REPO, FILES)
    fake.damages = {WEIGHTS: 1}
    assert_complete(hub.download_files(REPO, revision, tuple(FILES), where=WHERE))
    assert fake.num_bytes_sent(WEIGHTS) == 2 * NUM_BYTES


def test_a_file_that_keeps_arriving_damaged_is_refused_and_not_kept(fake: FakeHub, tmp_path: Path) -> None:
    revision = fake.add(REPO, FILES)
    fake.damages = {WEIGHTS: 9}
    content = FILES[WEIGHTS]
    damaged, sound = (
        hashlib.sha256(variant).hexdigest() for variant in (bytes([content[0] ^ 1]) + content[1:], content)
    )
    assert error_of(revision, (WEIGHTS,)) == (
        f"model.safetensors arrives damaged: digest {damaged} instead of {sound}\n"
        f"  in {WHERE}\n"
        "  fix: run the same command again, on another network"
    )
    assert fake.damages == {WEIGHTS: 7}
    assert not [path for path in (tmp_path / "home/hub/models--acme--tiny").rglob("*") if path.is_file()]


def test_a_file_shorter_than_listed_is_refused(fake: FakeHub) -> None:
    revision = fake.add(REPO, FILES, claimed_sizes={"config.json": 5})
    assert error_of(revision, ("config.json",)).startswith("config.json arrives damaged: 23 bytes instead of 5\n")


def test_a_broken_connection_is_resumed_in_the_same_run(fake: FakeHub) -> None:
    revision = fake.add(REPO, FILES)
    fake.cuts = {WEIGHTS: [NUM_BYTES // 2, 1000]}
    assert_complete(hub.download_files(REPO, revision, tuple(FILES), where=WHERE))
    assert [(answer.start, answer.status) for answer in fake.answers if answer.name == WEIGHTS] == [
        (0, 206),
        (NUM_BYTES // 2, 206),
        (NUM_BYTES // 2 + 1000, 206),
    ]
    assert fake.num_bytes_sent(WEIGHTS) == NUM_BYTES


def test_an_interrupted_file_goes_on_in_the_next_run_where_it_stopped(fake: FakeHub) -> None:
    revision = fake.add(REPO, FILES)
    half = NUM_BYTES // 2
    fake.cuts = {WEIGHTS: [half, 0]}
    assert error_of(revision, (WEIGHTS,)) == (
        f"the connection broke off after {half} of {NUM_BYTES} bytes of model.safetensors: peer closed connection "
        f"without sending complete message body (received 0 bytes, expected {NUM_BYTES - half})\n"
        f"  in {WHERE}\n"
        "  fix: run the same command again; it goes on from there"
    )
    assert fake.num_bytes_sent(WEIGHTS) == half
    assert_complete(hub.download_files(REPO, revision, tuple(FILES), where=WHERE))
    assert fake.num_bytes_sent(WEIGHTS) == NUM_BYTES


def test_a_server_that_ignores_ranges_sends_the_whole_file_again(fake: FakeHub) -> None:
    revision = fake.add(REPO, FILES)
    fake.ignores_ranges = True
    fake.cuts = {WEIGHTS: [1000]}
    assert_complete(hub.download_files(REPO, revision, tuple(FILES), where=WHERE))
    assert fake.num_bytes_sent(WEIGHTS) == 1000 + NUM_BYTES


def test_a_partial_file_of_wrong_bytes_is_thrown_away(fake: FakeHub, tmp_path: Path) -> None:
    revision = fake.add(REPO, FILES)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f".{WEIGHTS}.partial").write_bytes(b"x" * 1000)
    assert_complete(hub.download_files(REPO, revision, tuple(FILES), where=WHERE, folder=tmp_path / "data"))
    assert fake.num_bytes_sent(WEIGHTS) == 2 * NUM_BYTES - 1000


def test_two_builds_at_the_same_time_fetch_a_base_once(fake: FakeHub) -> None:
    revision = fake.add(REPO, FILES)
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(hub.download_files(REPO, revision, tuple(FILES), where=WHERE)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 3
    assert_complete(folders[0])
    assert len(fake.answers) == len(FILES)


@pytest.mark.parametrize("ignores_ranges", [False, True])
def test_headers_are_read_without_the_weights(fake: FakeHub, tmp_path: Path, ignores_ranges: bool) -> None:
    revision = fake.add(REPO, FILES)
    fake.ignores_ranges = ignores_ranges
    assert hub.read_headers(REPO, revision, [WEIGHTS], where=WHERE) == {WEIGHTS: HEADER}
    assert not (tmp_path / "home").exists()
    if not ignores_ranges:
        assert fake.num_bytes_sent(WEIGHTS) == 8 + len(HEADER)


def test_a_file_that_is_no_safetensors_file_has_no_header(fake: FakeHub) -> None:
    revision = fake.add(REPO, {WEIGHTS: b"version https://git-lfs.github.com/spec/v1"})
    with pytest.raises(BaseError) as caught:
        hub.read_headers(REPO, revision, [WEIGHTS], where=WHERE)
    assert str(caught.value) == (
        f"model.safetensors of acme/tiny is not a safetensors file\n  in {WHERE}\n  fix: use another revision"
    )


def test_a_full_disk_is_noticed_before_anything_is_fetched(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = fake.add(REPO, FILES, claimed_sizes={WEIGHTS: 141_100_000_000})
    usage = namedtuple("usage", "total used free")(0, 0, 20_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    assert error_of(revision) == (
        "141.1 GB of acme/tiny are to be fetched, but only 20.0 GB are free on disk\n"
        f"  in {WHERE}\n"
        f"  fix: make room in {tmp_path}/home/hub/models--acme--tiny, or set HF_HOME to a larger disk"
    )
    assert error_of(revision, folder=tmp_path / "data").endswith(f"  fix: make room in {tmp_path}/data")
    assert fake.answers == []


def test_bytes_that_are_there_already_need_no_room(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    revision = fake.add(REPO, FILES)
    fake.cuts = {WEIGHTS: [NUM_BYTES - 100, 0]}
    error_of(revision)
    usage = namedtuple("usage", "total used free")(0, 0, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    assert_complete(hub.download_files(REPO, revision, tuple(FILES), where=WHERE))


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "a//b", "a\\b", "a\nb", "."])
def test_a_name_that_leaves_its_folder_is_refused(fake: FakeHub, tmp_path: Path, name: str) -> None:
    revision = fake.add(REPO, {**FILES, name: b"x"})
    assert error_of(revision, folder=tmp_path / "data") == (
        f"acme/tiny lists a file that is not safe to fetch: {name!r}\n  in {WHERE}\n  fix: use another repository"
    )
    assert not (tmp_path / "data").exists()


def test_a_file_that_is_not_listed_is_refused(fake: FakeHub) -> None:
    revision = fake.add(REPO, FILES)
    assert error_of(revision, ("nope.json",)) == (
        f"acme/tiny has no file nope.json\n  in {WHERE}\n  fix: use one of {fake.url}/acme/tiny/tree/{revision}"
    )


def test_a_gated_repository_says_where_to_accept_its_conditions(fake: FakeHub) -> None:
    revision = fake.add(REPO, FILES, is_gated=True)
    assert error_of(revision) == (
        "acme/tiny is gated\n"
        f"  in {WHERE}\n"
        f"  fix: accept its conditions at {fake.url}/acme/tiny, log in with `hf auth login`, "
        "then run the same command again; finished files are kept"
    )


def test_a_repository_that_is_not_there_may_also_be_private(fake: FakeHub) -> None:
    assert error_of(NOBODY, kind="dataset") == (
        f"{fake.url} has no dataset acme/tiny, or does not show it to you\n"
        f"  in {WHERE}\n"
        "  fix: correct the name; if it is private, log in with `hf auth login`"
    )


def test_a_token_the_hub_does_not_know_is_named_as_the_cause(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    revision = fake.add(REPO, FILES)
    fake.token = "hf_right"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert error_of(revision) == (
        f"{fake.url} does not accept your token\n  in {WHERE}\n  fix: log in with `hf auth login`, or correct HF_TOKEN"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert_complete(hub.download_files(REPO, revision, tuple(FILES), where=WHERE))


def test_a_commit_that_is_not_there_points_at_those_that_are(fake: FakeHub) -> None:
    fake.add(REPO, FILES)
    assert error_of(NOBODY) == (
        f"acme/tiny has no commit {NOBODY}\n  in {WHERE}\n  fix: use one of {fake.url}/acme/tiny/commits/main"
    )


@pytest.mark.parametrize("revision", ["main", "v1.0", "abc1234", "A" * 40])
def test_a_revision_that_is_no_commit_is_refused_without_asking(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch, revision: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert error_of(revision) == (
        f"revision '{revision}' is not a commit\n"
        f"  in {WHERE}\n"
        f"  fix: write the 40 hexadecimal digits of one of {fake.url}/acme/tiny/commits/main"
    )


def test_a_local_path_is_no_repository(fake: FakeHub) -> None:
    assert error_of(NOBODY, repo="./models/tiny") == (
        f"'./models/tiny' is not the name of a Hub repository\n"
        f"  in {WHERE}\n"
        "  fix: write organization/name; a folder goes under `path:`"
    )


def test_offline_mode_is_named_as_the_cause(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert error_of(NOBODY) == (
        "acme/tiny cannot be looked up in offline mode\n"
        f"  in {WHERE}\n"
        "  fix: unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE, then run the same command again; finished files are kept"
    )


def test_the_first_error_stops_the_other_files_at_once(fake: FakeHub) -> None:
    content = bytes(1 << 20)
    files = {f"{index:02}.safetensors": bytes([index]) + content for index in range(40)}
    revision = fake.add(REPO, files)
    fake.busy = {"00.safetensors": 1}
    error_of(revision, tuple(files))
    assert len(fake.answers) < len(files) - 1


def test_a_hub_that_cannot_be_reached_is_named(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free_port:  # bound, but nobody listens
        free_port.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free_port.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", url)
        assert error_of(NOBODY) == (
            f"no Hub answers at {url}: [Errno 111] Connection refused\n"
            f"  in {WHERE}\n"
            "  fix: check the network and HF_ENDPOINT, then run the same command again; finished files are kept"
        )


def test_a_busy_hub_is_asked_again_later(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    revision = fake.add(REPO, FILES)
    fake.busy = {WEIGHTS: 1}
    assert error_of(revision) == (
        f"{fake.url} answers 503 for acme/tiny\n"
        f"  in {WHERE}\n"
        "  fix: later, run the same command again; finished files are kept"
    )
    fake.busy = {WEIGHTS: 1}
    monkeypatch.setattr(hub, "MAX_RETRIES", 1)
    assert_complete(hub.download_files(REPO, revision, tuple(FILES), where=WHERE))
