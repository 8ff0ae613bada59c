"""One snapshot of a Hub repository at a pinned commit: listed, fetched with resume, and verified."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from builder.errors import BaseError
from builder.files import explain_disk_errors, sha256_file, sync_folder

Kind = Literal["model", "dataset"]

TIMEOUT_S = 30.0
MAX_RETRIES = 5  # of one file, counted anew whenever bytes have arrived
NUM_CONNECTIONS = 8
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit


@dataclass(frozen=True)
class RemoteFile:
    """A file of a Hub repository.

    sha256: hex, where the Hub keeps one (LFS); None for small files in git.
    git_sha1: hex, of git's blob; where there is a sha256, only of the LFS pointer.
    """

    name: str
    num_bytes: int
    sha256: str | None
    git_sha1: str

    @property
    def digest(self) -> str:
        """What the content must hash to, and the name under which the Hub's cache stores it."""
        return self.sha256 or self.git_sha1


def find_commit(repo: str, *, kind: Kind, where: str) -> str:
    """The 40-hex commit that a repository's main branch is at now. Raises BaseError."""
    from huggingface_hub import HfApi

    with explain_hub_errors(repo, None, kind, where):
        api = HfApi(endpoint=endpoint())
        commit = (api.model_info if kind == "model" else api.dataset_info)(repo, timeout=TIMEOUT_S).sha
    if not re.fullmatch("[0-9a-f]{40}", commit or ""):
        raise BaseError(f"{repo} has no commit yet", where, "use a repository with files in it")
    return str(commit)


def list_files(repo: str, revision: str, *, kind: Kind = "model", where: str) -> tuple[RemoteFile, ...]:
    """The files of a repository at a commit, sorted by name, in one request.

    Raises BaseError, also for a name that would leave the folder it is fetched to.
    """
    from huggingface_hub import HfApi

    with explain_hub_errors(repo, revision, kind, where):  # list_repo_tree takes no timeout
        api = HfApi(endpoint=endpoint())
        ask = api.model_info if kind == "model" else api.dataset_info
        info = ask(repo, revision=revision, files_metadata=True, timeout=TIMEOUT_S)
    files = []
    for entry in info.siblings or ():
        num_bytes, sha256 = (entry.lfs.size, entry.lfs.sha256) if entry.lfs else (entry.size, None)
        file = RemoteFile(entry.rfilename, num_bytes or 0, sha256, entry.blob_id or "")
        is_safe = file.name.isprintable() and "\\" not in file.name and not {"", ".", ".."} & set(file.name.split("/"))
        if not is_safe or not re.fullmatch("[0-9a-f]{64}" if sha256 else "[0-9a-f]{40}", file.digest):
            raise BaseError(
                f"{repo} lists a file that is not safe to fetch: {file.name!r}", where, "use another repository"
            )
        files.append(file)
    return tuple(sorted(files, key=lambda file: file.name))


def download_files(
    repo: str, revision: str, names: Sequence[str], *, kind: Kind = "model", where: str, folder: Path | None = None
) -> Path:
    """A folder with the named files: `folder`, or the snapshot in the Hub's cache, where others may lie beside them.

    Size and digest of every file are checked, also where it was there already; a damaged one is fetched anew. An
    interrupted file goes on where it stopped, in this run or the next. Whether the disk has room is checked before
    anything is fetched. Raises BaseError.
    """
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    listed = {file.name: file for file in list_files(repo, revision, kind=kind, where=where)}
    for name in names:
        if name not in listed:
            raise BaseError(f"{repo} has no file {name}", where, f"use one of {page(repo, kind)}/tree/{revision}")
    storage = Path(constants.HF_HUB_CACHE) / f"{kind}s--{repo.replace('/', '--')}"
    lock = storage.parent / ".locks" / storage.name / "builder.lock"
    home = folder or storage
    paths = {name: folder / name if folder else storage / "blobs" / listed[name].digest for name in names}

    missing = find_missing({path: listed[name] for name, path in paths.items()})  # equal content is stored once
    if missing:
        lock.parent.mkdir(parents=True, exist_ok=True)
        home.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock), explain_hub_errors(repo, revision, kind, where):
            missing = find_missing(missing)  # another release may have fetched them meanwhile
            for path in missing:
                path.unlink(missing_ok=True)
            needed = sum(max(0, file.num_bytes - size_of(partial_of(path))) for path, file in missing.items())
            if needed > (free := shutil.disk_usage(home).free):
                raise BaseError(
                    f"{needed / 1e9:.1f} GB of {repo} are to be fetched, but only {free / 1e9:.1f} GB are free on disk",
                    where,
                    f"make room in {home}" + ("" if folder else ", or set HF_HOME to a larger disk"),
                )
            urls = {
                path: hf_hub_url(repo, file.name, repo_type=kind, revision=revision, endpoint=endpoint())
                for path, file in missing.items()
            }
            fetch_all(missing, urls, where)
    if folder:
        return folder
    snapshot = storage / "snapshots" / revision
    for name, path in paths.items():
        link(snapshot / name, path)
    return snapshot


