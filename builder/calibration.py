"""From a data set to token rows: chosen by seed, cut to length, identified by a digest of the token ids."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder import hub
from builder.errors import CalibrationError, ManifestError
from builder.families import describe_failure
from builder.manifest import Calibration, Manifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rows:
    """Token ids, one tuple a row, in the order they were chosen."""

    tokens: tuple[tuple[int, ...], ...]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def digest(self) -> str:
        """sha256, in hex, of each row's length and ids as little-endian 32-bit numbers."""
        digest = hashlib.sha256()
        for row in self.tokens:
            digest.update(b"".join(number.to_bytes(4, "little") for number in (len(row), *row)))
        return digest.hexdigest()


def load_tokenizer(folder: Path, where: str) -> PreTrainedTokenizerBase:
    """The base model's own tokenizer. Raises CalibrationError if transformers cannot read it."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the Rust library raises nothing narrower
        raise CalibrationError(
            f"the base model's tokenizer cannot be read: {describe_failure(error)}",
            where,
            "see that the base has its tokenizer files",
        ) from error
    return tokenizer


def choose_rows(manifest: Manifest, base: Path) -> Rows:
    """The release's calibration rows.

    The data set's rows are taken in an order shuffled by the seed; rows shorter than `tokens[0]` are skipped, longer
    than `tokens[1]` are cut, until there are `samples` of them.
    Raises CalibrationError if the data set is empty, or has too few rows that are long enough.
    """
    spec = manifest.release.calibration
    assert spec is not None
    where = manifest.where("calibration", "path" if spec.path else "dataset")
    tokenizer = load_tokenizer(base, str(base))
    texts = read_texts(manifest, spec, where)
    if not texts:
        raise CalibrationError("the calibration data has no rows", where, "give a data set with text in it")
    order = list(range(len(texts)))
    random.Random(spec.seed).shuffle(order)
    shortest, longest = spec.tokens
    chosen: list[tuple[int, ...]] = []
    for index in order:
        if len(chosen) == spec.samples:
            break
        try:
            tokens = tokenize(tokenizer, texts[index], spec)[:longest]
        except Exception as error:  # chat templates raise whatever they like
            what = f"row {index + 1} cannot be tokenized: {describe_failure(error)}"
            raise CalibrationError(what, where, "mend the row, or see that it suits the chat template") from error
        if len(tokens) >= shortest:
            chosen.append(tuple(tokens))
    if len(chosen) < spec.samples:
        raise CalibrationError(
            f"only {len(chosen)} of {len(texts)} rows have {shortest} tokens or more, but samples is {spec.samples}",
            manifest.where("calibration", "samples"),
            f"set samples to {len(chosen)} or less, lower tokens[0], or give more rows"
            if chosen
            else "lower tokens[0], or give longer rows",
        )
    return Rows(tuple(chosen))


def tokenize(tokenizer: PreTrainedTokenizerBase, content: Any, spec: Calibration) -> list[int]:
    """Token ids of one row: a text, or a list of chat messages with `chat_template: true`."""
    if spec.chat_template:
        text = tokenizer.apply_chat_template(content, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    encoded = tokenizer(content, add_special_tokens=spec.add_special_tokens, truncation=False, verbose=False)
    return list(encoded["input_ids"])


def require_revision(manifest: Manifest, spec: Calibration) -> str:
    """The pinned revision of the data set; one that is not pinned is not built from."""
    if spec.revision is None:
        raise ManifestError(
            f"calibration.revision is missing, and {spec.dataset} may change under its name",
            manifest.where("calibration", "dataset"),
            f"run `doit pin:{manifest.name}`, or add `revision:` with a 40-hex commit of the data set",
        )
    return spec.revision


def read_texts(manifest: Manifest, spec: Calibration, where: str) -> list[Any]:
    """Every row's text or messages, in the data set's own order."""
    if spec.path is not None:
        return read_rows([manifest.resolve(spec.path)], spec, where)
    assert spec.dataset is not None
    revision = require_revision(manifest, spec)
    names = [file.name for file in hub.list_files(spec.dataset, revision, kind="dataset", where=where)]
    wanted = select_split(names, spec)
    if not wanted:
        config = f"config {spec.config}, " if spec.config else ""
        raise CalibrationError(
            f"{spec.dataset} has no Parquet or JSON lines file for {config}split {spec.split}",
            where,
            "check `config` and `split` against the data set's files",
        )
    folders = sorted({name.rpartition("/")[0] for name in wanted})
    if len(folders) > 1:
        raise CalibrationError(
            f"{spec.dataset} has split {spec.split} in several folders: {', '.join(folders)}",
            where,
            "set calibration.config to the one that is meant",
        )
    folder = hub.download_files(spec.dataset, revision, wanted, kind="dataset", where=where)
    return read_rows([folder / name for name in wanted], spec, where)


def select_split(names: Sequence[str], spec: Calibration) -> list[str]:
    """The files of one config and split by the Hub's own naming: CONFIG/SPLIT-00000-of-00003.parquet."""
    wanted = []
    numbered = re.compile(re.escape(spec.split) + r"(-\d+-of-\d+(-[0-9a-f]+)?)?\.(parquet|jsonl|json)")
    for name in sorted(names):
        folder, _, file = name.rpartition("/")
        in_config = spec.config in (None, "default") or spec.config in folder.split("/")
        if in_config and numbered.fullmatch(file):
            wanted.append(name)
    return wanted


def read_rows(paths: Sequence[Path], spec: Calibration, where: str) -> list[Any]:
    """The wanted column of all rows of the files, which are Parquet or JSON lines."""
    found: list[Any] = []
    for path in paths:
        if not path.is_file():
            raise CalibrationError(f"no such file: {path}", where, "give a file relative to the manifest")
        reader = read_parquet(path, spec, where) if path.suffix == ".parquet" else read_json_lines(path)
        for number, row in reader:
            content = row.get(spec.column)
            expected: type = list if spec.chat_template else str
            if not isinstance(content, expected):
                kind = "list of messages" if spec.chat_template else "text"
                raise CalibrationError(
                    f"row {number} has no {kind} in column {spec.column}",
                    f"{path}:{number}",
                    f"set calibration.column to one of {', '.join(sorted(row)) or 'its columns'}, or mend the row",
                )
            found.append(content)
    return found


def read_parquet(path: Path, spec: Calibration, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a Parquet file with their numbers, batch by batch."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [spec.column] if spec.column in file.schema_arrow.names else None
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        what = f"{path.name} is not a whole Parquet file: {describe_failure(error)}"
        raise CalibrationError(what, where, "fetch it again") from error


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a JSON lines file with their line numbers; empty lines are skipped."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                what = f"line {number} is not JSON: {error}"
                raise CalibrationError(what, f"{path}:{number}", "mend the line") from error
            if not isinstance(row, dict):
                what = f"line {number} is not a JSON object"
                raise CalibrationError(what, f"{path}:{number}", 'write {"text": "..."}')
            yield number, row