def read_headers(repo: str, revision: str, names: Sequence[str], *, where: str) -> dict[str, bytes]:
    """The JSON headers of safetensors files by name, read by range requests: no weights are fetched."""
    from huggingface_hub import hf_hub_url

    def read_header(name: str) -> bytes:
        url = hf_hub_url(repo, name, revision=revision, endpoint=endpoint())
        prefix = read_range(url, 0, 8)
        num_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < num_bytes <= MAX_HEADER_BYTES:
            raise BaseError(f"{name} of {repo} is not a safetensors file", where, "use another revision")
        return read_range(url, 8, num_bytes)

    with explain_hub_errors(repo, revision, "model", where), ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
        return dict(zip(names, pool.map(read_header, names), strict=True))


def read_range(url: str, start: int, num_bytes: int) -> bytes:
    content = bytearray()
    with open_stream(url, f"bytes={start}-{start + num_bytes - 1}") as (is_range, chunks):
        start = 0 if is_range else start
        while len(content) < start + num_bytes and (chunk := next(chunks, b"")):
            content += chunk
    return bytes(content[start : start + num_bytes])


def find_missing(files: dict[Path, RemoteFile]) -> dict[Path, RemoteFile]:
    """The files that are not there, or damaged."""
    with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
        damages = pool.map(find_damage, files, files.values())
        return {path: file for (path, file), damage in zip(files.items(), damages, strict=True) if damage}


def find_damage(path: Path, file: RemoteFile) -> str:
    """How a local copy differs from the Hub's file; empty if it does not."""
    if not path.is_file():
        return "missing"
    if (num_bytes := path.stat().st_size) != file.num_bytes:
        return f"{num_bytes} bytes instead of {file.num_bytes}"
    if file.sha256:
        digest = sha256_file(path)
    else:
        digest = hashlib.sha1(b"blob %d\0" % num_bytes + path.read_bytes(), usedforsecurity=False).hexdigest()
    return "" if digest == file.digest else f"digest {digest} instead of {file.digest}"


def fetch_all(files: dict[Path, RemoteFile], urls: dict[Path, str], where: str) -> None:
    """Fetch several files at a time, with a progress bar on a terminal; the first error stops the others."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    stop = threading.Event()
    total, there = sum(file.num_bytes for file in files.values()), sum(size_of(partial_of(path)) for path in files)
    bar = tqdm(total=total, initial=there, unit="B", unit_scale=True, disable=None)  # type: ignore[no-untyped-call]
    with bar, ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
        futures = [pool.submit(fetch, file, urls[path], path, where, bar.update, stop) for path, file in files.items()]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def fetch(
    file: RemoteFile, url: str, path: Path, where: str, report: Callable[[int], object], stop: threading.Event
) -> None:
    """Fetch one file to `path`, where it appears only whole; what arrives damaged is fetched once more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    for _ in range(2):
        with explain_disk_errors(path):
            fetch_rest(file, url, partial, where, report, stop)
        damage = find_damage(partial, file)
        if not damage:
            partial.replace(path)
            sync_folder(path.parent)
            return
        partial.unlink()
    raise BaseError(f"{file.name} arrives damaged: {damage}", where, "run the same command again, on another network")


def fetch_rest(
    file: RemoteFile, url: str, partial: Path, where: str, report: Callable[[int], object], stop: threading.Event
) -> None:
    """Append what is missing of a partial file, over as many connections as it takes."""
    import httpx

    partial.touch()
    num_failures = 0
    while (have := size_of(partial)) < file.num_bytes:
        try:
            with open_stream(url, f"bytes={have}-") as (is_range, chunks), partial.open("ab") as output:
                output.truncate(have if is_range else 0)
                for chunk in chunks:
                    if stop.is_set():
                        raise CancelledError
                    output.write(chunk)
                    report(len(chunk))
                output.flush()
                os.fsync(output.fileno())
            if size_of(partial) <= have:
                raise httpx.RemoteProtocolError("the answer was empty")
        except httpx.TransportError as error:
            there = size_of(partial)
            num_failures = 0 if there > have else num_failures + 1
            if num_failures > MAX_RETRIES and there == 0:
                raise
            if num_failures > MAX_RETRIES:
                raise BaseError(
                    f"the connection broke off after {there} of {file.num_bytes} bytes of {file.name}: {error}",
                    where,
                    "run the same command again; it goes on from there",
                ) from error
            stop.wait(num_failures)


@contextmanager
def open_stream(url: str, byte_range: str) -> Iterator[tuple[bool, Iterator[bytes]]]:
    """Whether the answer is the wanted range (else it is the whole file), and its chunks."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
        http_stream_backoff,
    )

    headers = build_hf_headers() | {"Range": byte_range, "Accept-Encoding": "identity"}
    # retry_on_exceptions=(): otherwise it would swallow what the caller's block raises.
    with http_stream_backoff(
        "GET",
        url,
        headers=headers,
        timeout=TIMEOUT_S,
        follow_redirects=True,
        max_retries=MAX_RETRIES,
        retry_on_exceptions=(),
    ) as response:
        if response.is_error:
            response.read()
        hf_raise_for_status(response)
        yield response.status_code == 206, response.iter_bytes()


def link(name: Path, path: Path) -> None:
    """Let a snapshot's name point at the stored file, in place of whatever lay there."""
    destination = os.path.relpath(path, name.parent)
    if name.is_symlink() and name.readlink() == Path(destination):
        return
    name.parent.mkdir(parents=True, exist_ok=True)
    temporary = name.with_name(f".{name.name}.{secrets.token_hex(4)}.link")
    temporary.symlink_to(destination)
    temporary.replace(name)


def partial_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def endpoint() -> str:
    """HF_ENDPOINT as it is now; the library reads it only when it is imported."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def page(repo: str, kind: Kind) -> str:
    return f"{endpoint()}/{'datasets/' if kind == 'dataset' else ''}{repo}"


@contextmanager
def explain_hub_errors(repo: str, revision: str | None, kind: Kind, where: str) -> Iterator[None]:
    """Turn what the Hub, its library and the network report into a BaseError; refuse a revision that is no commit.

    revision: None where none is asked for.
    """
    import httpx
    from huggingface_hub import errors

    if revision is not None and not re.fullmatch("[0-9a-f]{40}", revision):
        what = f"revision {revision!r} is not a commit"
        raise BaseError(what, where, f"write the 40 hexadecimal digits of one of {page(repo, kind)}/commits/main")
    try:
        yield
    except (httpx.HTTPError, errors.HFValidationError, errors.OfflineModeIsEnabled, json.JSONDecodeError) as error:
        what, fix = explain(error, repo, revision, kind)
        raise BaseError(what, where, fix) from error


def explain(error: Exception, repo: str, revision: str | None, kind: Kind) -> tuple[str, str]:
    """What is wrong, and how to mend it."""
    from huggingface_hub import errors

    again = "run the same command again; finished files are kept"
    if isinstance(error, errors.HFValidationError):
        return f"{repo!r} is not the name of a Hub repository", "write organization/name; a folder goes under `path:`"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return (
            f"{repo} cannot be looked up in offline mode",
            f"unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE, then {again}",
        )
    if isinstance(error, errors.GatedRepoError):  # a RepositoryNotFoundError too
        return (
            f"{repo} is gated",
            f"accept its conditions at {page(repo, kind)}, log in with `hf auth login`, then {again}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no commit {revision}", f"use one of {page(repo, kind)}/commits/main"
    if isinstance(error, errors.RepositoryNotFoundError):
        what = f"{endpoint()} has no {kind} {repo}, or does not show it to you"
        return what, "correct the name; if it is private, log in with `hf auth login`"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if status == 401:
        return f"{endpoint()} does not accept your token", "log in with `hf auth login`, or correct HF_TOKEN"
    if status == 403:
        return f"your token may not read {repo}", f"give it read access in {endpoint()}/settings/tokens"
    if status:
        return f"{endpoint()} answers {status} for {repo}", f"later, {again}"
    reason = str(error) or type(error).__name__
    return f"no Hub answers at {endpoint()}: {reason}", f"check the network and HF_ENDPOINT, then {again}"
